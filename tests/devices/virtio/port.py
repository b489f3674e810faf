"""A console between a driver and a back-end over two pipes of one page each, so that little is on its way."""

from __future__ import annotations

import fcntl
import os
import select
import termios
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from kvmigrate.devices.backends import PollBackend
from kvmigrate.devices.virtio.console import RX, TX, Console
from kvmigrate.memory.region import GuestMemory
from kvmigrate.state.section import Value

from .queues import WRITE, QueuesDriver

PIPE_BYTES = 4096
RX_BYTES, TX_BYTES = 4096, 65536


class Pipes:
    """The user's end of a console: what is typed, and what is read."""

    def __init__(self) -> None:
        self.typed, self._type = os.pipe()
        self._read, self.shown = os.pipe()
        for fd in (self.typed, self._type, self._read, self.shown):
            os.set_blocking(fd, False)
        for fd in (self._type, self.shown):
            fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, PIPE_BYTES)

    def backend(self) -> PollBackend:
        """A back-end before these pipes; there may be one after the other."""
        return PollBackend("console pipe", os.dup(self.typed), os.dup(self.shown))

    def type(self, data: bytes) -> int:
        """How many bytes the pipe took."""
        with suppress(BlockingIOError):
            return os.write(self._type, data)
        return 0

    def nr_waiting(self) -> int:
        """Bytes that are there to be read."""
        return int.from_bytes(fcntl.ioctl(self._read, termios.FIONREAD, bytes(4)), "little")

    def show(self, most: int = 1 << 16, timeout_s: float = 0) -> bytes:
        """What is there to be read, or comes in that time."""
        return os.read(self._read, most) if select.select([self._read], [], [], timeout_s)[0] else b""

    def show_all(self, size: int) -> bytes:
        """The next ``size`` bytes."""
        data = b""
        while len(data) < size:
            more = self.show(size - len(data), 10)
            assert more, f"{len(data)} of {size} bytes came"
            data += more
        return data

    def close(self) -> None:
        for fd in (self.typed, self._type, self._read, self.shown):
            os.close(fd)


class Port(QueuesDriver):
    """Drives ``console``."""

    def __init__(self, memory: GuestMemory, console: Console) -> None:
        self.console = console
        super().__init__(memory, console, 0)

    def move_to(self, console: Console) -> dict[str, Value]:
        """The same driver goes on before ``console``, which gets what this one saved; this one is closed."""
        self.console.pause()
        state = self.console.save()
        console.load(state)
        self.console.close()
        self.console = self.device = console
        console.resume()
        return state

    def held(self, at: int) -> int:
        """Bytes in one of the console's buffers."""
        return len(self.console.own_state()["rx" if at == RX else "tx"])

    def send(self, *pieces: bytes) -> None:
        """One request of output in so many buffers."""
        places = [self.buffer(len(piece)) for piece in pieces]
        for gpa, piece in zip(places, pieces, strict=True):
            self.memory.write(gpa, piece)
        self.rings[TX].put(*((gpa, len(piece), 0) for gpa, piece in zip(places, pieces, strict=True)))
        self.kick(TX)

    def offer(self, *sizes: int) -> list[int]:
        """Buffers for input, one request each; where they are."""
        found = [self.buffer(size) for size in sizes]
        for gpa, size in zip(found, sizes, strict=True):
            self.rings[RX].put((gpa, size, WRITE))
        self.kick(RX)
        return found


@contextmanager
def console_at(memory: GuestMemory, pipes: Pipes, stall_ms: int = 10_000) -> Iterator[Port]:
    """A console whose driver is there."""
    port = Port(memory, Console("console0", memory, pipes.backend(), stall_ms))
    try:
        port.set_up()
        yield port
    finally:
        port.console.close()
