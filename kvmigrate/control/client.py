"""A blocking QMP client for the command line and for scripts: one VM, one command after the other."""

from __future__ import annotations

import json
import socket
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from ..errors import ControlError
from . import runtime

REPLY_TIMEOUT_S = 30.0


class Client:
    """A negotiated connection to a VM's control socket; use it as a context manager."""

    def __init__(self, path: Path, name: str) -> None:
        """Connect to ``path``; ``name`` is for messages. Raises :class:`ControlError`."""
        self._name = name
        self._events: deque[Mapping[str, Any]] = deque()
        self._received = bytearray()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(REPLY_TIMEOUT_S)
        try:
            self._socket.connect(str(path))
            self.greeting = self._receive()
            self.execute("qmp_capabilities")
        except OSError as error:
            self._socket.close()
            raise ControlError(f"cannot talk to VM {name} at {path}: {error.strerror or error}") from None
        except BaseException:
            self._socket.close()
            raise

    @classmethod
    def of(cls, name: str) -> Client:
        """Connect to the running VM ``name``. Raises :class:`ControlError` when there is none."""
        return cls(runtime.socket_path(name), name)

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._socket.close()

    def execute(self, command: str, arguments: Mapping[str, Any] | None = None) -> Any:
        """The answer to ``command``. Raises :class:`ControlError` with QMP's class when the VM refuses or is gone."""
        message: dict[str, Any] = {"execute": command}
        if arguments:
            message["arguments"] = dict(arguments)
        try:
            self._socket.sendall(json.dumps(message).encode() + b"\n")
        except OSError as error:
            raise ControlError(f"VM {self._name} hung up: {error.strerror or error}") from None
        while True:
            try:
                reply = self._receive()
            except TimeoutError:
                raise ControlError(f"VM {self._name} did not answer {command} in {REPLY_TIMEOUT_S:.0f} s") from None
            if "event" in reply:
                self._events.append(reply)
            elif "error" in reply:
                raise ControlError(str(reply["error"]["desc"]), str(reply["error"]["class"]))
            else:
                return reply["return"]

    def take_events(self) -> list[Mapping[str, Any]]:
        """The events that have come so far, oldest first; each is given once."""
        self._gather(0.0)
        taken = list(self._events)
        self._events.clear()
        return taken

    def wait_event(self, timeout_s: float) -> Mapping[str, Any] | None:
        """The next event; None after ``timeout_s`` without one. Raises :class:`ControlError` when the VM is gone."""
        deadline = time.monotonic() + timeout_s
        while not self._events:
            left = deadline - time.monotonic()
            if left <= 0:
                return None
            self._gather(left)
        return self._events.popleft()

    def wait_closed(self, timeout_s: float) -> bool:
        """Whether the VM hangs up within ``timeout_s``, as it does when it ends."""
        deadline = time.monotonic() + timeout_s
        try:
            while (left := deadline - time.monotonic()) > 0:
                self._gather(left)
                self._events.clear()
        except ControlError:
            return True
        return False

    def _gather(self, timeout_s: float) -> None:
        """Take in events for up to ``timeout_s``, returning at the first."""
        self._socket.settimeout(max(timeout_s, 1e-6))
        try:
            self._events.append(self._receive())
        except TimeoutError:
            pass
        finally:
            self._socket.settimeout(REPLY_TIMEOUT_S)

    def _receive(self) -> Mapping[str, Any]:
        while (end := self._received.find(b"\n")) < 0:
            try:
                data = self._socket.recv(1 << 16)
            except ConnectionError as error:
                raise ControlError(f"VM {self._name} hung up: {error.strerror or error}") from None
            if not data:
                raise ControlError(f"VM {self._name} hung up")
            self._received += data
        line = bytes(self._received[:end])
        del self._received[: end + 1]
        message: Mapping[str, Any] = json.loads(line)
        return message
