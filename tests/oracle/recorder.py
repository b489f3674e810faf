"""Serial ports of several guests on UNIX sockets, each chunk recorded with the host's time of arrival."""

from __future__ import annotations

import selectors
import socket
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

POLL_S = 0.1


@dataclass
class SerialLog:
    """What one process wrote to its guest's serial port: chunks with their monotonic time in seconds."""

    side: str
    chunks: list[tuple[float, bytes]] = field(default_factory=list)
    connection: socket.socket | None = None
    arrival: threading.Condition = field(default_factory=threading.Condition, repr=False, compare=False)

    def append(self, data: bytes) -> None:
        """Record what has come just now, and wake those who wait for it."""
        with self.arrival:
            self.chunks.append((time.monotonic(), data))
            self.arrival.notify_all()

    @property
    def data(self) -> bytes:
        return b"".join(chunk for _, chunk in self.chunks)

    @property
    def text(self) -> str:
        return self.data.decode("ascii", "replace")

    @property
    def first_s(self) -> float:
        return self.chunks[0][0]

    @property
    def last_s(self) -> float:
        return self.chunks[-1][0]

    def send(self, text: str) -> None:
        """Type ``text`` on the guest's serial port."""
        assert self.connection is not None, f"{self.side} has not connected its serial port"
        self.connection.sendall(text.encode())

    def wait_for(self, text: str, timeout_s: float = 60.0) -> None:
        """Return once ``text`` has been received. Raises :class:`AssertionError` after ``timeout_s``."""
        with self.arrival:
            come = self.arrival.wait_for(lambda: text in self.text, timeout_s)
        assert come, f"{self.side} never wrote {text!r}; it wrote {self.text[-300:]!r}"

    def wait_bytes(self, count: int, timeout_s: float = 60.0) -> None:
        """Return once ``count`` more bytes have come."""
        wanted = len(self.data) + count
        with self.arrival:
            come = self.arrival.wait_for(lambda: len(self.data) >= wanted, timeout_s)
        assert come, f"{self.side} is silent; it wrote {self.text[-300:]!r}"


class Recorder:
    """Listens on one socket per side, all read by one thread, so that times compare. A context manager."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._selector = selectors.DefaultSelector()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._read, name="recorder", daemon=True)
        self.logs: list[SerialLog] = []

    def __enter__(self) -> Recorder:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopping.set()
        self._thread.join()
        for key in list(self._selector.get_map().values()):
            assert isinstance(key.fileobj, socket.socket)
            key.fileobj.close()
        self._selector.close()

    def listen(self, side: str) -> tuple[SerialLog, str]:
        """A new log, and the value of ``--serial`` that fills it."""
        path = self._directory / f"{len(self.logs)}.tty"
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(str(path))
        listener.listen(1)
        log = SerialLog(side)
        self.logs.append(log)
        self._selector.register(listener, selectors.EVENT_READ, (log, True))
        return log, f"unix:{path}"

    def _read(self) -> None:
        while not self._stopping.is_set():
            for key, _ in self._selector.select(POLL_S):
                log, is_listener = key.data
                assert isinstance(key.fileobj, socket.socket)
                if is_listener:
                    self._accept(key.fileobj, log)
                else:
                    self._receive(key.fileobj, log)

    def _accept(self, listener: socket.socket, log: SerialLog) -> None:
        connection, _ = listener.accept()
        log.connection = connection
        self._selector.unregister(listener)
        listener.close()
        self._selector.register(connection, selectors.EVENT_READ, (log, False))

    def _receive(self, connection: socket.socket, log: SerialLog) -> None:
        try:
            data = connection.recv(1 << 16)
        except OSError:
            data = b""
        if data:
            log.append(data)
        else:
            self._selector.unregister(connection)
            connection.close()
