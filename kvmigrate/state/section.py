"""A section: the saved state of one part of the machine, as a versioned msgpack value.

Encoded as the msgpack map ``{"name": str, "version": int, "body": map}``. The body holds only None, bool, int, float,
str, bytes, lists and maps with str keys, under the kernel's own field names, so that a person can read a dump.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import msgpack

from ..errors import BadField, BadVersion, StreamError
from ..record import dataclass

Value = Any
"""What a body may hold: None, bool, int, float, str, bytes, list, dict[str, Value]."""

MAX_STR_BYTES = 64 << 10
MAX_BIN_BYTES = 1 << 20
MAX_ITEMS = 64 << 10


@dataclass(frozen=True, slots=True)
class Section:
    """The saved state of the part ``name`` (``vcpu0``, ``irqchip``, ``serial0`` …), in ``version`` of its layout."""

    name: str
    version: int
    body: Mapping[str, Value]


def pack(value: Value) -> bytes:
    """``value`` as msgpack bytes."""
    return bytes(msgpack.packb(value, use_bin_type=True))


def unpack(data: bytes | memoryview, what: str) -> Value:
    """Decode hostile msgpack; ``what`` names it in an error. Raises :class:`StreamError`."""
    try:
        return msgpack.unpackb(
            data,
            raw=False,
            strict_map_key=True,
            max_str_len=MAX_STR_BYTES,
            max_bin_len=MAX_BIN_BYTES,
            max_array_len=MAX_ITEMS,
            max_map_len=MAX_ITEMS,
            max_ext_len=0,
        )
    except (ValueError, TypeError, msgpack.exceptions.UnpackException, RecursionError) as error:
        raise StreamError(f"{what} is not valid msgpack: {type(error).__name__} {error}") from error


def encode(section: Section) -> bytes:
    """The payload of a SECTION frame."""
    return pack({"name": section.name, "version": section.version, "body": section.body})


def decode(data: bytes | memoryview) -> Section:
    """Decode the payload of a SECTION frame. Raises :class:`StreamError`."""
    fields = Fields(unpack(data, "a section"), "section")
    name = fields.text("name", max_length=64)
    section = Section(name, fields.integer("version", 1, 0xFFFF), fields.mapping("body"))
    fields.done()
    return section


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
