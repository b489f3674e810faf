"""A process that restores a snapshot again and again by the Python interface: ``python -m tests.bench.embedded DIR``.

It reads the path of a serial port's socket from each line on stdin, restores, says at which time it began (monotonic,
ns), and ends the guest with the next line.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from kvmigrate import api

from .observer import Heartbeats

READY_S = 30.0


class Embedded:
    """That process, from outside."""

    def __init__(self, snapshot: Path, directory: Path) -> None:
        self._directory = directory
        command = [sys.executable, "-m", "tests.bench.embedded", str(snapshot)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._count = 0

    def _tell(self, line: str) -> str:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        if answer := self._process.stdout.readline():
            return answer
        raise RuntimeError(f"the process that restores ended with {self._process.wait()}")

    def restore_ms(self) -> float:
        """From the call of :func:`kvmigrate.api.restore` to the guest's first heartbeat, in milliseconds."""
        self._count += 1
        heartbeats = Heartbeats(self._directory / f"serial{self._count}")
        try:
            began = int(self._tell(str(heartbeats.path)))
            first = heartbeats.wait_first(READY_S)
            self._tell("")
            heartbeats.check()
            return (first - began) / 1e6
        finally:
            heartbeats.close()

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(READY_S)


def main(snapshot: Path) -> None:
    """Restore once for each line."""
    api.rehearse()
    while path := sys.stdin.readline().strip():
        began = time.monotonic_ns()
        machine = api.restore(snapshot, name="embedded", serial=f"unix:{path}", clone=True).machine
        machine.start()
        machine.resume()
        print(began, flush=True)
        sys.stdin.readline()
        memory_bytes = machine.memory.size_bytes
        machine.close()
        # What can be done for the next guest is done while there is time, as in a program that embeds guests.
        api.rehearse(memory_bytes)
        print("closed", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
