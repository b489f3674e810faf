"""State as the kernel's structs side by side in memory: as it was saved, and as it is held after a load.

All of it goes into msgpack and out of it by one call of the C core, and to the kernel and back by another, so that next
to nothing is left for the interpreter to do while no copy of the guest runs.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from .._core import ffi
from ..record import dataclass
from .structs import Field, Layout

_ALIGN_BYTES = 64
APART_BYTES = 64


@dataclass(frozen=True, slots=True)
class Part:
    """One struct, number or row of bytes, ``size_bytes`` long. On the wire it has the key ``key``; there it is the
    KMIG_FIELD_… ``kind``, begins ``offset`` bytes into the part, and is ``wire_bytes`` long, all of it by default."""

    key: str
    size_bytes: int
    kind: int
    of: Layout | None = None
    offset: int = 0
    wire_bytes: int = 0
    length_at: int = 0

    @property
    def nr_wire_bytes(self) -> int:
        return self.wire_bytes or self.size_bytes


class Shape:
    """Where the ``parts`` lie in an image, in which each is twice; their order is that on the wire. One for all images
    alike: working it out takes as long as setting what is in one."""

    def __init__(self, parts: Iterable[Part]) -> None:
        self.parts = {part.key: part for part in parts}
        self.places: dict[str, int] = {}
        size_bytes = 0
        for key, part in self.parts.items():
            self.places[key] = size_bytes
            size_bytes += -(-part.size_bytes // _ALIGN_BYTES) * _ALIGN_BYTES
        self.size_bytes = size_bytes
        self.blank_bytes: Any = ffi.new("char[]", size_bytes)
        self.layout = Layout(size_bytes, [self._field(part) for part in self.parts.values()])

    def _field(self, part: Part) -> Field:
        at = self.places[part.key]
        length_at = at + part.length_at
        return Field(part.key, part.kind, at + part.offset, part.nr_wire_bytes, length_at=length_at, of=part.of)

    def blank(self, key: str, ctype: str = "char *") -> Any:
        """What the part is before a save or a load, all zero but for what is written here, before the first image."""
        return ffi.cast(ctype, self.blank_bytes + self.places[key])

    def saved_at(self, key: str) -> int:
        """Where the saved part ``key`` is in an image's memory."""
        return self.places[key]

    def held_at(self, key: str) -> int:
        """The same of the held part."""
        return self.size_bytes + self.places[key]

    @property
    def apart_at(self) -> int:
        """The same of what is no part."""
        return 2 * self.size_bytes


class Image:
    """Memory of ``shape``: ``saved`` is filled by a save, or out of msgpack by :meth:`decode`, or part by part by
    :meth:`fill`; ``held`` is for what the kernel has after a load; ``apart`` for an argument that is no state."""

    def __init__(self, shape: Shape) -> None:
        self._shape = shape
        self.parts = shape.parts
        self.memory: Any = ffi.new("char[]", shape.apart_at + APART_BYTES)

    def saved(self, key: str, ctype: str = "char *") -> Any:
        """The saved part ``key`` as a C pointer of the type ``ctype``."""
        return ffi.cast(ctype, self.memory + self._shape.saved_at(key))

    def held(self, key: str, ctype: str = "char *") -> Any:
        """The held part."""
        return ffi.cast(ctype, self.memory + self._shape.held_at(key))

    def apart(self, ctype: str) -> Any:
        """The :data:`APART_BYTES` behind all parts."""
        return ffi.cast(ctype, self.memory + self._shape.apart_at)

    def saved_bytes(self, key: str) -> bytes:
        """The saved part as it goes over the wire, but not packed."""
        return self._bytes(self._shape.saved_at(key), key)

    def held_bytes(self, key: str) -> bytes:
        """The same of the held part."""
        return self._bytes(self._shape.held_at(key), key)

    def _bytes(self, at: int, key: str) -> bytes:
        part = self.parts[key]
        return bytes(ffi.buffer(self.memory + at + part.offset, part.nr_wire_bytes))

    def clear(self) -> None:
        """Make all parts blank."""
        size_bytes = self._shape.size_bytes
        ffi.memmove(self.memory, self._shape.blank_bytes, size_bytes)
        ffi.memmove(self.memory + size_bytes, self._shape.blank_bytes, size_bytes)

    def encode(self) -> bytes:
        """What was saved as a msgpack map. Raises :class:`HostError` for a blob that is longer than there is room."""
        return self._shape.layout.encode(self.memory)

    def decode(self, packed: bytes, where: str) -> None:
        """Fill it from the msgpack map ``packed``, which is hostile: exactly the parts, as :meth:`Layout.decode` has
        it. Raises :class:`BadField`, naming ``where``."""
        self.clear()
        self._shape.layout.decode(packed, self.memory, where)

    def fill(self, key: str, data: bytes) -> None:
        """Put ``data``, bytes as :meth:`saved_bytes` gives, into a part that was cleared; what is missing is zero."""
        part = self.parts[key]
        ffi.memmove(self.memory + self._shape.saved_at(key) + part.offset, data, len(data))
