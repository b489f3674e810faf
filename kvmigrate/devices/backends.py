"""Where the guest's serial port leads: the terminal, a pseudo-terminal, a file, a UNIX socket, or nowhere.

A backend never makes a vCPU wait: :meth:`Backend.write` takes what goes out now and says how much that was. Its one
thread sleeps in poll(2) until there is input for which the UART has room, or room for output that waits, so an idle
serial port costs nothing. Once the other side has gone, output is dropped, as on a line that nobody listens to.
"""

from __future__ import annotations

import atexit
import errno
import os
import select
import socket
import sys
import termios
import threading
import tty
from collections.abc import Callable
from functools import partial
from typing import Protocol, TextIO

from ..errors import ConfigError, HostError
from ..threads import Thread

ABSENT_READER_POLL_MS = 250
CONNECT_TIMEOUT_S = 5.0
SEND_BUFFER_BYTES = 1 << 20
STDOUT_CHUNK_BYTES = 512


class Uart(Protocol):
    """What a backend's thread asks of the UART it is attached to."""

    def rx_wanted(self) -> bool: ...
    def tx_waiting(self) -> bool: ...
    def fill(self, read: Callable[[int], bytes]) -> None: ...
    def drain(self) -> None: ...
    def finish(self) -> None: ...


class Backend:
    """The null backend, and what all backends share: drops all output and gives no input."""

    @property
    def wake_fd(self) -> int | None:
        """An eventfd to which a write, by a thread in C, is as good as :meth:`wake`; None when there is nobody to wake.
        It is the backend's own."""
        return None

    @property
    def socket_fd(self) -> int:
        """A socket to which a UART may send by itself what it then tells by :meth:`was_sent`; -1 where there is none.
        It is the backend's own."""
        return -1

    def attach(self, uart: Uart) -> None:
        """Serve ``uart`` from now on."""

    def write(self, data: bytes) -> int:
        """Send ``data`` without blocking; returns how many bytes were taken. Called with the UART's lock held."""
        return len(data)

    def was_sent(self, data: bytes) -> None:
        """``data`` was sent to :attr:`socket_fd`, before what :meth:`write` gets after this. Called like that."""

    def wake(self) -> None:
        """Tell the backend's thread that the UART has room again, or bytes to send. Never blocks."""

    def close(self) -> None:
        """Send what still waits in the UART, for a bounded time; close what was opened. Idempotent."""


