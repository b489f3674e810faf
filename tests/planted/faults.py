"""Faults in kvmigrate's Python, planted by the launcher before the command line runs; those in C are in csrc."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from kvmigrate.devices.serial import Serial
from kvmigrate.kvm import vcpu_state, vm_state
from kvmigrate.kvm.steps import Outcome
from kvmigrate.kvm.vcpu import Vcpu
from kvmigrate.kvm.vcpu_image import VcpuImage
from kvmigrate.migration import incoming
from kvmigrate.migration.incoming import Incoming, State
from kvmigrate.migration.source import Source
from kvmigrate.precopy.rounds import PreCopy
from kvmigrate.state.frame import FrameKind
from kvmigrate.state.section import Section, pack, unpack

from ..losing import msr_is_lost

LOST_MSR = 0x277
"""IA32_PAT: every guest has a value in it that is not 0."""
SSE2 = 1 << 26


def plant(name: str) -> None:
    """Break kvmigrate in the way called ``name``, or its host."""
    (FAULTS | LOSSES)[name]()


def _replace(owner: Any, name: str, value: object) -> None:
    assert hasattr(owner, name), f"{owner} has no {name} any more: plant the fault elsewhere"
    setattr(owner, name, value)


def _skip(item: str) -> Callable[[], None]:
    """Leave one item of a vCPU's state out of the load."""

    def break_it() -> None:
        assert item in vcpu_state.ORDER, f"{item} is no step of the load any more"
        _replace(vcpu_state, "ORDER", tuple(step for step in vcpu_state.ORDER if step != item))

    return break_it


def _forget_msr() -> None:
    """Leave one MSR out of the save."""

    save = VcpuImage.save

    def forgetful(self: Any) -> bytes | None:
        packed = save(self)
        body = unpack(packed, "a vCPU") if packed else None
        if body is not None:
            del body["msrs"]["MSR_LSTAR"]
        return body and pack(body)

    _replace(VcpuImage, "save", forgetful)


def _lose_msr() -> None:
    """Be a host that takes an MSR and does not keep it."""
    for owner, name, value in msr_is_lost(LOST_MSR):
        _replace(owner, name, value)


def _lose_feature() -> None:
    """Be a host whose CPU lacks SSE2."""
    offer = Vcpu.offer_cpuid

    def less(self: Any) -> None:
        offer(self)
        self.offered_cpuid = [
            entry | {"edx": entry["edx"] & ~SSE2} if entry["function"] == 1 else entry for entry in self.offered_cpuid
        ]

    _replace(Vcpu, "offer_cpuid", less)


def _stale_registers() -> None:
    """Load general registers that are one update behind."""
    load = VcpuImage.load

    def stale(self: Any, items: Sequence[str]) -> list[Outcome]:
        if "regs" in items:
            regs = self.memory.saved("regs", "struct kvm_regs *")
            regs.r15 = max(regs.r15 - 1, 0)
        return load(self, items)

    _replace(VcpuImage, "load", stale)


def _skip_chip(chip: str) -> Callable[[], None]:
    """Leave one of the VM's chips out of the load."""

    def break_it() -> None:
        assert chip in vm_state.CHIP_ORDER, f"{chip} is no step of the load any more"
        _replace(vm_state, "CHIP_ORDER", tuple(step for step in vm_state.CHIP_ORDER if step != chip))

    return break_it


def _skip_serial() -> None:
    """Leave the UART as it is after reset."""

    def nothing(self: Serial, section: Section) -> None:
        _replace(self, "save", lambda: dict(section.body))

    _replace(Serial, "load_section", nothing)


def _skip_last_round() -> None:
    """Send nothing of what was written since the last round of the running guest."""
    _replace(PreCopy, "last_round", lambda self: self.records[-1])


def _resume_after_lost_answer() -> None:
    """Resume the guest at the source when COMMIT was sent and its answer lost."""
    commit = Source._commit

    def hasty(self: Any, channel: Any, switched: Any) -> Any:
        answer = commit(self, channel, switched)
        if answer is None:
            self._committed = False
            raise ConnectionError("the answer was lost")
        return answer

    _replace(Source, "_commit", hasty)


def _run_before_commit() -> None:
    """Run the guest at the destination once everything has arrived, without waiting for COMMIT."""
    end = Incoming._end

    def hasty(self: Incoming, frame: Any) -> State:
        state = end(self, frame)
        self.run_guest()
        return state

    steps: dict[Any, Any] = dict(incoming.STEPS)
    steps[State.LOADED, FrameKind.END] = hasty
    _replace(incoming, "STEPS", steps)


LOSSES: dict[str, Callable[[], None]] = {"lose-msr": _lose_msr, "lose-feature": _lose_feature}
"""What is wrong with a host, and not with kvmigrate."""
FAULTS: dict[str, Callable[[], None]] = {
    "skip-registers": _skip("regs"),
    "stale-registers": _stale_registers,
    "stale-xmm": _skip("xsave"),
    "skip-xcr0": _skip("xcrs"),
    "skip-lapic": _skip("lapic"),
    "skip-debug-registers": _skip("debugregs"),
    "skip-mp-state": _skip("mp_state"),
    "forget-msr": _forget_msr,
    "skip-msrs": _skip("msrs"),
    "skip-pit": _skip_chip("pit2"),
    "skip-pic": _skip_chip("pic_master"),
    "skip-ioapic": _skip_chip("ioapic"),
    "skip-uart": _skip_serial,
    "skip-last-round": _skip_last_round,
    "resume-after-lost-answer": _resume_after_lost_answer,
    "run-before-commit": _run_before_commit,
}
