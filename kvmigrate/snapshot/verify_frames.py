"""The checker's own reader of frames and of msgpack: nothing in it comes from the code that writes or loads.

Both follow the formats alone: docs/snapshot-format.md, and https://github.com/msgpack/msgpack/blob/master/spec.md.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import xxhash

HEADER_BYTES = 32
MAX_PAYLOAD_BYTES = 16 << 20
MAX_DEPTH = 32
HELLO, CONFIG, PAGES, SECTION, END, MEMORY_INDEX = 1, 2, 3, 5, 6, 32
NAMES = {HELLO: "HELLO", CONFIG: "CONFIG", PAGES: "PAGES", SECTION: "SECTION", END: "END", MEMORY_INDEX: "MEMORY_INDEX"}
MANDATORY = 1

Tell = Callable[[int, str], None]
"""Called with the offset in the file and what is wrong there."""


class Bytes:
    """The bytes of an open file by range, ``data[begin:end]``. Raises :class:`OSError` where the disk cannot read them.

    Not a mapping: a bad sector or a file that shrinks would end the whole process there, and say nothing.
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._size = os.fstat(fd).st_size

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, where: slice) -> bytes:
        begin, end, _ = where.indices(self._size)
        found = os.pread(self.fd, end - begin, begin)
        if len(found) != end - begin:
            raise OSError("the file became shorter while it was read")
        return found


@dataclass(frozen=True)
class Frame:
    """One frame whose header holds: where it starts, its kind, flags and checksum, and where its payload lies."""

    offset: int
    kind: int
    flags: int
    sequence: int
    checksum: int
    payload_at: int
    payload_bytes: int

    @property
    def name(self) -> str:
        return f"frame {self.sequence} ({NAMES.get(self.kind, f'kind {self.kind}')})"


def walk(data: Bytes, tell: Tell) -> Iterator[Frame]:
    """The frames of a file, as far as their headers lead on; what is wrong with a header or its place is told."""
    at = sequence = 0
    while at < len(data):
        if len(data) - at < HEADER_BYTES:
            tell(at, f"the file ends within a frame's header, after {len(data) - at} of {HEADER_BYTES} bytes")
            return
        head = data[at : at + HEADER_BYTES]
        if head[:4] != b"KVMG":
            tell(at, f"no frame starts here: {head[:4]!r} instead of b'KVMG'")
            return
        if int.from_bytes(head[28:32], "little") != xxhash.xxh3_64_intdigest(head[:28]) & 0xFFFFFFFF:
            tell(at, "the header's checksum is wrong")
            return
        kind, flags, length, checksum, number = struct.unpack("<HHQQI", head[4:28])
        frame = Frame(at, kind, flags, number, checksum, at + HEADER_BYTES, length)
        if number != sequence:
            tell(at, f"{frame.name} stands where frame {sequence} has to be")
        if length > len(data) - at - HEADER_BYTES:
            tell(at, f"{frame.name} has {length} bytes of payload, the file only {len(data) - at - HEADER_BYTES} more")
            return
        yield frame
        at += HEADER_BYTES + length
        sequence += 1


def payload(data: Bytes, frame: Frame, tell: Tell) -> Any:
    """The frame's msgpack value, or None when it is damaged, which is told."""
    if frame.payload_bytes > MAX_PAYLOAD_BYTES:
        tell(frame.offset, f"{frame.name} has {frame.payload_bytes} bytes, over the limit of {MAX_PAYLOAD_BYTES}")
        return None
    body = data[frame.payload_at : frame.payload_at + frame.payload_bytes]
    if xxhash.xxh3_64_intdigest(body) != frame.checksum:
        tell(frame.payload_at, f"the payload of {frame.name} does not have its checksum")
        return None
    try:
        value, end = decode(body, 0)
    except (ValueError, IndexError, struct.error) as error:
        tell(frame.payload_at, f"the payload of {frame.name} is not msgpack: {error}")
        return None
    if end != len(body):
        tell(frame.payload_at + end, f"{len(body) - end} bytes follow the value in {frame.name}")
        return None
    return value


# First byte → (what it is, how its length or value is packed).
_SCALARS = {
    0xCA: ">f", 0xCB: ">d", 0xCC: ">B", 0xCD: ">H", 0xCE: ">I", 0xCF: ">Q",
    0xD0: ">b", 0xD1: ">h", 0xD2: ">i", 0xD3: ">q",
}  # fmt: skip
_SIZED = {
    0xC4: ("bin", 1), 0xC5: ("bin", 2), 0xC6: ("bin", 4), 0xD9: ("str", 1), 0xDA: ("str", 2), 0xDB: ("str", 4),
    0xDC: ("array", 2), 0xDD: ("array", 4), 0xDE: ("map", 2), 0xDF: ("map", 4),
}  # fmt: skip
_CONSTANTS = {0xC0: None, 0xC2: False, 0xC3: True}


def decode(data: bytes, at: int, depth: int = 0) -> tuple[Any, int]:
    """The msgpack value at ``at`` and where it ends.

    Raises :class:`ValueError`, :class:`IndexError` or :class:`struct.error` for bytes that are none.
    """
    if depth > MAX_DEPTH:
        raise ValueError(f"nested over {MAX_DEPTH} deep at byte {at}")
    first = data[at]
    at += 1
    if first < 0x80 or first >= 0xE0:
        return first if first < 0x80 else first - 0x100, at
    if first in _CONSTANTS:
        return _CONSTANTS[first], at
    if first in _SCALARS:
        form = struct.Struct(_SCALARS[first])
        return form.unpack_from(data, at)[0], at + form.size
    if first < 0xC0:
        shape = "map" if first < 0x90 else "array" if first < 0xA0 else "str"
        size = first & (31 if shape == "str" else 15)
    elif first in _SIZED:
        shape, width = _SIZED[first]
        size = int.from_bytes(_take(data, at, width), "big")
        at += width
    else:
        raise ValueError(f"type {first:#x} at byte {at - 1} is not used here")
    return _SHAPES[shape](data, at, size, depth)


def _take(data: bytes, at: int, size: int) -> bytes:
    if size > len(data) - at:
        raise ValueError(f"{size} bytes at byte {at} go past the end")
    return data[at : at + size]


def _bin(data: bytes, at: int, size: int, depth: int) -> tuple[Any, int]:
    return _take(data, at, size), at + size


def _str(data: bytes, at: int, size: int, depth: int) -> tuple[Any, int]:
    return _take(data, at, size).decode("utf-8"), at + size


def _array(data: bytes, at: int, size: int, depth: int) -> tuple[Any, int]:
    items = []
    for _ in range(size):
        item, at = decode(data, at, depth + 1)
        items.append(item)
    return items, at


def _map(data: bytes, at: int, size: int, depth: int) -> tuple[Any, int]:
    found: dict[str, Any] = {}
    for _ in range(size):
        key, end = decode(data, at, depth + 1)
        if not isinstance(key, str) or key in found:
            raise ValueError(f"the map key at byte {at} is no string, or comes twice")
        found[key], at = decode(data, end, depth + 1)
    return found, at


_SHAPES = {"bin": _bin, "str": _str, "array": _array, "map": _map}
