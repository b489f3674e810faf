"""All of one vCPU's state in memory: read by one call, set and read back by another, and the wire's map in between."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from typing import Any

from .._core import ffi, lib
from ..errors import BadField, HostError, check
from ..state.section import Value
from . import msr_names as msr
from .image import Image
from .msr_table import table_of
from .msrs import WALL_CLOCKS, indices_to_save
from .steps import Outcome
from .structs import packed
from .vcpu import Vcpu
from .vcpu_shape import Kind, VcpuShape, shape_of

STRUCTS = ("mp_state", "sregs", "regs", "xsave", "xcrs", "debugregs", "lapic", "nested_state", "msrs", "vcpu_events")
"""The items of a vCPU's state that are set by one struct each."""
APART = (*WALL_CLOCKS, msr.IA32_TSC, msr.IA32_TSC_DEADLINE)
"""MSRs that a load does not just write and read back."""


class _Memory(Image):
    """The image's memory, of the vCPU ``number``, and pointers to what of it is looked at while a guest waits."""

    def __init__(self, shape: VcpuShape, number: int) -> None:
        super().__init__(shape.memory)
        self._own_number = number
        self.number = self.saved("id", "__u32 *")
        self.tsc_khz = self.saved("tsc_khz", "__u32 *")
        self.tsc_offset: Any = self.saved("tsc_offset", "__u64 *") if shape.kind.has_tsc_offset else None
        self.xcrs = self.saved("xcrs", "struct kvm_xcrs *")
        self.msrs = self.saved("msrs")
        if shape.kind.has_tsc_offset:
            attr = self.apart("struct kvm_device_attr *")
            attr.group, attr.attr = lib.KVM_VCPU_TSC_CTRL, lib.KVM_VCPU_TSC_OFFSET
            attr.addr = int(ffi.cast("uintptr_t", self.tsc_offset))

    def clear(self) -> None:
        super().clear()
        self.number[0] = self._own_number


class VcpuImage:
    """The state of ``vcpu``, with the MSRs ``indices``. Made while nobody waits, by :func:`image_of`."""

    def __init__(self, vcpu: Vcpu, indices: Sequence[int]) -> None:
        self._vcpu = vcpu
        self.msrs = table_of(tuple(indices))
        self.sregs = "sregs2" if vcpu.host.has_sregs2 else "sregs"
        self._nr_xcrs = vcpu.get_nr_xcrs()
        nested_state_bytes = vcpu.host.nested_state_bytes
        self.has_nested_state = nested_state_bytes > 0
        self._shape = shape_of(
            Kind(self.sregs, self._nr_xcrs, vcpu.xsave_bytes, nested_state_bytes, vcpu.has_tsc_offset, self.msrs)
        )
        self.memory = _Memory(self._shape, vcpu.id)
        self._saved_apart = [(i, self.msrs.entry(self.memory.msrs, i)) for i in APART if i in self.msrs]
        self._asked = [entry for i, entry in self._saved_apart if i in WALL_CLOCKS]
        held = self.memory.held("msrs")
        self._calls = [*self.msrs.calls(self.memory.msrs), *self.msrs.calls(held, compared=True)]

    def key(self, item: str) -> str:
        """The key of ``item`` on the wire."""
        return self._shape.key(item)

    def save(self) -> bytes | None:
        """Read the vCPU, which must be parked: the body of its section, a msgpack map. None when other MSRs can be read
        now than when this was made. Raises :class:`HostError`."""
        self.memory.clear()
        [outcome] = self._shape.save.run(self._vcpu.fd, self.memory.memory)
        check(outcome.rc, f"reading the state of vCPU {self._vcpu.id}")
        if not outcome.exact or self._saved_nr_xcrs() != self._nr_xcrs:
            return None
        self.memory.tsc_khz[0] = self._vcpu.get_tsc_khz()
        return self.memory.encode()

    def _saved_nr_xcrs(self) -> int:
        return int(self.memory.xcrs.nr_xcrs)

    def take(self, body: Value) -> bool:
        """Fill it from a section's body, which is hostile: a map, or one in msgpack. False for one of another shape
        than this host's own: with other MSRs, another size of XSAVE, or damaged."""
        try:
            self.memory.decode(packed(body, "a vCPU"), "a vCPU")
        except BadField:
            return False
        return self._saved_nr_xcrs() == self._nr_xcrs

    def msrs_apart(self) -> dict[int, int]:
        """What was saved of the MSRs :data:`APART`, as far as there are such."""
        return {index: int(entry.data) for index, entry in self._saved_apart}

    def ask_no_time(self) -> None:
        """Take requests for the time, which KVM has answered, out of what is to be found after a load."""
        for entry in self._asked:
            entry.data = 0

    def load(self, items: Sequence[str]) -> list[Outcome]:
        """Set ``items``, of :data:`STRUCTS`, one after another as they were taken, and read each back right after it.
        """
        for call, nr_msrs in self._calls:
            call.nmsrs = nr_msrs
        return self._shape.loads(tuple(items)).run(self._vcpu.fd, self.memory.memory)


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
