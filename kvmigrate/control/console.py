"""The console of a VM: a socket beside its control socket, where terminals attach to the guest's serial port.

Any number up to ``MAX_CLIENTS`` may be attached at once: all see the output, and what each types goes to the guest in
the order in which it comes. Who comes later is first shown the last ``KEPT_BYTES``. The guest never waits for a client:
one that does not read misses what went by, and is told how much. Input stays in its socket until the UART has room.

One thread serves them all. It sleeps while nobody is attached, and while the guest stands still for a switchover: in
the blackout each turn of the interpreter would be the guest's time.
"""

from __future__ import annotations

import os
import select
import socket
import threading
import time
from contextlib import suppress

from ..devices.backends import Uart
from ..devices.tee import Tee
from .attached import Attached, Kind
from .scrollback import Scrollback
from .server import same_user

MAX_CLIENTS = 16
ACCEPT_RETRY_S = 0.05
"""How long nobody is served when the process has no descriptor left for one more."""
CLOSE_WAIT_S = 1.0
"""How long, at the end, a client that does not read is waited for."""


class Console:
    """Hears a :class:`Tee` and serves who attaches. :meth:`heard` and :meth:`wake` are for its UART; see there."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._scrollback = Scrollback()
        self._uart: Uart | None = None
        self._clients: list[Attached] = []
        self._listener: socket.socket | None = None
        self._thread: threading.Thread | None = None
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._awake = True
        self._awaits_output = self._awaits_room = False
        self._held = False
        self._end: tuple[int, str] | None = None
        self._deadline: float | None = None

    # What the UART tells, with its lock held.

    def heard(self, data: bytes) -> None:
        """The guest sent ``data``."""
        self._scrollback.append(data)
        # A stuck client is no reason: it would cost a turn of the interpreter for every byte.
        if self._awaits_output and not self._awake:
            self._wake()

    def wake(self) -> None:
        """The UART may have room. Called for every byte that a guest without FIFOs takes."""
        if self._awaits_room and not self._awake:
            self._wake()

    def _wake(self) -> None:
        if self._thread is not None:
            self._awake = True
            os.eventfd_write(self._wake_fd, 1)

    # What the session tells.

    def adopt(self, tee: Tee) -> None:
        """Serve the UART behind ``tee`` from now on."""
        self._uart = tee.uart
        tee.listen(self)
        self._wake()

    def start(self, listener: socket.socket) -> None:
        """Accept the clients of ``listener``, a UNIX socket that this owns from now on."""
        self._listener = listener
        self._listener.setblocking(False)
        self._thread = threading.Thread(target=self._serve, name="console", daemon=True)
        self._thread.start()

    def hold(self, held: bool) -> None:
        """Whether to leave all clients waiting. Never wakes the thread to be held."""
        self._held = held
        if not held and self._clients:
            self._wake()

    def end(self, status: int, text: str) -> None:
        """Tell everyone, and whoever comes later, once the last output is on its way; the first word counts."""
        self._end = self._end or (status, text)
        self._held = False
        self._wake()

    def close(self) -> None:
        """The guest is gone: say what is still to be said, for a bounded time, and hang up. Idempotent."""
        self._deadline = time.monotonic() + CLOSE_WAIT_S
        self.end(2, f"the process of VM {self._name} came to its end")
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._listener is not None:
            self._listener.close()
            os.close(self._wake_fd)
            self._listener = None

    # The thread.

    def _serve(self) -> None:
        while not self._is_over():
            poll = select.poll()
            for fd, events in self._wanted().items():
                poll.register(fd, events)
            ready = dict(poll.poll(None if self._deadline is None else 50))
            self._awake = True
            if self._wake_fd in ready:
                os.eventfd_read(self._wake_fd)
            if not self._held:
                self._attend(ready)
        for client in self._clients:
            client.close()
        self._clients.clear()

    def _is_over(self) -> bool:
        if self._deadline is None:
            return False
        served = not any(client.listens and (client.is_behind or not client.was_told) for client in self._clients)
        return served or time.monotonic() > self._deadline

    def _wanted(self) -> dict[int, int]:
        """What to wait for. Whoever looks for news after this wakes the thread; a client of which nothing is wanted is
        left out, since its POLLHUP would end every wait."""
        self._awake = False
        self._awaits_output = self._awaits_room = bool(self._clients)
        wanted = {self._wake_fd: select.POLLIN}
        if self._held:
            return wanted
        if self._listener is not None:
            wanted[self._listener.fileno()] = select.POLLIN
        takes_input = self._uart is not None and self._uart.rx_wanted()
        self._awaits_room = not takes_input and any(client.types for client in self._clients)
        for client in self._clients:
            events = select.POLLIN if takes_input and client.types else 0
            events |= select.POLLOUT if client.is_behind else 0
            if events:
                wanted[client.fileno()] = events
        self._awaits_output = any(not wanted.get(client.fileno(), 0) & select.POLLOUT for client in self._clients)
        return wanted

    def _attend(self, ready: dict[int, int]) -> None:
        for client in self._clients:
            events = ready.get(client.fileno(), 0)
            if events & (select.POLLIN | select.POLLHUP) and client.types and self._uart is not None:
                self._uart.fill(client.receive)
            if events & (select.POLLOUT | select.POLLHUP | select.POLLERR) and client.is_behind:
                client.send()
        if self._listener is not None and self._listener.fileno() in ready:
            self._accept()
        self._say_end()
        for client in [client for client in self._clients if not client.types and not client.listens]:
            self._drop(client)

    def _drop(self, client: Attached) -> None:
        self._clients.remove(client)
        client.close()

    def _accept(self) -> None:
        assert self._listener is not None
        try:
            connection, _ = self._listener.accept()
        except OSError:
            time.sleep(ACCEPT_RETRY_S)
            return
        if not same_user(connection):
            connection.close()
            return
        client = Attached(connection, self._scrollback)
        self._forget_the_absent()
        if len(self._clients) >= MAX_CLIENTS:
            client.say(Kind.REFUSED, {"text": f"{MAX_CLIENTS} are attached to VM {self._name} already"})
            client.send()
            client.close()
            return
        client.say(Kind.HELLO, {"name": self._name, "others": len(self._clients)})
        self._clients.append(client)

    def _forget_the_absent(self) -> None:
        """Drop those who have left; what they typed waits for the guest as long as nobody needs their place."""
        for client in [client for client in self._clients if client.has_left()]:
            if not client.undelivered() or len(self._clients) >= MAX_CLIENTS:
                self._drop(client)

    def _say_end(self) -> None:
        """The last word to those who have heard the rest."""
        if self._end is None or (self._uart is not None and self._uart.tx_waiting()):
            return
        for client in self._clients:
            if client.listens and not client.is_behind and not client.was_told:
                status, text = self._end
                client.was_told = True
                with suppress(OSError):
                    client.say(Kind.END, {"status": status, "text": text, "undelivered": client.undelivered()})
