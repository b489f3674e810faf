"""A guest that is stopped inside an interrupt handler is restored inside it."""

from __future__ import annotations

import pytest

from kvmigrate.kvm.cpuid import guest_cpuid
from kvmigrate.kvm.system import System
from kvmigrate.kvm.vcpu import Vcpu
from kvmigrate.kvm.vm import Vm
from kvmigrate.kvm.vm_state import load_state, save_state

pytestmark = pytest.mark.kvm

ISR, PPR, SPURIOUS = 0x100, 0xA0, 0xF0
VECTOR = 0x45


def new_vm(system: System) -> tuple[Vm, Vcpu]:
    vm = system.create_vm()
    vm.set_tss_addr()
    vm.set_identity_map_addr()
    vm.create_irqchip()
    vm.create_pit()
    vcpu = vm.create_vcpu(0)
    vcpu.set_cpuid2(guest_cpuid(system.supported_cpuid(), 0, 1))
    return vm, vcpu


def test_priority_of_an_interrupt_in_service_is_restored() -> None:
    with System.open() as system:
        source, vcpu = new_vm(system)
        destination, other = new_vm(system)
    try:
        body, [state] = save_state(source)
        registers = bytearray(vcpu.get_lapic()["regs"])
        registers[SPURIOUS + 1] |= 1
        registers[ISR + VECTOR // 32 * 16 + VECTOR % 32 // 8] |= 1 << VECTOR % 8
        registers[PPR] = VECTOR & 0xF0
        state["lapic"] = {"regs": bytes(registers)}
        load_state(destination, body, [state]).require()
        assert other.get_lapic()["regs"][PPR] == VECTOR & 0xF0
    finally:
        source.close()
        destination.close()
