"""A list of MSRs as KVM_GET_MSRS and KVM_SET_MSRS take it, in the order in which they have to be written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from .._core import ffi, lib
from ..record import dataclass
from .lists import MAX_MSRS_PER_CALL
from .msr_names import IA32_MCG_CAP, msr_name
from .msrs import WALL_CLOCKS, in_write_order
from .structs import Field, Layout

_HEADER_BYTES = ffi.sizeof("struct kvm_msrs")
_ENTRY_BYTES = ffi.sizeof("struct kvm_msr_entry")
_CHUNK_BYTES = _HEADER_BYTES + MAX_MSRS_PER_CALL * _ENTRY_BYTES
_DATA_AT = ffi.offsetof("struct kvm_msr_entry", "data")


@dataclass(frozen=True, slots=True)
class Chunk:
    """The MSRs of one call: where its ``struct kvm_msrs`` begins in the table, how many are in it, and how many of
    them, from the first on, are written by a load and read back after it."""

    at: int
    nr_msrs: int
    nr_written: int
    nr_compared: int

    @property
    def entries_at(self) -> int:
        return self.at + _HEADER_BYTES

    @property
    def compared_bytes(self) -> int:
        return self.nr_compared * _ENTRY_BYTES


class MsrTable:
    """Where each of the MSRs ``indices`` lies in ``size_bytes`` of memory: first those that a load writes and reads
    back all at once, then the others, which have steps of their own. ``layout`` has them in the order of ``indices``.
    """

    def __init__(self, indices: Sequence[int]) -> None:
        written = [index for index in in_write_order(dict.fromkeys(indices, 0)) if index not in WALL_CLOCKS]
        # Read back with those that are written, for they are right already: in a machine with as many machine check
        # banks, and in one that nobody has asked for the time.
        compared = [*written, *(index for index in indices if index == IA32_MCG_CAP or index in WALL_CLOCKS)]
        self._order = (*dict.fromkeys([*compared, *indices]),)
        self.compared_names = tuple(msr_name(index) for index in compared)
        counts = len(self._order), len(written), len(compared)
        self.chunks = [
            Chunk(n // MAX_MSRS_PER_CALL * _CHUNK_BYTES, *(_within(count, n) for count in counts))
            for n in range(0, len(self._order), MAX_MSRS_PER_CALL)
        ]
        self.size_bytes: int = len(self.chunks) * _CHUNK_BYTES
        self._places = {index: self._place(n) for n, index in enumerate(self._order)}
        fields = (Field(msr_name(i), lib.KMIG_FIELD_UNSIGNED, self._places[i] + _DATA_AT, 8) for i in indices)
        self.layout = Layout(self.size_bytes, [*fields])

    def _place(self, n: int) -> int:
        chunk = self.chunks[n // MAX_MSRS_PER_CALL]
        return chunk.entries_at + n % MAX_MSRS_PER_CALL * _ENTRY_BYTES

    def init(self, table: Any) -> None:
        """Write which MSRs are asked for to the memory at ``table``."""
        for index in self._order:
            self.entry(table, index).index = index
        for chunk in self.chunks:
            ffi.cast("struct kvm_msrs *", table + chunk.at).nmsrs = chunk.nr_msrs

    def __contains__(self, index: int) -> bool:
        return index in self._places

    def calls(self, table: Any, *, compared: bool = False) -> list[tuple[Any, int]]:
        """The ``struct kvm_msrs *`` of each chunk of the table at ``table``, and how many of its MSRs a load writes, or
        reads back to be ``compared``."""
        return [
            (ffi.cast("struct kvm_msrs *", table + chunk.at), chunk.nr_compared if compared else chunk.nr_written)
            for chunk in self.chunks
        ]

    def entry(self, table: Any, index: int) -> Any:
        """The ``struct kvm_msr_entry *`` of one MSR that is in the table at ``table``."""
        return ffi.cast("struct kvm_msr_entry *", table + self._places[index])

    def values(self, table: Any) -> dict[int, int]:
        """All of the table at ``table``."""
        return {index: int(self.entry(table, index).data) for index in self._order}

    def set(self, table: Any, index: int, value: int) -> None:
        """Change one MSR that is in the table at ``table``."""
        self.entry(table, index).data = value

    def fill(self, table: Any, values: Mapping[int, int]) -> bool:
        """Put ``values`` into the table at ``table``, if they are of just these MSRs."""
        if values.keys() != self._places.keys():
            return False
        for index, value in values.items():
            self.set(table, index, value)
        return True


@lru_cache(8)
def table_of(indices: tuple[int, ...]) -> MsrTable:
    """The table of ``indices``, which are the same for all vCPUs of most hosts."""
    return MsrTable(indices)


def _within(count: int, first: int) -> int:
    """How many of the first ``count`` are in the chunk that begins with number ``first``."""
    return max(min(count - first, MAX_MSRS_PER_CALL), 0)
