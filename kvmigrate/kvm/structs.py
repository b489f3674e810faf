"""C structs as plain dicts and as msgpack maps under the kernel's field names, from the layout that the compiler saw.

A :class:`Layout` is built once per struct from cffi's type information; csrc/layout_encode.c and layout_decode.c go by
it, since a vCPU's state is converted while no copy of the guest runs. Padding and reserved fields are left out and
written as zero. Arrays of bytes become bytes, other arrays lists, nested structs dicts.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import accumulate
from typing import Any

from .._core import ffi, lib
from ..errors import BadField, check
from ..record import dataclass
from ..state.section import Value, pack, unpack

_PADDING = ("pad", "reserved", "dummy")
_INTEGER_BYTES = 9
_HEAD_BYTES = 5
"""The longest forms of an integer, and of the head of anything else, in msgpack."""


@dataclass(frozen=True, slots=True)
class Field:
    """One field: its name, a KMIG_FIELD_… as ``kind``, the offset from the struct's begin and the size of one item in
    bytes, and how many items an array has. ``length_at`` is where a blob's or a row's length lies, ``of`` the layout of
    a nested struct."""

    name: str
    kind: int
    offset: int
    size_bytes: int
    count: int | None = None
    length_at: int = 0
    of: Layout | None = None

    @property
    def nr_items(self) -> int:
        return 1 if self.count is None else self.count

    def entry(self, name: Any) -> dict[str, Any]:
        """The ``struct kmig_field`` of it, whose name is at the C pointer ``name``."""
        return {
            "name": name,
            "name_bytes": len(self.name),
            "of": ffi.NULL if self.of is None else self.of.handle,
            "kind": self.kind,
            "offset": self.offset,
            "length_at": self.length_at,
            "size_bytes": self.size_bytes,
            "count": self.nr_items,
            "is_array": self.count is not None,
        }

    @property
    def most_bytes(self) -> int:
        """The most that name and value take in msgpack."""
        item = _INTEGER_BYTES
        if self.of is not None:
            item = self.of.most_bytes
        elif self.kind in (lib.KMIG_FIELD_BYTES, lib.KMIG_FIELD_BLOB, lib.KMIG_FIELD_ROW):
            item = _HEAD_BYTES + self.size_bytes
        return 2 * _HEAD_BYTES + len(self.name) + self.nr_items * item


class Layout:
    """A struct of ``size_bytes`` with ``fields``, which are written in that order; ``handle`` is its
    ``struct kmig_layout *``."""

    def __init__(self, size_bytes: int, fields: Sequence[Field]) -> None:
        self.size_bytes = size_bytes
        self.fields = tuple(fields)
        self.most_bytes: int = _HEAD_BYTES + sum(field.most_bytes for field in fields)
        names = [field.name.encode() for field in fields]
        self._names: Any = ffi.new("char[]", b"".join(names))
        starts = accumulate(map(len, names), initial=0)
        entries = [field.entry(self._names + start) for field, start in zip(fields, starts, strict=False)]
        self._fields: Any = ffi.new("struct kmig_field[]", entries)
        self.handle: Any = ffi.new("struct kmig_layout *", [self._fields, len(fields), size_bytes])

    def encode(self, data: Any) -> bytes:
        """The struct at ``data``, a C pointer, as a msgpack map."""
        out = bytearray(self.most_bytes)
        size_bytes = lib.kmig_layout_encode(self.handle, data, ffi.from_buffer(out), len(out))
        return bytes(memoryview(out)[: check(size_bytes, "a struct of the kernel as msgpack")])

    def decode(self, packed: bytes | memoryview, data: Any, where: str) -> None:
        """Write the msgpack map ``packed``, which is hostile, to the struct at ``data``, a C pointer: raises
        :class:`BadField`, naming ``where``, unless its keys are exactly the struct's, each once, and each value has the
        exact type, range and length. The struct has been written to in part then."""
        error = ffi.new("struct kmig_map_error *")
        if lib.kmig_layout_decode(self.handle, ffi.from_buffer(packed), len(packed), data, error):
            raise _bad_field(error, where)

    def unpack(self, data: Any, offset: int = 0) -> dict[str, Value]:
        """The struct that starts at ``offset`` of the buffer ``data`` as a dict."""
        found: dict[str, Value] = unpack(self.encode(ffi.from_buffer(data) + offset), "a struct of the kernel")
        return found

    def pack(self, value: Value, where: str) -> bytes:
        """The struct as bytes from a dict, which is as hostile as for :meth:`decode`."""
        data = bytearray(self.size_bytes)
        self.decode(packed(value, where), ffi.from_buffer(data), where)
        return bytes(data)


def packed(value: Value, where: str) -> bytes:
    """``value``, which is hostile, in msgpack, if it is not already. Raises :class:`BadField`, naming ``where``, when
    msgpack cannot hold it."""
    try:
        return value if isinstance(value, bytes) else pack(value)
    except (OverflowError, TypeError, ValueError) as error:
        raise BadField(f"{where}: a field has a value that its type cannot hold: {error}") from None


_SAYS = {
    lib.KMIG_MAP_BROKEN: "this is not one map of msgpack",
    lib.KMIG_MAP_TYPE: "a value of the wrong type",
    lib.KMIG_MAP_RANGE: "a value that its type cannot hold",
    lib.KMIG_MAP_LENGTH: "the wrong length",
}


def _bad_field(error: Any, where: str) -> BadField:
    path = ffi.string(error.where).decode(errors="replace")
    if error.what in _SAYS:
        return BadField(f"{where}{path}: {_SAYS[error.what]}")
    inside, _, name = path.rpartition(".")
    if error.what == lib.KMIG_MAP_MISSING:
        return BadField(f"{where}{inside}: field {name!r} is missing")
    return BadField(f"{where}{inside}: unknown field {name!r}, or it comes twice")


def _field(name: str, info: Any) -> Field:
    ctype, count = info.type, None
    if ctype.kind == "array" and not _is_byte(ctype.item):
        ctype, count = ctype.item, ctype.length
    size_bytes = ffi.sizeof(ctype)
    if ctype.kind == "array":
        return Field(name, lib.KMIG_FIELD_BYTES, info.offset, size_bytes, count)
    if ctype.kind == "primitive":
        signed = int(ffi.cast(ctype, -1)) < 0
        kind = lib.KMIG_FIELD_SIGNED if signed else lib.KMIG_FIELD_UNSIGNED
        return Field(name, kind, info.offset, size_bytes, count)
    return Field(name, lib.KMIG_FIELD_STRUCT, info.offset, size_bytes, count, of=_of_type(ctype))


def _is_byte(ctype: Any) -> bool:
    return bool(ctype.kind == "primitive" and ffi.sizeof(ctype) == 1)


@cache
def _of_type(ctype: Any) -> Layout:
    found = sorted(ctype.fields, key=lambda item: int(item[1].offset))
    return Layout(ffi.sizeof(ctype), [_field(name, info) for name, info in found if not name.startswith(_PADDING)])


@cache
def layout(name: str) -> Layout:
    """The layout of ``struct kvm_<name>``, built at its first use."""
    return _of_type(ffi.typeof(f"struct kvm_{name}"))
