"""The verb console: a terminal, or a pipe, attached to the serial port of a running guest."""

from __future__ import annotations

import os
import select
import socket
import sys
import time
from typing import Any

from ..control import runtime
from ..control.attached import Frames, Kind
from ..errors import ControlError
from .terminal import Terminal, die_of, escape_name, parse_escape

MAX_TYPED_BYTES = 1 << 20
"""How much input is kept for a guest that takes none: so much can be typed or pasted and the escape key still works."""
MAX_SHOWN_BYTES = 1 << 16
CHUNK_BYTES = 4096
"""At most PIPE_BUF: a pipe that poll(2) calls writable takes it without waiting."""
QUIET_S, LATEST_S = 1.0, 10.0
HELLO_TIMEOUT_S = 10.0


def console(name: str, escape: str) -> int:
    """Attach to ``name`` until the escape key, the end of the input, or that of the guest here. Returns the status."""
    key = parse_escape(escape)
    path = runtime.console_path(name)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(HELLO_TIMEOUT_S)
        try:
            connection.connect(str(path))
        except OSError as error:
            raise ControlError(f"cannot attach to VM {name} at {path}: {error.strerror or error}") from None
        terminal = Terminal()
        try:
            line = _Line(name, connection, terminal, key)
            line.serve()
        finally:
            terminal.close()
    line.say_farewell()
    if line.signal:
        die_of(line.signal)
    return line.status


