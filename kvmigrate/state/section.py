"""A section: the saved state of one part of the machine, as a versioned msgpack value.

Encoded as the msgpack map ``{"name": str, "version": int, "body": map}``. The body holds only None, bool, int, float,
str, bytes, lists and maps with str keys, under the kernel's own field names, so that a person can read a dump.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

import msgpack

from ..errors import BadField, BadVersion, StreamError

Value = Any
"""What a body may hold: None, bool, int, float, str, bytes, list, dict[str, Value]."""

MAX_STR_BYTES = 64 << 10
MAX_BIN_BYTES = 1 << 20
MAX_ITEMS = 64 << 10
_HEAD_BYTES = 256
"""Room for a section without its body: more is had when it is needed."""
_HOSTILE: dict[str, Any] = {
    "raw": False,
    "strict_map_key": True,
    "max_str_len": MAX_STR_BYTES,
    "max_bin_len": MAX_BIN_BYTES,
    "max_array_len": MAX_ITEMS,
    "max_map_len": MAX_ITEMS,
    "max_ext_len": 0,
}
_MAP, _LONG_MAPS = 0x80, (0xDE, 0xDF)
"""How a map begins (msgpack's specification, "map format family")."""
_HEAD = re.compile(rb"\x83\xa4name[\xa0-\xbf]([\x00-\x7f]*)\xa7version([\x01-\x7f])\xa4body(?=[\x80-\x8f\xde\xdf])")
"""A section as far as its body, with a short name in ASCII."""
_NAME_AT = len(b"\x83\xa4name?")
_BROKEN = (ValueError, TypeError, msgpack.exceptions.UnpackException, RecursionError)


class Section:
    """The saved state of the part ``name`` (``vcpu0``, ``irqchip``, ``serial0`` …), in ``version`` of its layout.

    ``body`` is a map, or one in msgpack already: then it stays so until somebody looks into it."""

    __slots__ = ("_body", "name", "version")

    def __init__(self, name: str, version: int, body: Mapping[str, Value] | bytes) -> None:
        self.name = name
        self.version = version
        self._body = body

    @property
    def body(self) -> Mapping[str, Value]:
        """The body as a map. Raises :class:`StreamError` when it is none."""
        if isinstance(self._body, bytes):
            body = unpack(self._body, f"section {self.name}")
            if not isinstance(body, dict):
                raise BadField(f"section {self.name}: its body is a {type(body).__name__}, expected a map")
            self._body = body
        return self._body

    @property
    def packed(self) -> bytes:
        """The body in msgpack."""
        return self._body if isinstance(self._body, bytes) else pack(self._body)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Section):
            return NotImplemented
        return (self.name, self.version, self.body) == (other.name, other.version, other.body)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Section({self.name!r}, {self.version}, {self._body!r})"


def pack(value: Value) -> bytes:
    """``value`` as msgpack bytes."""
    return bytes(msgpack.packb(value, use_bin_type=True))


def unpack(data: bytes | memoryview, what: str) -> Value:
    """Decode hostile msgpack; ``what`` names it in an error. Raises :class:`StreamError`."""
    try:
        return msgpack.unpackb(data, **_HOSTILE)
    except _BROKEN as error:
        raise StreamError(f"{what} is not valid msgpack: {type(error).__name__} {error}") from error


def encode(section: Section) -> bytes:
    """The payload of a SECTION frame."""
    return _head(section.name, section.version) + section.packed


@lru_cache(256)
def _head(name: str, version: int) -> bytes:
    """A section as far as its body."""
    packer = msgpack.Packer(use_bin_type=True, autoreset=False, buf_size=_HEAD_BYTES)
    packer.pack_map_header(3)
    for item in ("name", name, "version", version, "body"):
        packer.pack(item)
    return bytes(packer.bytes())


def decode(data: bytes | memoryview, *, whole: bool = False) -> Section:
    """Decode the payload of a SECTION frame. Raises :class:`StreamError`. Its body stays packed, and is looked at only
    as far as its structure goes, or all of it."""
    body, fields = _without_body(data, whole)
    name = fields.text("name", max_length=64)
    section = Section(name, fields.integer("version", 1, 0xFFFF), body)
    fields.done()
    return section


def decode_well_formed(data: bytes) -> Section:
    """The same of msgpack that is known to be one value, well formed. One as :func:`encode` writes it needs no decoder.
    """
    head = _HEAD.match(data)
    if head is None or len(head[1]) != data[_NAME_AT - 1] & 0x1F:
        return decode(data)
    return Section(head[1].decode(), head[2][0], data[head.end() :])


