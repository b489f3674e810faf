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


class Image:
    """Memory for the ``parts``, twice; their order is that on the wire.

    ``saved`` is filled by a save, or out of msgpack by :meth:`decode`, or part by part by :meth:`fill`; ``held`` is for
    what the kernel has after a load.
    """

    def __init__(self, parts: Iterable[Part]) -> None:
        self.parts = {part.key: part for part in parts}
        self._places: dict[str, int] = {}
        size_bytes = 0
        for key, part in self.parts.items():
            self._places[key] = size_bytes
            size_bytes += -(-part.size_bytes // _ALIGN_BYTES) * _ALIGN_BYTES
        self._size_bytes = size_bytes
        self._saved: Any = ffi.new("char[]", size_bytes)
        self._held: Any = ffi.new("char[]", size_bytes)
        self._blank: Any = ffi.new("char[]", size_bytes)
        self._layout = Layout(size_bytes, [self._field(part) for part in self.parts.values()])

    def _field(self, part: Part) -> Field:
        at = self._places[part.key]
        length_at = at + part.length_at
        return Field(part.key, part.kind, at + part.offset, part.nr_wire_bytes, length_at=length_at, of=part.of)

    def saved(self, key: str, ctype: str = "char *") -> Any:
        """The saved part ``key`` as a C pointer of the type ``ctype``."""
        return ffi.cast(ctype, self._saved + self._places[key])

    def held(self, key: str, ctype: str = "char *") -> Any:
        """The held part."""
        return ffi.cast(ctype, self._held + self._places[key])

    def blank(self, key: str, ctype: str = "char *") -> Any:
        """What the part is before a save or a load, all zero but for what is written here."""
        return ffi.cast(ctype, self._blank + self._places[key])

    def saved_bytes(self, key: str) -> bytes:
        """The saved part as it goes over the wire, but not packed."""
        return self._bytes(self._saved, key)

    def held_bytes(self, key: str) -> bytes:
        """The same of the held part."""
        return self._bytes(self._held, key)

    def _bytes(self, memory: Any, key: str) -> bytes:
        part = self.parts[key]
        return bytes(ffi.buffer(memory + self._places[key] + part.offset, part.nr_wire_bytes))

    def clear(self) -> None:
        """Make all parts blank."""
        ffi.memmove(self._saved, self._blank, self._size_bytes)
        ffi.memmove(self._held, self._blank, self._size_bytes)

    def encode(self) -> bytes:
        """What was saved as a msgpack map. Raises :class:`HostError` for a blob that is longer than there is room."""
        return self._layout.encode(self._saved)

    def decode(self, packed: bytes, where: str) -> None:
        """Fill it from the msgpack map ``packed``, which is hostile: exactly the parts, as :meth:`Layout.decode` has
        it. Raises :class:`BadField`, naming ``where``."""
        self.clear()
        self._layout.decode(packed, self._saved, where)

    def fill(self, key: str, data: bytes) -> None:
        """Put ``data``, bytes as :meth:`saved_bytes` gives, into a part that was cleared; what is missing is zero."""
        part = self.parts[key]
        ffi.memmove(self._saved + self._places[key] + part.offset, data, len(data))
