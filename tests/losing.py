"""A host that takes an MSR and does not keep it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from kvmigrate.kvm.steps import Outcome
from kvmigrate.kvm.vcpu import Vcpu
from kvmigrate.kvm.vcpu_image import VcpuImage


def msr_is_lost(index: int) -> Iterator[tuple[type, str, Any]]:
    """What has to stand in place of which method for the host to be one that loses the MSR ``index``."""
    set_msrs, load = Vcpu.set_msrs, VcpuImage.load

    def careless(self: Vcpu, values: Mapping[int, int]) -> list[int]:
        return set_msrs(self, {at: value for at, value in values.items() if at != index})

    def careless_load(self: VcpuImage, items: Sequence[str]) -> list[Outcome]:
        before = self._vcpu.get_msrs([index])
        outcomes = load(self, items)
        set_msrs(self._vcpu, before)
        kept = before[index] == self.msrs.entry(self.memory.msrs, index).data
        return [Outcome(o.rc, o.exact and (kept or item != "msrs")) for item, o in zip(items, outcomes, strict=True)]

    yield Vcpu, "set_msrs", careless
    yield VcpuImage, "load", careless_load
