"""Runs the real command in processes of their own, with a runtime directory that is the test's."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvmigrate.control.client import Client
from kvmigrate.errors import ControlError

TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Done:
    """A command that has ended."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


class Host:
    """The command on one "host": a runtime directory, below ``directory``."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.run_dir = directory / "r"
        self.run_dir.mkdir(mode=0o700)

    def _environment(self, extra: dict[str, str]) -> dict[str, str]:
        kept = {key: value for key, value in os.environ.items() if not key.startswith("KVMIGRATE_")}
        return kept | {"XDG_RUNTIME_DIR": str(self.run_dir), "COLUMNS": "120"} | extra

    def __call__(self, *arguments: str | Path, **extra: str) -> Done:
        """Run ``kvmigrate ARGUMENTS`` to its end."""
        with self.start(*arguments, **extra) as process:
            out, err = process.communicate(timeout=TIMEOUT_S)
        return Done(process.returncode, out, err)

    @contextmanager
    def start(self, *arguments: str | Path, **extra: str) -> Iterator[subprocess.Popen[str]]:
        """``kvmigrate ARGUMENTS`` as a process, killed at the end if it still lives."""
        process = subprocess.Popen(
            [sys.executable, "-m", "kvmigrate", *map(str, arguments)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=self.directory,
            env=self._environment(extra),
        )
        try:
            yield process
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
            process.wait()
            for stream in (process.stdout, process.stderr):
                if stream is not None:
                    stream.close()

    @property
    def left_behind(self) -> list[str]:
        """The files in the runtime directory."""
        directory = self.run_dir / "kvmigrate"
        return sorted(path.name for path in directory.iterdir()) if directory.exists() else []

    def socket(self, name: str) -> Path:
        return self.run_dir / "kvmigrate" / f"{name}.sock"

    def ask(self, name: str, command: str) -> Any:
        """The answer to a QMP command, without the cost of a process; None when nobody answers."""
        try:
            with Client(self.socket(name), name) as vm:
                return vm.execute(command)
        except ControlError:
            return None


def wait_until(seen: Callable[[], object], what: str) -> None:
    """Poll for ``seen``; a failure names ``what`` did not come."""
    deadline = time.monotonic() + TIMEOUT_S
    while not seen():
        assert time.monotonic() < deadline, f"{what} did not come"
        time.sleep(0.02)
