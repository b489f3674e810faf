"""What the images of all vCPUs of one kind have in common: where each part lies, and the ioctls that read or set it.

Worked out once per process and kind: for one vCPU it takes as long as setting its state. Source of a rule: [fc]
Firecracker, src/vmm/src/vstate/vcpu.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache

from .._core import ffi, lib
from ..record import dataclass, replace
from .image import Part, Shape
from .msr_table import MsrTable
from .steps import Step, Steps
from .structs import Layout, layout
from .vcpu import REQUESTS


@dataclass(frozen=True, slots=True)
class Kind:
    """All that decides how the state of a vCPU lies in memory: ``sregs`` is ``sregs2`` where the kernel has that, and
    ``nested_state_bytes`` 0 where it has no such state."""

    sregs: str
    nr_xcrs: int
    xsave_bytes: int
    nested_state_bytes: int
    has_tsc_offset: bool
    msrs: MsrTable


class VcpuShape:
    """The parts of a vCPU of ``kind``, and the steps on them. Made by :func:`shape_of`."""

    def __init__(self, kind: Kind) -> None:
        self.kind = kind
        self.memory = Shape(self._parts())
        self._make_blank()
        self.save = Steps([[*self._save_steps()]])
        self.loads = lru_cache(16)(self._load_steps)

    def key(self, item: str) -> str:
        """The key of ``item`` on the wire."""
        return self.kind.sregs if item == "sregs" else item

    def _parts(self) -> Iterator[Part]:
        kind = self.kind
        yield Part("id", 4, lib.KMIG_FIELD_UNSIGNED)
        yield _struct("mp_state", layout("mp_state"))
        yield _struct("regs", layout("regs"))
        yield _struct(kind.sregs, layout(kind.sregs))
        yield Part("xsave", kind.xsave_bytes, lib.KMIG_FIELD_BYTES)
        yield Part("xcrs", layout("xcrs").size_bytes, lib.KMIG_FIELD_STRUCT, self._trimmed_xcrs())
        yield _struct("debugregs", layout("debugregs"))
        yield _struct("msrs", kind.msrs.layout)
        yield _struct("lapic", layout("lapic_state"))
        if kind.nested_state_bytes:
            size_at = ffi.offsetof("struct kvm_nested_state", "size")
            yield Part("nested_state", kind.nested_state_bytes, lib.KMIG_FIELD_BLOB, length_at=size_at)
        yield Part("tsc_khz", 4, lib.KMIG_FIELD_UNSIGNED)
        if kind.has_tsc_offset:
            yield Part("tsc_offset", 8, lib.KMIG_FIELD_UNSIGNED)
        yield _struct("vcpu_events", layout("vcpu_events"))

    def _trimmed_xcrs(self) -> Layout:
        """The extended control registers that there are, of the 16 that the struct has room for."""
        whole = layout("xcrs")
        fields = [replace(field, count=self.kind.nr_xcrs) if field.name == "xcrs" else field for field in whole.fields]
        return Layout(whole.size_bytes, fields)

    def _make_blank(self) -> None:
        self.kind.msrs.init(self.memory.blank("msrs", "char *"))
        if self.kind.nested_state_bytes:
            self.memory.blank("nested_state", "struct kvm_nested_state *").size = self.kind.nested_state_bytes

    def _save_steps(self) -> Iterator[tuple[Step, int]]:
        """The order, on which no reader of the body depends, but what it holds does:

        1. MP_STATE: reading it takes a pending INIT or SIPI, which changes registers and the local APIC [fc].
        2. MSRs before the LAPIC: a deadline timer that fires in between is then saved as armed and due, and raised, and
           the guest sees one interrupt too many; the other way round it would be in neither and the guest might wait
           for ever (Firecracker #4618). Registers and XSAVE at any time.
        3. VCPU_EVENTS last: the other reads may change what is pending [fc].
        """
        yield self._get("mp_state")
        for chunk in self.kind.msrs.chunks:
            # It stops at the first that cannot be read, and returns how many it read.
            yield Step(lib.KVM_GET_MSRS, self.memory.saved_at("msrs") + chunk.at), chunk.nr_msrs
        for item in ("regs", "sregs", "xsave", "xcrs", "debugregs", "lapic"):
            yield self._get(item)
        if self.kind.nested_state_bytes:
            yield self._get("nested_state")
        if self.kind.has_tsc_offset:
            yield Step(lib.KVM_GET_DEVICE_ATTR, self.memory.apart_at), 0
        yield self._get("vcpu_events")

    def _requests(self, item: str) -> tuple[int, int]:
        if item == "xsave" and self.kind.xsave_bytes > ffi.sizeof("struct kvm_xsave"):
            return lib.KVM_GET_XSAVE2, lib.KVM_SET_XSAVE
        return REQUESTS["lapic_state" if item == "lapic" else self.key(item)]

    def _get(self, item: str) -> tuple[Step, int]:
        return Step(self._requests(item)[0], self.memory.saved_at(self.key(item))), 0

    def _load_steps(self, items: Sequence[str]) -> Steps:
        return Steps([[*self._steps_of(item)] for item in items])

    def _steps_of(self, item: str) -> Iterator[tuple[Step, int]]:
        if item == "msrs":
            yield from self._msr_steps()
            return
        key = self.key(item)
        get, put = self._requests(item)
        saved, held = self.memory.saved_at(key), self.memory.held_at(key)
        if item == "lapic":
            # Twice: the kernel works out the processor priority before it counts the interrupts in service, so that the
            # first time it is that of none (kvm_apic_set_state: apic_update_ppr() before kvm_apic_update_apicv()).
            yield Step(put, saved), 0
        yield Step(put, saved), 0
        yield Step(get, held, held, saved, self.memory.parts[key].size_bytes), 0

    def _msr_steps(self) -> Iterator[tuple[Step, int]]:
        """All are written before any is read back: writing one may change another."""
        saved, held = self.memory.saved_at("msrs"), self.memory.held_at("msrs")
        for chunk in self.kind.msrs.chunks:
            yield Step(lib.KVM_SET_MSRS, saved + chunk.at), chunk.nr_written
        for chunk in self.kind.msrs.chunks:
            check_it = (held + chunk.entries_at, saved + chunk.entries_at, chunk.compared_bytes)
            yield Step(lib.KVM_GET_MSRS, held + chunk.at, *check_it), chunk.nr_compared


def _struct(key: str, of: Layout) -> Part:
    return Part(key, of.size_bytes, lib.KMIG_FIELD_STRUCT, of)


@lru_cache(8)
def shape_of(kind: Kind) -> VcpuShape:
    """The shape of ``kind``: all vCPUs of most hosts are of one."""
    return VcpuShape(kind)
