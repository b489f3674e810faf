"""What goes over a console socket: the guest's input as plain bytes one way, frames the other.

A frame is its kind (one byte), the length of its body (four bytes, big-endian) and the body. Whoever connects is told
HELLO or REFUSED first; END is the last word.
"""

from __future__ import annotations

import fcntl
import json
import select
import socket
import struct
import termios
from collections.abc import Iterator, Mapping
from enum import IntEnum
from typing import Any

from ..errors import BadField, TooLarge, UnexpectedFrame
from .scrollback import Scrollback

MAX_BODY_BYTES = 1 << 16
CHUNK_BYTES = 1 << 13
_HEADER = struct.Struct(">BI")
_INT = struct.Struct("i")


class Kind(IntEnum):
    """What a frame says; the body of each is JSON but that of OUTPUT."""

    HELLO = 1
    """``{"name": …, "others": n}``: so many are attached besides."""
    REFUSED = 2
    """``{"text": …}``"""
    OUTPUT = 3
    """Bytes that the guest sent."""
    SKIPPED = 4
    """``{"bytes": n}``: so many went by while this client did not read."""
    TAKEN = 5
    """``{}``: the guest has taken all input, and the client had ended it."""
    END = 6
    """``{"status": n, "text": …, "undelivered": n}``: the exit status of the VM's process, what became of the guest,
    and how much of this client's input did not get to it."""


def frame(kind: Kind, body: bytes | Mapping[str, Any]) -> bytes:
    """A frame as bytes."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return _HEADER.pack(kind, len(data)) + data


class Frames:
    """Cuts what a VM says into frames."""

    def __init__(self) -> None:
        self._pending = bytearray()

    def feed(self, data: bytes) -> Iterator[tuple[Kind, Any]]:
        """Every frame that ``data`` completes: its kind, and its bytes or JSON. Raises a :class:`StreamError`."""
        self._pending += data
        while len(self._pending) >= _HEADER.size:
            number, length = _HEADER.unpack_from(self._pending)
            if length > MAX_BODY_BYTES:
                raise TooLarge(f"the console sent a frame of {length} bytes: at most {MAX_BODY_BYTES} can be")
            end = _HEADER.size + length
            if len(self._pending) < end:
                return
            body = bytes(self._pending[_HEADER.size : end])
            del self._pending[:end]
            yield _decoded(number, body)


def _decoded(number: int, body: bytes) -> tuple[Kind, Any]:
    if number not in Kind.__members__.values():
        raise UnexpectedFrame(f"the console sent a frame of kind {number}: is the VM's kvmigrate newer than this one?")
    if number == Kind.OUTPUT:
        return Kind.OUTPUT, body
    try:
        value = json.loads(body)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise BadField(f"the console sent a frame of kind {number} that is no JSON object")
    return Kind(number), value


class Attached:
    """One client of a console, as the VM sees it. No call waits: what does not go out now stays for the next."""

    def __init__(self, connection: socket.socket, scrollback: Scrollback) -> None:
        connection.setblocking(False)
        self._socket = connection
        self._scrollback = scrollback
        self._place = scrollback.replay
        self._unsent = b""
        self.listens = True
        """Whether it still reads; false once a send failed."""
        self.types = True
        """Whether more input may come; false once it has ended."""
        self.was_told = False
        """Whether END is on its way to it."""

    def fileno(self) -> int:
        return self._socket.fileno()

    def say(self, kind: Kind, body: Mapping[str, Any]) -> None:
        """Add a frame to what goes out."""
        self._unsent += frame(kind, body)

    @property
    def is_behind(self) -> bool:
        """Whether there is something to send it."""
        return self.listens and (bool(self._unsent) or self._place < self._scrollback.end)

    def send(self) -> None:
        """Send what it takes of the next chunk."""
        if not self._unsent:
            lost, data = self._scrollback.read(self._place, CHUNK_BYTES)
            self._place += lost + len(data)
            self._unsent = (frame(Kind.SKIPPED, {"bytes": lost}) if lost else b"") + frame(Kind.OUTPUT, data)
        try:
            self._unsent = self._unsent[self._socket.send(self._unsent, socket.MSG_NOSIGNAL) :]
        except (BlockingIOError, InterruptedError):
            pass
        except OSError:
            self.listens = False

    def receive(self, most: int) -> bytes:
        """At most ``most`` bytes of its input that are there; none, too, at the end of it, which is answered TAKEN."""
        try:
            data = self._socket.recv(most)
        except (BlockingIOError, InterruptedError):
            return b""
        except OSError:
            data = b""
        if not data:
            self.types = False
            self.say(Kind.TAKEN, {})
        return data

    def undelivered(self) -> int:
        """How many bytes of its input lie here (unix(7), SIOCINQ)."""
        found: int = _INT.unpack(fcntl.ioctl(self._socket, termios.FIONREAD, bytes(_INT.size)))[0]
        return found

    def has_left(self) -> bool:
        """Whether the client hung up, though its last input may still lie here."""
        poll = select.poll()
        poll.register(self._socket, 0)
        return bool(poll.poll(0))

    def close(self) -> None:
        self._socket.close()
