"""A UART wired to a real UNIX socket, with the levels of its interrupt line on record."""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from kvmigrate.devices.backends import Backend, UnixBackend
from kvmigrate.devices.serial import Serial

WAIT_S = 60.0


def wait_until(condition: Callable[[], bool], what: str) -> None:
    """Wait for what another thread is about to do; fails after a time that no slow machine needs."""
    end = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end, f"never: {what}"
        time.sleep(0.001)


@dataclass
class Line:
    """One UART, the other end of its line, and what its interrupt did."""

    uart: Serial
    backend: Backend
    peer: socket.socket
    levels: list[bool] = field(default_factory=list)

    @property
    def level(self) -> bool:
        return bool(self.levels) and self.levels[-1]

    def received(self, size: int) -> bytes:
        """The next ``size`` bytes that the guest sent."""
        data = b""
        while len(data) < size:
            data += self.peer.recv(size - len(data))
        return data

    def nothing_more(self) -> bool:
        """Whether no byte is there to be received now."""
        return not self.there_already()

    def there_already(self) -> bytes:
        """What the guest sent and has arrived by now."""
        readable, _, _ = select.select([self.peer], [], [], 0)
        return self.peer.recv(1 << 16) if readable else b""

    def send(self, data: bytes) -> None:
        """Send to the guest, and wait until the UART has as much of it as it can take."""
        room = 16 if self.uart.read(2, 1) & 0xC0 else 1
        self.peer.sendall(data)
        wait_until(lambda: len(self.uart.save()["rx"]) == min(len(data), room), "the UART takes input")

    def stuff(self) -> bytes:
        """Write, as a guest that looks at LSR does, until the line takes no more; returns what was written."""
        written = bytearray()
        while self.uart.read(5, 1) & 0x20:
            self.uart.write(0, 1, len(written) & 0xFF)
            written.append(len(written) & 0xFF)
        return bytes(written)


@pytest.fixture
def new_line(tmp_path: Path) -> Iterator[Callable[[], Line]]:
    """Makes running UARTs, each on a socket of its own."""
    lines: list[Line] = []
    path = str(tmp_path / "serial")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen()

    def make() -> Line:
        backend = UnixBackend(path)
        peer, _ = listener.accept()
        peer.settimeout(WAIT_S)
        levels: list[bool] = []
        line = Line(Serial(levels.append, backend), backend, peer, levels)
        line.uart.resume()
        levels.clear()
        lines.append(line)
        return line

    yield make
    for line in lines:
        line.peer.close()
        line.backend.close()
    listener.close()


@pytest.fixture
def line(new_line: Callable[[], Line]) -> Line:
    return new_line()