class PollBackend(Backend):
    """A backend over file descriptors that it owns: ``input_fd`` and ``output_fd``, which may be one, or None.

    ``name`` is what messages call it: what it belongs to, ``serial`` or ``console``, and where that leads.
    """

    def __init__(self, name: str, input_fd: int | None, output_fd: int | None) -> None:
        self._name = name
        self._input_fd = input_fd
        self._output_fd = output_fd
        self._owned = {fd for fd in (input_fd, output_fd) if fd is not None}
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._wake_lock = threading.Lock()
        self._closed = False
        self._absent = False
        self._thread: Thread | None = None
        self._uart: Uart | None = None

    @property
    def wake_fd(self) -> int | None:
        return self._wake_fd

    def attach(self, uart: Uart) -> None:
        self._uart = uart
        self._thread = Thread(partial(self._serve, uart))
        self._thread.start()

    def wake(self) -> None:
        with self._wake_lock:
            if not self._closed:
                os.eventfd_write(self._wake_fd, 1)

    def write(self, data: bytes) -> int:
        """See :meth:`Backend.write`; an output that has failed takes everything and drops it."""
        if self._output_fd is None:
            return len(data)
        try:
            return self._send(self._output_fd, data)
        except (BlockingIOError, InterruptedError):
            return 0
        except OSError as error:
            return self._output_failed(error, len(data))

    def close(self) -> None:
        """See :meth:`Backend.close`. Afterwards the UART is paused, so no write can be under way."""
        if self._uart is not None:
            self._uart.finish()
        with self._wake_lock:
            if self._closed:
                return
            self._closed = True
            os.eventfd_write(self._wake_fd, 1)
        if self._thread is not None:
            self._thread.join()
        self._input_fd = self._output_fd = None
        for fd in self._owned | {self._wake_fd}:
            os.close(fd)

    def _send(self, fd: int, data: bytes) -> int:
        return os.write(fd, data)

    def _output_failed(self, error: OSError, size: int) -> int:
        """Give the output up for good; returns ``size``, all of which is dropped."""
        self._output_fd = None
        print(f"kvmigrate: {self._name}: {error.strerror}: its output is dropped from now on", file=sys.stderr)
        return size

    def _receive(self, most: int) -> bytes:
        """At most ``most`` bytes of input that is there already; an end or an error of the input ends it for good."""
        if self._input_fd is None:
            return b""
        try:
            data = os.read(self._input_fd, most)
        except (BlockingIOError, InterruptedError):
            return b""
        except OSError:
            data = b""
        if not data:
            self._input_fd = None
        return data

    def _serve(self, uart: Uart) -> None:
        while not self._closed:
            ready = self._wait(self._wanted(uart))
            if self._wake_fd in ready:
                os.eventfd_read(self._wake_fd)
            if ready.get(self._output_fd, 0) & ~select.POLLIN:
                uart.drain()
            if ready.get(self._input_fd, 0) & ~select.POLLOUT:
                uart.fill(self._receive)

    def _wanted(self, uart: Uart) -> dict[int, int]:
        """What to wait for. A descriptor of which nothing is wanted is left out: its POLLHUP would end every wait."""
        wanted = {self._wake_fd: select.POLLIN}
        if self._output_fd is not None and uart.tx_waiting():
            wanted[self._output_fd] = select.POLLOUT
        if self._input_fd is not None and not self._absent and uart.rx_wanted():
            wanted[self._input_fd] = wanted.get(self._input_fd, 0) | select.POLLIN
        return wanted

    def _wait(self, wanted: dict[int, int]) -> dict[int | None, int]:
        poll = select.poll()
        for fd, events in wanted.items():
            poll.register(fd, events)
        ready = poll.poll(ABSENT_READER_POLL_MS if self._absent else None)
        self._absent = False
        return dict(ready)


class FileBackend(PollBackend):
    """``file:PATH``: output is appended, so that neither a restored guest nor a second one destroys a log.

    A FIFO may stand there too, when somebody reads it.
    """

    def __init__(self, path: str, owner: str = "serial") -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
        try:
            fd = os.open(path, flags, 0o666)
        except OSError as error:
            raise HostError(f"{owner} file:{path}", error.errno or 0) from error
        super().__init__(f"{owner} file:{path}", None, fd)


class UnixBackend(PollBackend):
    """``unix:PATH``: connects to a listening stream socket."""

    def __init__(self, path: str, owner: str = "serial") -> None:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.settimeout(CONNECT_TIMEOUT_S)
            connection.connect(path)
        except OSError as error:
            connection.close()
            if error.errno is None:
                raise ConfigError(f"{owner} unix:{path} cannot be connected to: {error}") from error
            raise HostError(f"{owner} unix:{path}", error.errno, "a listening stream socket must be there") from error
        # Bytes sent one at a time cost some 800 bytes of this buffer each (unix(7), SO_SNDBUF).
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        connection.setblocking(False)
        self._socket_fd = connection.detach()
        super().__init__(f"{owner} unix:{path}", self._socket_fd, self._socket_fd)

    @property
    def socket_fd(self) -> int:
        return self._socket_fd


class PtyBackend(PollBackend):
    """``pty``: a new pseudo-terminal, whose ``path`` is told once on standard error.

    Output is dropped while nobody has it open.
    """

    def __init__(self, owner: str = "serial") -> None:
        master, slave = os.openpty()
        self.path = os.ttyname(slave)
        tty.setraw(slave)
        # Without the slave open here, the kernel tells by POLLHUP, and by EIO on a read, that nobody has it open.
        os.close(slave)
        os.set_blocking(master, False)
        super().__init__(f"{owner} pty", master, master)
        what = "serial port" if owner == "serial" else owner
        print(f"kvmigrate: the {what} is {self.path}", file=sys.stderr, flush=True)

    def _send(self, fd: int, data: bytes) -> int:
        # The kernel would keep some 20 KiB for a reader that may never come, and then take no more.
        poll = select.poll()
        poll.register(fd, select.POLLOUT)
        absent = any(events & select.POLLHUP for _, events in poll.poll(0))
        return len(data) if absent else super()._send(fd, data)

    def _receive(self, most: int) -> bytes:
        assert self._input_fd is not None
        try:
            return os.read(self._input_fd, most)
        except OSError as error:
            self._absent = error.errno == errno.EIO
            return b""