def _without_body(data: bytes | memoryview, whole: bool) -> tuple[bytes, Fields]:
    """The body of a section as it is, and the other fields."""
    reader = msgpack.Unpacker(max_buffer_size=len(data) + 1, **_HOSTILE)
    reader.feed(data)
    others: dict[str, Value] = {}
    body = b""
    try:
        for _ in range(reader.read_map_header()):
            key = reader.unpack()
            if key in others or (key == "body" and body):
                raise BadField(f"section: field {key!r:.80} comes twice")
            if key == "body":
                begin = reader.tell()
                reader.unpack() if whole else reader.skip()
                body = bytes(data[begin : reader.tell()])
            else:
                others[key] = reader.unpack()
    except _BROKEN as error:
        raise StreamError(f"a section is not valid msgpack: {type(error).__name__} {error}") from error
    if reader.tell() != len(data):
        raise StreamError("a section is not valid msgpack: there are bytes behind it")
    if not body:
        raise BadField("section: field 'body' is missing")
    if body[0] & 0xF0 != _MAP and body[0] not in _LONG_MAPS:
        raise BadField("section: field 'body' is not a map")
    return body, Fields(others, "section")


def by_name(sections: Iterable[Section]) -> dict[str, Section]:
    """Index ``sections``; raises :class:`BadField` when a name comes twice."""
    found: dict[str, Section] = {}
    for section in sections:
        if section.name in found:
            raise BadField(f"section {section.name} comes twice")
        found[section.name] = section
    return found


def require_version(section: Section, newest: int) -> None:
    """Raise :class:`BadVersion` when ``section`` is of a later layout than ``newest``."""
    if not 1 <= section.version <= newest:
        raise BadVersion(
            f"section {section.name} has version {section.version}, this kvmigrate reads up to {newest}: update it"
        )


class Fields:
    """Reads a decoded map whose every field is hostile: exact types, ranges, and no key left over.

    Every method takes the key and raises :class:`BadField`, naming ``where`` and the key, when it is missing or wrong.
    Call :meth:`done` at the end: a key that nobody asked for is an error too.
    """

    def __init__(self, value: Value, where: str) -> None:
        if not isinstance(value, dict):
            raise BadField(f"{where}: expected a map, got {type(value).__name__}")
        self._left: dict[str, Value] = dict(value)
        self._where = where

    def _take(self, key: str, wanted: type) -> Value:
        if key not in self._left:
            raise BadField(f"{self._where}: field {key!r} is missing")
        value = self._left.pop(key)
        if type(value) is not wanted:
            raise BadField(f"{self._where}: field {key!r} is a {type(value).__name__}, expected {wanted.__name__}")
        return value

    def integer(self, key: str, low: int = 0, high: int = 2**64 - 1) -> int:
        """An integer in ``low..high``, both included."""
        value: int = self._take(key, int)
        if not low <= value <= high:
            raise BadField(f"{self._where}: field {key!r} is {value}, expected {low} to {high}")
        return value

    def boolean(self, key: str) -> bool:
        return bool(self._take(key, bool))

    def text(self, key: str, max_length: int = 4096) -> str:
        value: str = self._take(key, str)
        if len(value) > max_length:
            raise BadField(f"{self._where}: field {key!r} has {len(value)} characters, at most {max_length} may be")
        return value

    def blob(self, key: str, max_bytes: int, *, exact: bool = False) -> bytes:
        """Bytes, at most ``max_bytes`` of them, or exactly so many."""
        value: bytes = self._take(key, bytes)
        if len(value) > max_bytes or (exact and len(value) != max_bytes):
            bound = "exactly" if exact else "at most"
            raise BadField(f"{self._where}: field {key!r} has {len(value)} bytes, expected {bound} {max_bytes}")
        return value

    def sequence(self, key: str, max_items: int) -> list[Value]:
        value: list[Value] = self._take(key, list)
        if len(value) > max_items:
            raise BadField(f"{self._where}: field {key!r} has {len(value)} items, at most {max_items} are allowed")
        return value

    def mapping(self, key: str) -> dict[str, Value]:
        value: dict[str, Value] = self._take(key, dict)
        return value

    def has(self, key: str) -> bool:
        """Whether an optional key is there."""
        return key in self._left

    def done(self) -> None:
        """Raise :class:`BadField` when a key is left that nobody asked for."""
        if self._left:
            raise BadField(f"{self._where}: unknown field {sorted(map(str, self._left))[0]!r}")
