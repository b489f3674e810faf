"""All of one vCPU's state in memory: read by one call, set and read back by another, and the wire's map in between.

Source of a rule: [fc] Firecracker, src/vmm/src/vstate/vcpu.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

from .._core import ffi, lib
from ..errors import BadField, HostError, check
from ..record import replace
from ..state.section import Value
from .image import Image, Part
from .msr_table import table_of
from .msrs import WALL_CLOCKS, indices_to_save
from .steps import Outcome, Step, Steps
from .structs import Layout, layout, packed
from .vcpu import REQUESTS, Vcpu

STRUCTS = ("mp_state", "sregs", "regs", "xsave", "xcrs", "debugregs", "lapic", "nested_state", "msrs", "vcpu_events")
"""The items of a vCPU's state that are set by one struct each."""


class VcpuImage:
    """The state of ``vcpu``, with the MSRs ``indices``. Made while nobody waits, by :func:`image_of`."""

    def __init__(self, vcpu: Vcpu, indices: Sequence[int]) -> None:
        self._vcpu = vcpu
        self.msrs = table_of(tuple(indices))
        self.sregs = "sregs2" if vcpu.host.has_sregs2 else "sregs"
        self._nr_xcrs = int(vcpu.get_xcrs()["nr_xcrs"])
        self.has_nested_state = vcpu.host.nested_state_bytes > 0
        self.has_tsc_offset = vcpu.has_tsc_offset
        self.memory = Image(self._parts())
        self._make_blank()
        self._save = Steps([[*self._save_steps()]])
        self._loads = lru_cache(16)(self._load_steps)

    def key(self, item: str) -> str:
        """The key of ``item`` on the wire."""
        return self.sregs if item == "sregs" else item

    def _parts(self) -> Iterator[Part]:
        vcpu = self._vcpu
        yield Part("id", 4, lib.KMIG_FIELD_UNSIGNED)
        yield _struct("mp_state", layout("mp_state"))
        yield _struct("regs", layout("regs"))
        yield _struct(self.sregs, layout(self.sregs))
        yield Part("xsave", vcpu.xsave_bytes, lib.KMIG_FIELD_BYTES)
        yield Part("xcrs", layout("xcrs").size_bytes, lib.KMIG_FIELD_STRUCT, self._trimmed_xcrs())
        yield _struct("debugregs", layout("debugregs"))
        yield _struct("msrs", self.msrs.layout)
        yield _struct("lapic", layout("lapic_state"))
        if self.has_nested_state:
            size_at = ffi.offsetof("struct kvm_nested_state", "size")
            yield Part("nested_state", vcpu.host.nested_state_bytes, lib.KMIG_FIELD_BLOB, length_at=size_at)
        yield Part("tsc_khz", 4, lib.KMIG_FIELD_UNSIGNED)
        if self.has_tsc_offset:
            yield Part("tsc_offset", 8, lib.KMIG_FIELD_UNSIGNED)
        yield _struct("vcpu_events", layout("vcpu_events"))

    def _trimmed_xcrs(self) -> Layout:
        """The extended control registers that there are, of the 16 that the struct has room for."""
        whole = layout("xcrs")
        fields = [replace(field, count=self._nr_xcrs) if field.name == "xcrs" else field for field in whole.fields]
        return Layout(whole.size_bytes, fields)

    def _make_blank(self) -> None:
        blank = self.memory.blank
        blank("id", "__u32 *")[0] = self._vcpu.id
        self.msrs.init(blank("msrs", "char *"))
        if self.has_nested_state:
            blank("nested_state", "struct kvm_nested_state *").size = self._vcpu.host.nested_state_bytes
        self._offset_attr: Any = ffi.new("struct kvm_device_attr *")
        self._offset_attr.group, self._offset_attr.attr = lib.KVM_VCPU_TSC_CTRL, lib.KVM_VCPU_TSC_OFFSET
        if self.has_tsc_offset:
            self._offset_attr.addr = int(ffi.cast("uintptr_t", self.memory.saved("tsc_offset")))

    def _save_steps(self) -> Iterator[tuple[Step, int]]:
        """The order, on which no reader of the body depends, but what it holds does:

        1. MP_STATE: reading it takes a pending INIT or SIPI, which changes registers and the local APIC [fc].
        2. MSRs before the LAPIC: a deadline timer that fires in between is then saved as armed and due, and raised, and
           the guest sees one interrupt too many; the other way round it would be in neither and the guest might wait
           for ever (Firecracker #4618). Registers and XSAVE at any time.
        3. VCPU_EVENTS last: the other reads may change what is pending [fc].
        """
        fd = self._vcpu.fd
        yield self._get("mp_state")
        for chunk in self.msrs.chunks:
            # It stops at the first that cannot be read, and returns how many it read.
            yield Step(fd, lib.KVM_GET_MSRS, self.memory.saved("msrs") + chunk.at), chunk.nr_msrs
        for item in ("regs", "sregs", "xsave", "xcrs", "debugregs", "lapic"):
            yield self._get(item)
        if self.has_nested_state:
            yield self._get("nested_state")
        if self.has_tsc_offset:
            yield Step(fd, lib.KVM_GET_DEVICE_ATTR, self._offset_attr), 0
        yield self._get("vcpu_events")

    def _requests(self, item: str) -> tuple[int, int]:
        if item == "xsave" and self._vcpu.xsave_bytes > ffi.sizeof("struct kvm_xsave"):
            return lib.KVM_GET_XSAVE2, lib.KVM_SET_XSAVE
        return REQUESTS["lapic_state" if item == "lapic" else self.key(item)]

    def _get(self, item: str) -> tuple[Step, int]:
        return Step(self._vcpu.fd, self._requests(item)[0], self.memory.saved(self.key(item))), 0

    def save(self) -> bytes | None:
        """Read the vCPU, which must be parked: the body of its section, a msgpack map. None when other MSRs can be read
        now than when this was made. Raises :class:`HostError`."""
        self.memory.clear()
        [outcome] = self._save.run()
        check(outcome.rc, f"reading the state of vCPU {self._vcpu.id}")
        if not outcome.exact or self._saved_nr_xcrs() != self._nr_xcrs:
            return None
        self.memory.saved("tsc_khz", "__u32 *")[0] = self._vcpu.get_tsc_khz()
        return self.memory.encode()

    def _saved_nr_xcrs(self) -> int:
        return int(self.memory.saved("xcrs", "struct kvm_xcrs *").nr_xcrs)

    def take(self, body: Value) -> bool:
        """Fill it from a section's body, which is hostile: a map, or one in msgpack. False for one of another shape
        than this host's own: with other MSRs, another size of XSAVE, or damaged."""
        try:
            self.memory.decode(packed(body, "a vCPU"), "a vCPU")
        except BadField:
            return False
        return self._saved_nr_xcrs() == self._nr_xcrs

    def ask_no_time(self) -> None:
        """Take requests for the time, which KVM has answered, out of what is to be found after a load."""
        table = self.memory.saved("msrs")
        for index in WALL_CLOCKS:
            if self.msrs.get(table, index):
                self.msrs.set(table, index, 0)

    def load(self, items: Sequence[str]) -> list[Outcome]:
        """Set ``items``, of :data:`STRUCTS`, one after another as they were taken, and read each back right after it.
        """
        self.msrs.ask(self.memory.saved("msrs"), [chunk.nr_written for chunk in self.msrs.chunks])
        self.msrs.ask(self.memory.held("msrs"), [chunk.nr_compared for chunk in self.msrs.chunks])
        return self._loads(tuple(items)).run()

    def _load_steps(self, items: Sequence[str]) -> Steps:
        return Steps([[*self._steps_of(item)] for item in items])

    def _steps_of(self, item: str) -> Iterator[tuple[Step, int]]:
        if item == "msrs":
            yield from self._msr_steps()
            return
        key, fd = self.key(item), self._vcpu.fd
        get, put = self._requests(item)
        saved, held, size_bytes = self.memory.saved(key), self.memory.held(key), self.memory.parts[key].size_bytes
        if item == "lapic":
            # Twice: the kernel works out the processor priority before it counts the interrupts in service, so that the
            # first time it is that of none (kvm_apic_set_state: apic_update_ppr() before kvm_apic_update_apicv()).
            yield Step(fd, put, saved), 0
        yield Step(fd, put, saved), 0
        yield Step(fd, get, held, held, saved, size_bytes), 0

    def _msr_steps(self) -> Iterator[tuple[Step, int]]:
        """All are written before any is read back: writing one may change another."""
        fd, saved, held = self._vcpu.fd, self.memory.saved("msrs"), self.memory.held("msrs")
        for chunk in self.msrs.chunks:
            yield Step(fd, lib.KVM_SET_MSRS, saved + chunk.at), chunk.nr_written
        for chunk in self.msrs.chunks:
            at = chunk.entries_at
            check_it = (held + at, saved + at, chunk.compared_bytes)
            yield Step(fd, lib.KVM_GET_MSRS, held + chunk.at, *check_it), chunk.nr_compared


def _struct(key: str, of: Layout) -> Part:
    return Part(key, of.size_bytes, lib.KMIG_FIELD_STRUCT, of)


def image_of(vcpu: Vcpu) -> VcpuImage:
    """The image of ``vcpu``, which must be parked or never have run. Which MSRs can be read is found out for it once,
    which a machine has done while nobody waits. Raises :class:`HostError`."""
    image: VcpuImage | None = vcpu.image
    if image is None:
        vcpu.image = image = VcpuImage(vcpu, indices_to_save(vcpu))
    return image


def save_image(vcpu: Vcpu) -> bytes:
    """Read all of ``vcpu``, which must be parked: the body of its section, a msgpack map. Raises :class:`HostError`."""
    body = image_of(vcpu).save()
    if body is None:
        vcpu.image = None
        body = image_of(vcpu).save()
    if body is None:
        raise HostError(f"reading vCPU {vcpu.id}, whose list of MSRs changes while it stands still", errno.EAGAIN)
    return body
