"""Interrupts into a guest: injected by hand without an irqchip, by a line through the in-kernel chips, NMI and MSI."""

from __future__ import annotations

import pytest

from kvmigrate.kvm import exits
from kvmigrate.kvm.vcpu import Vcpu

from .tiny import TinyVm, tiny, wait_until

pytestmark = pytest.mark.kvm

HANDLER = 0x5000
# out 0x10,al with al=0x99; iret
ANSWER = "b099 e610 cf"
# sti; loop: hlt; jmp loop
WAIT = "fb f4 ebfd"


def with_handler(vm: TinyVm, vector: int, code: str = WAIT) -> None:
    vm.real_mode(code)
    vm.memory.write(HANDLER, bytes.fromhex(ANSWER))
    vm.memory.write(4 * vector, HANDLER.to_bytes(4, "little"))


def answered(vm: TinyVm) -> bool:
    return (0x10, b"\x99") in vm.out


def test_an_interrupt_is_injected_into_a_halted_guest_without_an_irqchip() -> None:
    with tiny(irqchip=False) as vm:
        with_handler(vm, 0x21)

        def answer(vcpu: Vcpu) -> None:
            if vcpu.run_area.exit_reason == exits.EXIT_HLT:
                assert vcpu.run_area.ready_for_interrupt_injection and vcpu.run_area.if_flag
                vcpu.interrupt(0x21)
            else:
                vm.default_exit(vcpu)

        vm.on_exit = answer
        vm.start()
        vm.group.resume()
        wait_until(lambda: answered(vm) or bool(vm.errors))
        assert not vm.errors


def test_the_guest_says_when_it_can_take_an_interrupt() -> None:
    with tiny(irqchip=False) as vm:
        # ten nops with interrupts off, then sti and a loop
        with_handler(vm, 0x21, "90" * 10 + "fb 90 ebfd")
        reasons: list[int] = []

        def answer(vcpu: Vcpu) -> None:
            reasons.append(vcpu.run_area.exit_reason)
            if vcpu.run_area.exit_reason == exits.EXIT_IRQ_WINDOW_OPEN:
                vcpu.run_area.request_interrupt_window = 0
                vcpu.interrupt(0x21)
            else:
                vm.default_exit(vcpu)

        vm.on_exit = answer
        vm.cpu.run_area.request_interrupt_window = 1
        vm.start()
        vm.group.resume()
        wait_until(lambda: answered(vm) or bool(vm.errors))
        assert not vm.errors and reasons[0] == exits.EXIT_IRQ_WINDOW_OPEN


def through_the_pic(vm: TinyVm) -> None:
    with_handler(vm, 0x24)
    vm.vm.set_irqchip(0, vm.vm.get_irqchip(0) | {"irq_base": 0x20, "imr": 0, "init4": 1, "auto_eoi": 1})


def test_an_interrupt_line_reaches_the_guest_through_the_in_kernel_chips() -> None:
    with tiny() as vm:
        through_the_pic(vm)
        vm.start()
        vm.group.resume()
        wait_until(lambda: vm.cpu.nr_entries > 0)
        vm.vm.irq_line(4, True)
        vm.vm.irq_line(4, False)
        wait_until(lambda: answered(vm))


def test_an_interrupt_that_came_while_paused_is_in_what_was_saved() -> None:
    from kvmigrate.kvm.vm_state import load_state, save_state

    with tiny() as source, tiny() as target:
        through_the_pic(source)
        source.start()
        source.group.resume()
        wait_until(lambda: source.cpu.nr_entries > 0)
        source.group.pause()
        source.vm.irq_line(4, True)
        source.vm.irq_line(4, False)
        vm, vcpus = save_state(source.vm)
        assert vm["pic_master"]["irr"] & 1 << 4
        target.memory.write(0, source.memory.read(0, source.memory.size_bytes))
        load_state(target.vm, vm, vcpus).require()
        target.start()
        target.group.resume()
        wait_until(lambda: answered(target))
        assert not answered(source)


def test_an_nmi_reaches_a_halted_guest() -> None:
    with tiny() as vm:
        with_handler(vm, 2)
        vm.start()
        vm.group.resume()
        wait_until(lambda: vm.cpu.nr_entries > 0)
        vm.group.pause()
        vm.cpu.nmi()
        vm.group.resume()
        wait_until(lambda: answered(vm))


def test_a_message_signalled_interrupt_reaches_the_local_apic() -> None:
    with tiny() as vm:
        with_handler(vm, 0x41)
        regs = bytearray(vm.cpu.get_lapic()["regs"])
        regs[0xF0:0xF4] = (0x1FF).to_bytes(4, "little")
        vm.cpu.set_lapic({"regs": bytes(regs)})
        vm.start()
        vm.group.resume()
        wait_until(lambda: vm.cpu.nr_entries > 0)
        assert vm.vm.signal_msi(0xFEE00000, 0x41)
        wait_until(lambda: answered(vm))


def test_translate_follows_the_guests_page_tables() -> None:
    with tiny() as vm:
        vm.long_mode_ring3("ebfe")
        found = vm.cpu.translate(0x1234)
        assert found["valid"] and found["physical_address"] == 0x1234
