"""Sees from outside when a guest is alive: its serial port is a UNIX socket that the bench listens on."""

from __future__ import annotations

import os
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path


class GuestDamaged(RuntimeError):
    """The guest found that its memory or state is not what it wrote."""


def watch_at_once() -> None:
    """Let the calling thread run as soon as it is woken, if it may: beside a guest that keeps its processor busy it
    would wait for up to a scheduler's tick, of 4 ms, and take that for the guest's silence (seen in traces)."""
    with suppress(PermissionError):
        os.sched_setscheduler(threading.get_native_id(), os.SCHED_FIFO, os.sched_param(1))


class Heartbeats:
    """When the bytes of one VM's serial port arrived, on this process's monotonic clock, in nanoseconds.

    The VM connects to ``path``. One thread reads; it keeps the first and the last time, the longest silence since
    whoever set it to 0, and a line with which the guest says that it is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.first_ns: int | None = None
        self.last_ns: int | None = None
        self.longest_silence_ns = 0
        self.complaint = ""
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(path))
        self._listener.listen(1)
        self._connection: socket.socket | None = None
        self._alive = threading.Event()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        watch_at_once()
        try:
            self._connection, _ = self._listener.accept()
            while data := self._connection.recv(65536):
                now = time.monotonic_ns()
                self.longest_silence_ns = max(self.longest_silence_ns, now - (self.last_ns or now))
                self.last_ns = now
                if self.first_ns is None:
                    self.first_ns = now
                    self._alive.set()
                if self.complaint or b"B" in data:
                    self.complaint += data.decode(errors="replace")
        except OSError:
            pass

    def wait_first(self, timeout_s: float) -> int:
        """The time of the first byte. Raises TimeoutError."""
        if not self._alive.wait(timeout_s):
            raise TimeoutError(f"no heartbeat on {self.path} within {timeout_s} s")
        assert self.first_ns is not None
        return self.first_ns

    def wait_after(self, when_ns: int, timeout_s: float) -> None:
        """Wait for a byte that came later than ``when_ns``. Raises TimeoutError."""
        deadline = time.monotonic() + timeout_s
        while (self.last_ns or 0) <= when_ns:
            if time.monotonic() > deadline:
                raise TimeoutError(f"no more heartbeats on {self.path} within {timeout_s} s")
            time.sleep(0.002)

    def check(self) -> None:
        """Raise GuestDamaged when the guest has complained."""
        if self.complaint:
            raise GuestDamaged(f"the guest says {self.complaint.splitlines()[0]}")

    def close(self) -> None:
        """Stop listening; the VM's writes fail from now on."""
        for one in (self._connection, self._listener):
            if one is not None:
                try:
                    one.shutdown(socket.SHUT_RDWR)
                except OSError:
                    pass
                one.close()
