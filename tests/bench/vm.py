"""What the bench needs of a VM process, whoever's it is."""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from .observer import Heartbeats
from .qmp import Qmp, QmpError

KIB = 1 << 10


@dataclass(frozen=True)
class Guest:
    """The guest that both run."""

    image: Path
    memory_mib: int
    cmdline: str = ""


class Vm:
    """A process that runs one guest: its heartbeats, its monitor, its memory."""

    heartbeats: Heartbeats
    qmp: Qmp

    def __init__(self, directory: Path, guest: Guest) -> None:
        self.directory = directory
        self.guest = guest
        directory.mkdir(parents=True)
        self._process: subprocess.Popen[bytes] | None = None
        self._peak_kib = 0

    def spawn(self, command: list[str], env: dict[str, str] | None = None) -> None:
        """Start the process; what it says goes into a file beside its sockets."""
        with (self.directory / "log").open("wb") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env={**os.environ, **(env or {})}
            )

    def resident_guest_kib(self) -> int:
        """How much of guest RAM is resident: the sum of the mappings that are too large to be anything else."""
        at_least = self.guest.memory_mib * KIB // 2
        total = size = 0
        for line in Path(f"/proc/{self._pid}/smaps").read_text().splitlines():
            if match := re.match(r"(Size|Rss): +(\d+) kB", line):
                if match[1] == "Size":
                    size = int(match[2])
                elif size >= at_least:
                    total += int(match[2])
        return total

    def peak_kib(self) -> int:
        """The largest resident size that the process has had, as far as it can still be read."""
        try:
            status = Path(f"/proc/{self._pid}/status").read_text()
        except OSError:
            return self._peak_kib
        if match := re.search(r"VmHWM:\s+(\d+) kB", status):
            self._peak_kib = int(match[1])
        return self._peak_kib

    @property
    def _pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def close(self) -> None:
        """End the process and what belongs to it. Idempotent."""
        if self._process is not None and self._process.poll() is None:
            try:
                self.qmp.execute("quit")
                self._process.wait(10)
            except (AttributeError, OSError, QmpError, subprocess.TimeoutExpired):
                self._process.kill()
                self._process.wait()
        if hasattr(self, "qmp"):
            self.qmp.close()
        self.heartbeats.close()
