"""QMP, the protocol of QEMU's monitor, as bytes and values: no sockets and no commands in here.

Sources: QEMU's docs/interop/qmp-spec.rst (message forms, negotiation, error classes) and qapi/error.json. As with QEMU,
JSON texts need nothing between them, may use 'single quotes', and a control character or 0xFF resets the parser.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

from ..record import dataclass

MAX_MESSAGE_BYTES = 1 << 20
MAX_DEPTH = 64
COMPATIBLE_QEMU = {"major": 7, "minor": 2, "micro": 0}
"""The QEMU whose names and fields are followed; clients read it from the greeting."""

_CONTROL = re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1f\xff]")
_STRUCTURE = re.compile(rb"[\"'{}\[\]\\\n]|" + _CONTROL.pattern)
_QUOTED = re.compile(r"'((?:[^'\\]|\\.)*)'|(\"(?:[^\"\\]|\\.)*\")", re.DOTALL)
_BLANK = b" \t\r\n"
_NO_ID = object()


class QmpError(Exception):
    """An error reply: QEMU's ``error_class`` (GenericError, CommandNotFound, DeviceNotActive …) and a text."""

    def __init__(self, text: str, error_class: str = "GenericError", request_id: object = _NO_ID) -> None:
        self.error_class = error_class
        self.request_id = request_id
        super().__init__(" ".join(text.split()))


@dataclass(frozen=True, slots=True)
class Request:
    """One command as it came; ``reply`` echoes its id when it had one."""

    command: str
    arguments: Mapping[str, Any]
    request_id: object = _NO_ID

    def reply(self, value: object) -> dict[str, object]:
        return _with_id({"return": value}, self.request_id)


def _with_id(message: dict[str, object], request_id: object) -> dict[str, object]:
    return message if request_id is _NO_ID else {**message, "id": request_id}


def error_reply(error: QmpError, request: Request | None = None) -> dict[str, object]:
    """The reply that says ``error``, with the id of the request it answers where that is known."""
    body: dict[str, object] = {"error": {"class": error.error_class, "desc": str(error)}}
    return _with_id(body, request.request_id if request else error.request_id)


def greeting(package: str) -> dict[str, object]:
    """What a server says first. ``package`` is the program's own name and version."""
    version: dict[str, object] = {"qemu": COMPATIBLE_QEMU, "package": package}
    return {"QMP": {"version": version, "capabilities": []}}


def event(name: str, data: Mapping[str, object] | None = None, time_ns: int = 0) -> dict[str, object]:
    """An event of ``time_ns`` since 1970, 0 being now; ``data`` is left out when there is none."""
    seconds, nanoseconds = divmod(time_ns or time.time_ns(), 1_000_000_000)
    stamp = {"seconds": seconds, "microseconds": nanoseconds // 1000}
    message: dict[str, object] = {"timestamp": stamp, "event": name}
    return {**message, "data": dict(data)} if data else message


def encode(message: Mapping[str, object]) -> bytes:
    """A message as the bytes that go on the wire: ASCII, ended by CRLF."""
    return json.dumps(message).encode("ascii") + b"\r\n"


def decode_request(text: bytes) -> Request:
    """A hostile JSON text as a request. Raises :class:`QmpError`, with the id where it could be read."""
    value = _load(text)
    if not isinstance(value, dict):
        raise QmpError("QMP input must be a JSON object")
    request_id = value.pop("id", _NO_ID)
    command, arguments = value.pop("execute", None), value.pop("arguments", {})
    if value:
        raise QmpError(f"QMP input member '{next(iter(value))}' is unexpected", request_id=request_id)
    if not isinstance(command, str):
        raise QmpError("QMP input member 'execute' must be there and be a string", request_id=request_id)
    if not isinstance(arguments, dict):
        raise QmpError("QMP input member 'arguments' must be an object", request_id=request_id)
    return Request(command, arguments, request_id)


def _load(text: bytes) -> Any:
    try:
        source = text.decode("utf-8")
        if "'" in source:
            source = _QUOTED.sub(_requote, source)
        return json.loads(source, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise QmpError(f"JSON parse error, {error}") from None


def _requote(match: re.Match[str]) -> str:
    if match[1] is None:
        return match[2]
    inner = match[1].replace("\\'", "'")
    return '"' + re.sub(r'(\\.)|"', lambda found: found[1] or '\\"', inner, flags=re.DOTALL) + '"'


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


class Splitter:
    """Cuts a stream of bytes into the JSON texts that it holds, within bounds of size and of depth."""

    def __init__(self) -> None:
        self._pending = bytearray()
        self._reset()

    def _reset(self) -> None:
        self._scanned = 0
        self._depth = 0
        self._quote = 0
        self._skipping = False

    def feed(self, data: bytes) -> Iterator[bytes | QmpError]:
        """Every JSON text that ``data`` completes, and an error in the place of whatever cannot become one."""
        self._pending += data
        while self._pending:
            found = self._skip() if self._skipping else self._next()
            if found is None:
                return
            if found:
                yield found

    def _skip(self) -> bytes | None:
        """Drop everything up to the next newline, where a new message can be told from the remains of a bad one."""
        at = self._pending.find(b"\n")
        del self._pending[: at + 1 if at >= 0 else len(self._pending)]
        self._skipping = at < 0
        return b""

    def _next(self) -> bytes | QmpError | None:
        if not self._depth:
            blank = len(self._pending) - len(self._pending.lstrip(_BLANK))
            del self._pending[:blank]
            if self._pending and self._pending[0] not in b"{[" and not _CONTROL.match(self._pending):
                return self._refuse("JSON parse error, expecting an object")
        while match := _STRUCTURE.search(self._pending, self._scanned):
            self._scanned = match.end()
            ended = self._step(match[0], self._scanned)
            if ended is not None:
                return ended
        return self._wait()

    def _wait(self) -> QmpError | None:
        """All that is here was looked at, and the message has not ended: more must come, within the limit."""
        if len(self._pending) > MAX_MESSAGE_BYTES:
            return self._refuse(f"JSON message is longer than {MAX_MESSAGE_BYTES} bytes")
        self._scanned = max(self._scanned, len(self._pending))
        return None

    def _step(self, mark: bytes, end: int) -> bytes | QmpError | None:
        """Follow the structure over one ``mark``; a whole text or an error when it ends the message."""
        if _CONTROL.match(mark) or (mark == b"\n" and self._quote):
            return self._lexical_error(end)
        if mark == b"\n":
            return None
        if mark == b"\\":
            self._scanned = end + 1 if self._quote else end
        elif self._quote:
            self._quote = 0 if mark[0] == self._quote else self._quote
        elif mark in b"\"'":
            self._quote = mark[0]
        else:
            self._depth += 1 if mark in b"{[" else -1
            if self._depth > MAX_DEPTH:
                return self._refuse(f"JSON nesting is deeper than {MAX_DEPTH}")
            if not self._depth:
                return self._take(end)
        return None

    def _take(self, end: int) -> bytes:
        text = bytes(self._pending[:end])
        del self._pending[:end]
        self._reset()
        return text

    def _lexical_error(self, end: int) -> QmpError:
        self._take(end)
        return QmpError("JSON parse error, stray control character")

    def _refuse(self, why: str) -> QmpError:
        """Give up on the message under way. The rest of its line can hold nothing that makes sense."""
        self._reset()
        self._skipping = True
        return QmpError(why)
