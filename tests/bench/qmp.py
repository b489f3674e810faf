"""A blocking QMP client, just large enough to drive QEMU and kvmigrate alike."""

from __future__ import annotations

import json
import socket
import time
from pathlib import Path
from typing import Any

ANSWER_S = 20.0


class QmpError(RuntimeError):
    """The VM answered with an error, or not at all."""


class Qmp:
    """One connection to a VM's monitor, past the greeting."""

    def __init__(self, path: Path, timeout_s: float = ANSWER_S) -> None:
        self._socket = _connect(path, timeout_s)
        self._reader = self._socket.makefile("rb")
        self.events: list[dict[str, Any]] = []
        if "QMP" not in self._read():
            raise QmpError(f"{path} does not greet like QMP")
        self.execute("qmp_capabilities")

    def _read(self) -> dict[str, Any]:
        line = self._reader.readline()
        if not line:
            raise QmpError("the monitor closed the connection")
        value = json.loads(line)
        if not isinstance(value, dict):
            raise QmpError(f"not a QMP message: {line!r}")
        return value

    def execute(self, command: str, /, *, send_fd: int | None = None, **arguments: Any) -> Any:
        """Run one command and return its answer; events that come meanwhile are kept."""
        named = {name.replace("_", "-"): value for name, value in arguments.items()}
        line = json.dumps({"execute": command, "arguments": named}).encode() + b"\n"
        if send_fd is None:
            self._socket.sendall(line)
        else:
            socket.send_fds(self._socket, [line], [send_fd])
        while "return" not in (answer := self._read()):
            if "error" in answer:
                raise QmpError(f"{command}: {answer['error'].get('desc', answer['error'])}")
            self.events.append(answer)
        return answer["return"]

    def wait_completed(self, event_name: str = "MIGRATION", timeout_s: float = 120.0) -> list[int]:
        """Wait for the event that says completed; returns when each pass began, on this process's monotonic clock.

        Raises QmpError when the event says failed, TimeoutError when it does not come in time.
        """
        passes = []
        deadline = time.monotonic() + timeout_s
        while True:
            self._socket.settimeout(max(0.001, deadline - time.monotonic()))
            event = self.events.pop(0) if self.events else self._read()
            if event.get("event") == "MIGRATION_PASS":
                passes.append(time.monotonic_ns())
            status = event.get("data", {}).get("status") if event.get("event") == event_name else None
            if status == "completed":
                self._socket.settimeout(ANSWER_S)
                return passes
            if status in ("failed", "cancelled"):
                raise QmpError(f"the job ended as {status}: {self.execute('query-migrate').get('error-desc', '')}")

    def close(self) -> None:
        self._reader.close()
        self._socket.close()


def _connect(path: Path, timeout_s: float) -> socket.socket:
    deadline = time.monotonic() + timeout_s
    while True:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.settimeout(timeout_s)
        try:
            connection.connect(str(path))
            return connection
        except OSError:
            connection.close()
            if time.monotonic() > deadline:
                raise QmpError(f"nobody answers at {path}") from None
            time.sleep(0.002)
