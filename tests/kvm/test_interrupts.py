"""Interrupts into a guest: injected by hand without an irqchip, by a line through the in-kernel chips, NMI and MSI."""

from __future__ import annotations

import pytest

from kvmigrate.kvm import exits
from kvmigrate.kvm.vcpu import Vcpu
from kvmigrate.kvm.vm_state import load_state, save_state
from kvmigrate.state.fidelity import Verdict

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


# mov al,0x34; out 0x43,al; mov al,0x9c; out 0x40,al; mov al,0x2e; out 0x40,al; sti; jmp $: channel 0 at 100 Hz
TICK = "b034e643 b09ce640b02ee640 fb ebfe"
# inc dword [0x500]; mov al,0x20; out 0x20,al; iret
COUNT = "66ff060005 b020e620 cf"


def nr_ticks(vm: TinyVm) -> int:
    return int.from_bytes(vm.memory.read(0x500, 4), "little")


def ticking(vm: TinyVm) -> None:
    """Run a guest that counts its timer's interrupts, until there are some; leave it paused."""
    with_handler(vm, 0x20, TICK)
    vm.memory.write(HANDLER, bytes.fromhex(COUNT))
    vm.vm.set_irqchip(0, vm.vm.get_irqchip(0) | {"irq_base": 0x20, "imr": 0xFE, "init4": 1})
    vm.start()
    vm.group.resume()
    wait_until(lambda: nr_ticks(vm) > 3)
    vm.group.pause()


@pytest.mark.parametrize("register", ["pic_master.last_irr", "ioapic.irr"])
def test_the_timer_goes_on_in_a_guest_that_was_saved_in_the_middle_of_a_tick(register: str) -> None:
    with tiny() as source, tiny() as target:
        ticking(source)
        body, vcpus = save_state(source.vm)
        chip, name = register.split(".")
        body[chip] = dict(body[chip]) | {name: body[chip][name] | 1}
        target.memory.write(0, source.memory.read(0, source.memory.size_bytes))
        fidelity = load_state(target.vm, body, vcpus)
        fidelity.require()
        assert register in [item.name for item in fidelity if item.verdict is Verdict.ADJUSTED]
        before = nr_ticks(target)
        target.start()
        target.group.resume()
        wait_until(lambda: nr_ticks(target) > before + 3)


def test_what_is_saved_shows_no_half_of_a_tick() -> None:
    with tiny() as vm:
        for chip, name in ((0, "last_irr"), (2, "irr")):
            vm.vm.set_irqchip(chip, vm.vm.get_irqchip(chip) | {name: 0b101})
        body, _ = save_state(vm.vm)
        assert (body["pic_master"]["last_irr"], body["ioapic"]["irr"]) == (0b100, 0b100)


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