class StdioBackend(PollBackend):
    """``stdio``: standard input and output, each of which may be closed.

    A terminal in whose foreground the process runs is set to pass every key on at once and unechoed, and is set back
    when the backend closes or the process exits. Signal keys stay on: Ctrl-C ends the process, no key is an escape.
    """

    def __init__(self, owner: str = "serial") -> None:
        stdin = _duplicate(sys.__stdin__)
        stdout = _duplicate(sys.__stdout__)
        super().__init__(f"{owner} stdio", stdin, stdout)
        self._chunk_bytes = 1 if stdout is not None and os.isatty(stdout) else STDOUT_CHUNK_BYTES
        self._tty = stdin is not None and os.isatty(stdin)
        self._restore: Callable[[], None] | None = None
        if stdin is not None and self._tty and _in_foreground(stdin):
            self._restore = _set_raw(stdin)
            atexit.register(self._restore)

    def close(self) -> None:
        if self._restore is not None:
            self._restore()
            atexit.unregister(self._restore)
            self._restore = None
        super().close()

    def _send(self, fd: int, data: bytes) -> int:
        # The description is shared with the shell and others, so it must not be set to non-blocking.
        poll = select.poll()
        poll.register(fd, select.POLLOUT)
        return os.write(fd, data[: self._chunk_bytes]) if poll.poll(0) else 0

    def _receive(self, most: int) -> bytes:
        # Reading the terminal from the background would stop the process with SIGTTIN.
        if self._input_fd is not None and self._tty and not _in_foreground(self._input_fd):
            self._absent = True
            return b""
        return super()._receive(most)


def _duplicate(stream: TextIO | None) -> int | None:
    """A descriptor of our own for a standard stream, or None when it is closed.

    Python sets a standard stream that was closed to None; its number may belong to another file by now.
    """
    try:
        return None if stream is None else os.dup(stream.fileno())
    except (OSError, ValueError):
        return None


def _in_foreground(fd: int) -> bool:
    try:
        return os.tcgetpgrp(fd) == os.getpgrp()
    except OSError:
        return False


def _set_raw(fd: int) -> Callable[[], None]:
    """Set a terminal to pass keys on at once, unechoed and unchanged, but for those that send signals.

    Returns what sets it back.
    """
    saved = termios.tcgetattr(fd)
    mode = termios.tcgetattr(fd)
    mode[tty.IFLAG] &= ~(termios.ICRNL | termios.INLCR | termios.IGNCR | termios.IXON | termios.ISTRIP)
    mode[tty.LFLAG] &= ~(termios.ECHO | termios.ICANON | termios.IEXTEN)
    mode[tty.CC][termios.VMIN] = 1
    mode[tty.CC][termios.VTIME] = 0
    termios.tcsetattr(fd, termios.TCSANOW, mode)

    def restore() -> None:
        if _in_foreground(fd):
            termios.tcsetattr(fd, termios.TCSANOW, saved)

    return restore


def open_backend(spec: str, owner: str = "serial") -> Backend:
    """The backend that ``--serial``, or ``--console``, names: ``stdio``, ``pty``, ``null``, ``file:PATH`` or
    ``unix:PATH``; ``owner`` is what messages call the device before it.

    Raises :class:`ConfigError` for another word and :class:`HostError` when the host refuses the path.
    """
    kind, colon, path = spec.partition(":")
    if not colon and kind == "null":
        return Backend()
    if not colon and kind in ("stdio", "pty"):
        return StdioBackend(owner) if kind == "stdio" else PtyBackend(owner)
    if kind in ("file", "unix") and path and "\0" not in path:
        return FileBackend(path, owner) if kind == "file" else UnixBackend(path, owner)
    raise ConfigError(f"{spec!r} is not a {owner} backend: take stdio, pty, null, file:PATH or unix:PATH")
