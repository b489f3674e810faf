"""What the bench needs of a VM process, whoever's it is."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .observer import Heartbeats
from .qmp import Qmp, QmpError

KIB = 1 << 10
RESET_PEAK = "5"
"""Written to /proc/PID/clear_refs it makes the peak resident size what the resident size is now (proc(5))."""


@dataclass(frozen=True)
class Guest:
    """The guest that all systems run."""

    image: Path
    memory_mib: int
    cmdline: str = ""
    data_mib: int = 0
    """How much of its memory it has written."""


class Vm:
    """A process that runs one guest: its heartbeats, its monitor, its memory.

    ``prefix`` goes before the command: what puts the process into a network namespace.
    """

    qmp: Qmp

    def __init__(self, directory: Path, guest: Guest, prefix: Sequence[str] = ()) -> None:
        self.directory = directory
        self.guest = guest
        self.prefix = list(prefix)
        directory.mkdir(parents=True)
        self.heartbeats = Heartbeats(directory / "serial")
        self._process: subprocess.Popen[bytes] | None = None

    def spawn(self, command: list[str], env: dict[str, str] | None = None) -> None:
        """Start the process; what it says goes into a file beside its sockets."""
        with (self.directory / "log").open("wb") as log:
            self._process = subprocess.Popen(
                [*self.prefix, *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **(env or {})},
            )

    def resident_guest_kib(self) -> int:
        """How much of guest RAM is resident: the sum of the mappings that are too large to be anything else."""
        at_least = min(self.guest.memory_mib * KIB // 2, KIB * KIB // 2)
        total = size = 0
        for line in Path(f"/proc/{self.pid}/smaps").read_text().splitlines():
            if match := re.match(r"(Size|Rss): +(\d+) kB", line):
                if match[1] == "Size":
                    size = int(match[2])
                elif size >= at_least:
                    total += int(match[2])
        return total

    def reset_peak(self) -> None:
        """Forget how large the process has been."""
        Path(f"/proc/{self.pid}/clear_refs").write_text(RESET_PEAK)

    def peak_beyond_guest_mib(self, guest_kib: int) -> float:
        """The largest resident size since :meth:`reset_peak`, less ``guest_kib``; 0 of a process that is gone."""
        try:
            status = Path(f"/proc/{self.pid}/status").read_text()
        except OSError:
            return 0.0
        match = re.search(r"VmHWM:\s+(\d+) kB", status)
        return (int(match[1]) - guest_kib) / KIB if match else 0.0

    def run_on(self) -> None:
        """Let the paused guest run, until it is heard."""
        heard = self.heartbeats.last_ns
        self.qmp.execute("cont")
        self.heartbeats.wait_after(heard or 0, 5.0)

    def hold(self) -> None:
        """Pause the guest, so that it is in nobody's way while another one is measured."""
        self.qmp.execute("stop")

    @property
    def pid(self) -> int:
        """The process, which was started."""
        assert self._process is not None
        return self._process.pid

    def close(self) -> None:
        """End the process and what belongs to it. Idempotent."""
        if self._process is not None and self._process.poll() is None:
            try:
                self.qmp.execute("quit")
                self.qmp.close()
                self._process.wait(10)
            except (AttributeError, OSError, QmpError, subprocess.TimeoutExpired):
                self._process.kill()
                self._process.wait()
        if hasattr(self, "qmp"):
            self.qmp.close()
        self.heartbeats.close()
