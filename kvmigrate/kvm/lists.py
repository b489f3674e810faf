"""The ioctls whose argument is a header and a list behind it: CPUID entries, MSRs and MSR indices."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache, lru_cache
from itertools import chain
from typing import Any

from .._core import ffi, lib
from ..errors import check
from ..state.section import Value
from .structs import Field, Layout, layout

MAX_CPUID_ENTRIES = 256
_MAX_INDICES = 4096
MAX_MSRS_PER_CALL = 255
"""The kernel refuses MAX_IO_MSRS, which is 256, with E2BIG already (arch/x86/kvm/x86.c, msr_io)."""

_CPUID_HEADER = ffi.sizeof("struct kvm_cpuid2")
_MSRS_HEADER = ffi.sizeof("struct kvm_msrs")


def read_indices(fd: int, request: int, what: str) -> list[int]:
    """The MSR indices that ``request`` (KVM_GET_MSR_INDEX_LIST and the like) returns."""
    header = ffi.sizeof("struct kvm_msr_list")
    buffer = ffi.new("char[]", header + 4 * _MAX_INDICES)
    found = ffi.cast("struct kvm_msr_list *", buffer)
    found.nmsrs = _MAX_INDICES
    check(lib.kmig_ioctl(fd, request, buffer), what)
    return list(struct.unpack_from(f"<{found.nmsrs}I", ffi.buffer(buffer), header))


def read_cpuid(fd: int, request: int, what: str, nr_entries: int = MAX_CPUID_ENTRIES) -> list[dict[str, Value]]:
    """The CPUID entries that ``request`` returns, at most so many: function, index, flags, eax, ebx, ecx, edx."""
    buffer = ffi.new("char[]", _cpuid_table(nr_entries).size_bytes)
    found = ffi.cast("struct kvm_cpuid2 *", buffer)
    found.nent = nr_entries
    check(lib.kmig_ioctl(fd, request, buffer), what)
    return list(_entries_of(bytes(ffi.buffer(buffer, _cpuid_table(found.nent).size_bytes)), found.nent))


def pack_cpuid(entries: Sequence[Value], where: str) -> bytes:
    """The argument of KVM_SET_CPUID2 for ``entries``, which are hostile. Raises :class:`BadField`."""
    table = bytearray(_cpuid_table(len(entries)).pack({"entries": list(entries)}, where))
    ffi.cast("struct kvm_cpuid2 *", ffi.from_buffer(table)).nent = len(entries)
    return bytes(table)


class CheckedCpuid(list[dict[str, Value]]):
    """CPUID entries that :func:`pack_cpuid` has made ``packed`` of, and that nobody changes: a machine's are looked at
    when they arrive, and need not be once more when its vCPUs are made."""

    __slots__ = ("packed",)

    def __init__(self, entries: Sequence[Value], where: str) -> None:
        """Raises :class:`BadField`, naming ``where``."""
        self.packed = pack_cpuid(entries, where)
        super().__init__(entries)


def write_cpuid(fd: int, table: bytes) -> list[dict[str, Value]]:
    """KVM_SET_CPUID2 with what :func:`pack_cpuid` made; returns what the kernel made of it.

    It is asked for just as many entries as it was given: KVM_GET_CPUID2 of older kernels (6.1) does not say how many
    there are, and what lies behind them would be taken for entries (kvm_vcpu_ioctl_get_cpuid2)."""
    check(lib.kmig_ioctl(fd, lib.KVM_SET_CPUID2, ffi.from_buffer(table)), "KVM_SET_CPUID2")
    nr_entries = ffi.cast("struct kvm_cpuid2 *", ffi.from_buffer(table)).nent
    return read_cpuid(fd, lib.KVM_GET_CPUID2, "KVM_GET_CPUID2", nr_entries)


@lru_cache(64)
def _entries_of(table: bytes, nr_entries: int) -> tuple[dict[str, Value], ...]:
    """Kept, since all vCPUs of all VMs have the same few tables: to look into one takes as long as to make a vCPU."""
    return tuple(_cpuid_table(nr_entries).unpack(table)["entries"])


@lru_cache(16)
def _cpuid_table(nr_entries: int) -> Layout:
    entry = layout("cpuid_entry2")
    entries = Field("entries", lib.KMIG_FIELD_STRUCT, _CPUID_HEADER, entry.size_bytes, nr_entries, of=entry)
    return Layout(_CPUID_HEADER + nr_entries * entry.size_bytes, [entries])


@cache
def _table(nr_entries: int) -> struct.Struct:
    """All entries of one call at once: index, value, index, value …"""
    entry = "struct kvm_msr_entry"
    data_at = ffi.offsetof(entry, "data")
    return struct.Struct("<" + f"I{data_at - 4}xQ{ffi.sizeof(entry) - data_at - 8}x" * nr_entries)


def _msrs_call(fd: int, request: int, flat_pairs: Iterable[int], nr_entries: int) -> tuple[int, Any]:
    table = _table(nr_entries)
    buffer = ffi.new("char[]", _MSRS_HEADER + table.size)
    ffi.cast("struct kvm_msrs *", buffer).nmsrs = nr_entries
    view = ffi.buffer(buffer)
    table.pack_into(view, _MSRS_HEADER, *flat_pairs)
    return lib.kmig_ioctl(fd, request, buffer), view


@lru_cache(64)
def _empty_table(indices: tuple[int, ...]) -> bytes:
    """The argument of KVM_GET_MSRS for ``indices``, which are the same ones at every save."""
    pairs = chain.from_iterable((index, 0) for index in indices)
    header = bytearray(_MSRS_HEADER)
    header[:4] = len(indices).to_bytes(4, "little")
    return bytes(header) + _table(len(indices)).pack(*pairs)


def _get_msrs_call(fd: int, indices: tuple[int, ...]) -> tuple[int, Any]:
    empty = _empty_table(indices)
    buffer = ffi.new("char[]", empty)
    return lib.kmig_ioctl(fd, lib.KVM_GET_MSRS, buffer), ffi.buffer(buffer, len(empty))


def read_msrs(fd: int, indices: Iterable[int]) -> dict[int, int]:
    """The MSRs of ``indices`` that can be read, in that order. KVM_GET_MSRS stops at the first that cannot, and returns
    how many it read: that one is left out and the rest is read by the next call."""
    found: dict[int, int] = {}
    for read, view, nr_asked in _read_chunks(fd, indices):
        values = _table(nr_asked).unpack_from(view, _MSRS_HEADER)[1::2]
        found.update(zip(read, values, strict=False))
    return found


def readable_msrs(fd: int, indices: Iterable[int]) -> tuple[int, ...]:
    """Those of ``indices`` that can be read, without a look at what they hold."""
    return tuple(chain.from_iterable(read for read, _, _ in _read_chunks(fd, indices)))


def _read_chunks(fd: int, indices: Iterable[int]) -> Iterator[tuple[tuple[int, ...], Any, int]]:
    """Of each call: which MSRs it read, its argument, and how many it was for."""
    left = tuple(indices)
    while left:
        chunk = left[:MAX_MSRS_PER_CALL]
        count, view = _get_msrs_call(fd, chunk)
        check(count, "KVM_GET_MSRS")
        yield chunk[:count], view, len(chunk)
        left = left[count:] if count == len(chunk) else left[count + 1 :]


def write_msrs(fd: int, values: Mapping[int, int]) -> list[int]:
    """Write MSRs in the order of ``values``; returns the indices that the kernel refused. KVM_SET_MSRS stops at the
    first that it cannot write and returns how many it wrote, which is no error to ioctl: the rest is written by the
    next call, so that one refusal is never a silent loss of all that follow."""
    refused: list[int] = []
    left = list(values.items())
    while left:
        chunk = left[:MAX_MSRS_PER_CALL]
        count, _ = _msrs_call(fd, lib.KVM_SET_MSRS, chain.from_iterable(chunk), len(chunk))
        check(count, "KVM_SET_MSRS")
        if count < len(chunk):
            refused.append(chunk[count][0])
        left = left[count:] if count == len(chunk) else left[count + 1 :]
    return refused
