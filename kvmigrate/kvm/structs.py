"""C structs as plain dicts under the kernel's field names, from the layout that the compiler saw.

A :class:`Layout` is built once per struct from cffi's type information and turns whole structs at a time with
:mod:`struct`, since a vCPU's state is converted inside the downtime. Padding and reserved fields are left out and
written as zero. Arrays of bytes become bytes, other arrays lists, nested structs dicts.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from functools import cache
from typing import Any

from .._core import ffi
from ..errors import BadField
from ..state.section import Value

_CODES = {(1, False): "B", (2, False): "H", (4, False): "I", (8, False): "Q"}
_CODES |= {(size, True): code.lower() for (size, _), code in _CODES.items()}
_PADDING = ("pad", "reserved", "dummy")


def _code(ctype: Any) -> str:
    return _CODES[ffi.sizeof(ctype), int(ffi.cast(ctype, -1)) < 0]


def _is_byte(ctype: Any) -> bool:
    return bool(ctype.kind == "primitive" and ffi.sizeof(ctype) == 1)


class Layout:
    """How a struct of the cffi type ``ctype`` lies in memory; ``size_bytes`` is its size."""

    def __init__(self, ctype: Any) -> None:
        self.ctype = ctype
        self.size_bytes: int = ffi.sizeof(ctype)
        self._names: list[str] = []
        self._counts: list[int | None] = []
        self._nested: list[tuple[str, Layout, int, int | None]] = []
        self._flat = struct.Struct(self._build())
        self._is_plain = not any(self._counts)
        self._has_bytes = "s" in self._flat.format
        self._keys = {*self._names, *(name for name, *_ in self._nested)}

    @property
    def flat(self) -> struct.Struct:
        """All fields that are no structs themselves, in order of their offsets."""
        return self._flat

    def _build(self) -> str:
        text, at = "<", 0
        for name, field in sorted(self.ctype.fields, key=lambda item: int(item[1].offset)):
            if name.startswith(_PADDING):
                continue
            code, count = self._describe(name, field)
            if code:
                text += f"{field.offset - at}x{code}"
                at = field.offset + ffi.sizeof(field.type)
                self._names.append(name)
                self._counts.append(count)
        return text + f"{self.size_bytes - at}x"

    def _describe(self, name: str, field: Any) -> tuple[str, int | None]:
        """The field's format and, of an array, its length; an empty format when it is a nested layout."""
        ctype = field.type
        if ctype.kind == "primitive":
            return _code(ctype), None
        if ctype.kind == "array":
            if _is_byte(ctype.item):
                return f"{ctype.length}s", None
            if ctype.item.kind == "primitive":
                return f"{ctype.length}{_code(ctype.item)}", ctype.length
            if ctype.item.kind == "array":
                return f"{ctype.item.length}s" * ctype.length, ctype.length
            self._nested.append((name, _of_type(ctype.item), field.offset, ctype.length))
        else:
            self._nested.append((name, _of_type(ctype), field.offset, None))
        return "", None

    def unpack(self, data: Any, offset: int = 0) -> dict[str, Value]:
        """The struct that starts at ``offset`` of the buffer ``data``."""
        values = self._flat.unpack_from(data, offset)
        if self._is_plain:
            found = dict(zip(self._names, values, strict=True))
        else:
            found, at = {}, 0
            for name, count in zip(self._names, self._counts, strict=True):
                found[name] = values[at] if count is None else list(values[at : at + count])
                at += 1 if count is None else count
        for name, layout, start, count in self._nested:
            if count is None:
                found[name] = layout.unpack(data, offset + start)
            else:
                step = layout.size_bytes
                found[name] = [layout.unpack(data, offset + start + n * step) for n in range(count)]
        return found

    def pack(self, value: Value, where: str) -> bytes:
        """The struct as bytes. Everything in ``value`` is hostile: raises :class:`BadField`, naming ``where``, unless
        its keys are exactly the struct's and each value has the exact type, range and length."""
        data = bytearray(self.size_bytes)
        self._pack_into(data, 0, value, where)
        return bytes(data)

    def _pack_into(self, data: bytearray, offset: int, value: Value, where: str) -> None:
        if type(value) is not dict or value.keys() != self._keys:
            raise _wrong_keys(value, self._keys, where)
        values = [value[name] for name in self._names] if self._is_plain else self._flatten(value, where)
        self._write(data, offset, values, where)
        for name, layout, start, count in self._nested:
            inside = f"{where}.{name}"
            if count is None:
                layout._pack_into(data, offset + start, value[name], inside)
            else:
                for n, item in enumerate(_exact_list(value[name], count, inside)):
                    layout._pack_into(data, offset + start + n * layout.size_bytes, item, f"{inside}[{n}]")

    def _flatten(self, value: dict[str, Value], where: str) -> list[Value]:
        values: list[Value] = []
        for name, count in zip(self._names, self._counts, strict=True):
            if count is None:
                values.append(value[name])
            else:
                values += _exact_list(value[name], count, f"{where}.{name}")
        return values

    def _write(self, data: bytearray, offset: int, values: list[Value], where: str) -> None:
        # struct takes a bool as an integer, and pads or cuts bytes: neither may pass.
        if not {*map(type, values)} <= {int, bytes}:
            raise BadField(f"{where}: a field has a value of the wrong type")
        write: Callable[..., None] = self._flat.pack_into
        try:
            write(data, offset, *values)
        except struct.error as error:
            raise BadField(f"{where}: a field has a value that its type cannot hold: {error}") from None
        if self._has_bytes and self._flat.unpack_from(data, offset) != tuple(values):
            raise BadField(f"{where}: a field of bytes has the wrong length")


def _wrong_keys(value: Value, wanted: set[str], where: str) -> BadField:
    if type(value) is not dict:
        return BadField(f"{where}: expected a map, got {type(value).__name__}")
    for name in sorted(wanted - value.keys()):
        return BadField(f"{where}: field {name!r} is missing")
    unknown = sorted(map(repr, value.keys() - wanted))
    return BadField(f"{where}: unknown field {unknown[0]}")


def _exact_list(value: Value, length: int, where: str) -> list[Value]:
    if type(value) is not list or len(value) != length:
        raise BadField(f"{where}: expected a list of {length} items")
    return value


@cache
def _of_type(ctype: Any) -> Layout:
    return Layout(ctype)


@cache
def layout(name: str) -> Layout:
    """The layout of ``struct kvm_<name>``, built at its first use."""
    return _of_type(ffi.typeof(f"struct kvm_{name}"))
