"""A boot loader's entry state laid over a vCPU's state after reset."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..kvm.vcpu import Vcpu
from ..state.section import Value

if TYPE_CHECKING:
    from ..boot.entry import EntryState


def set_entry(vcpu: Vcpu, entry: EntryState) -> None:
    """Let ``vcpu`` start as ``entry`` says. SREGS before REGS, so that RFLAGS and RIP are taken in the new mode."""
    vcpu.set_sregs(overlay(vcpu.get_sregs(), entry.sregs))
    vcpu.set_regs(overlay(vcpu.get_regs(), entry.regs))


def overlay(state: dict[str, Value], changes: dict[str, Value]) -> dict[str, Value]:
    """``state`` with ``changes`` laid over it, nested maps (segments, tables) field by field."""
    return state | {
        name: overlay(state[name], value) if isinstance(value, dict) else value for name, value in changes.items()
    }