class _Line:
    """The connection, and what is on its way through it either way. Nothing waits but in poll(2)."""

    def __init__(self, name: str, connection: socket.socket, terminal: Terminal, key: int | None) -> None:
        self.status = self.signal = 0
        self._name = name
        self._socket = connection
        self._terminal = terminal
        self._key = key if terminal.is_terminal else None
        self._frames = Frames()
        self._typed = bytearray()
        self._shown = bytearray()
        self._output_fd = _own_output()
        self._input_over = False
        self._told_input_over = False
        self._detach_at: float | None = None
        self._latest: float | None = None
        self._end: dict[str, Any] | None = None
        self._hung_up = False
        self._detached = False
        self._greeted = False

    def serve(self) -> None:
        """Carry bytes until it is over. Raises :class:`ControlError` when the VM refuses or hangs up without a word."""
        self._await_hello()
        self._terminal.set_raw()
        self._socket.setblocking(False)
        while not self._is_over():
            self._turn(self._wait())
        if self._hung_up and self._end is None and not self.signal:
            raise ControlError(f"VM {self._name} hung up and did not say how its guest ended")

    def _await_hello(self) -> None:
        """The first word, before the terminal is changed."""
        while True:
            fds = [self._socket.fileno(), self._terminal.signal_fd]
            readable = select.select(fds, [], [], HELLO_TIMEOUT_S)[0]
            if not readable:
                raise ControlError(f"VM {self._name} does not answer at its console")
            if self._terminal.signal_fd in readable and (number := self._terminal.signalled()):
                self.signal = number
                return
            if fds[0] in readable:
                self._receive()
            if self._greeted or self._hung_up or self._detached or self._end is not None:
                return

    def _is_over(self) -> bool:
        if self.signal or self._detached:
            return True
        if self._end is not None or self._hung_up:
            return not self._shown
        if self._detach_at is None or self._latest is None:
            return False
        return not self._shown and time.monotonic() >= min(self._detach_at, self._latest)

    def _wait(self) -> dict[int, int]:
        poll = select.poll()
        poll.register(self._terminal.signal_fd, select.POLLIN)
        from_vm = select.POLLIN if len(self._shown) < MAX_SHOWN_BYTES and not self._hung_up else 0
        to_vm = select.POLLOUT if self._typed and not self._hung_up else 0
        if from_vm | to_vm:
            poll.register(self._socket, from_vm | to_vm)
        if self._terminal.fd >= 0 and not self._input_over and len(self._typed) < MAX_TYPED_BYTES:
            poll.register(self._terminal.fd, select.POLLIN)
        if self._shown:
            poll.register(self._output_fd, select.POLLOUT)
        if self._detach_at is None or self._latest is None:
            return dict(poll.poll())
        return dict(poll.poll(max(min(self._detach_at, self._latest) - time.monotonic(), 0) * 1000 + 1))

    def _turn(self, ready: dict[int, int]) -> None:
        if self._terminal.signal_fd in ready:
            self.signal = self._terminal.signalled()
        if self._terminal.fd in ready:
            self._read_keys()
        events = ready.get(self._socket.fileno(), 0)
        if events & ~select.POLLOUT:
            self._receive()
        if self._typed and events & select.POLLOUT:
            self._send()
        if self._output_fd in ready:
            self._show()
        if (self._input_over or self._terminal.fd < 0) and not self._typed and not self._told_input_over:
            self._told_input_over = True
            self._shut()

    def _shut(self) -> None:
        try:
            self._socket.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # it hung up; its last word is still to be read

    def _read_keys(self) -> None:
        try:
            data = os.read(self._terminal.fd, 1 << 16)
        except OSError:
            data = b""
        at = data.find(self._key) if self._key is not None else -1
        self._typed += data[:at] if at >= 0 else data
        if at >= 0:
            self._send()
        self._detached = at >= 0
        if not data:
            self._input_over = True
            # A terminal without a person is no reason to wait for what the guest may say.
            self._detached = self._terminal.is_terminal

    def _send(self) -> None:
        try:
            del self._typed[: self._socket.send(self._typed, socket.MSG_NOSIGNAL)]
        except (BlockingIOError, InterruptedError):
            pass
        except OSError:
            pass  # what it said before it hung up is read first

    def _receive(self) -> None:
        try:
            data = self._socket.recv(1 << 16)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            data = b""
        self._hung_up = not data
        for kind, body in self._frames.feed(data):
            self._take(kind, body)

    def _take(self, kind: Kind, body: Any) -> None:
        if kind is Kind.OUTPUT and self._end is None:
            self._shown += body
            if self._detach_at is not None:
                self._detach_at = time.monotonic() + QUIET_S
        elif kind is Kind.HELLO:
            self._greet(body)
        elif kind is Kind.REFUSED:
            raise ControlError(str(body.get("text")))
        elif kind is Kind.SKIPPED:
            self._tell(f"{body.get('bytes')} bytes of output went by unread")
        elif kind is Kind.TAKEN:
            now = time.monotonic()
            self._detach_at, self._latest = now + QUIET_S, now + LATEST_S
        elif kind is Kind.END:
            self._end = body

    def _greet(self, body: dict[str, Any]) -> None:
        way_out = "the end of the input detaches"
        if self._terminal.is_terminal:
            way_out = f"{escape_name(self._key)} detaches" if self._key is not None else "no key detaches"
        others = f" (so are {body['others']} others)" if body.get("others") else ""
        self._tell(f"attached to VM {self._name}{others}, {way_out}")
        self._greeted = True

    def _show(self) -> None:
        try:
            written = os.write(self._output_fd, self._shown[:CHUNK_BYTES])
        except BlockingIOError:
            return
        del self._shown[:written]

    def _tell(self, text: str) -> None:
        """One line of ours on standard error."""
        ends = ("\r\n", "\r\n") if self._terminal.is_raw else ("", "\n")
        print(f"{ends[0]}kvmigrate: {text}", end=ends[1], file=sys.stderr, flush=True)

    def say_farewell(self) -> None:
        """Why it is over, with the terminal as it was before."""
        lost = len(self._typed)
        if self._end is not None:
            self.status = int(self._end.get("status", 2))
            lost += int(self._end.get("undelivered", 0))
        if self._terminal.is_terminal:
            print(file=sys.stderr)
        if self._end is not None:
            self._tell(str(self._end.get("text")))
        elif not self.signal and self._terminal.is_terminal:
            self._tell(f"detached from VM {self._name}")
        if lost:
            self._tell(f"the last {lost} bytes of the input did not reach the guest")


def _own_output() -> int:
    """Standard output, to be written without waiting: a terminal by a description of our own, since the shell shares
    that of descriptor 1. Whatever else it is, poll(2) tells when it takes ``CHUNK_BYTES``."""
    number = sys.stdout.fileno()
    try:
        return os.open(os.ttyname(number), os.O_WRONLY | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return number
