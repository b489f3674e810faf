"""A state that is unlike a fresh VM's, its way into a second VM, and the oracle that compares both."""

from __future__ import annotations

from typing import Any

from kvmigrate.kvm.clocks import without_vcpu_clocks, without_vm_clocks
from kvmigrate.kvm.vm_state import load_state, save_state
from kvmigrate.state.fidelity import Fidelity, Verdict
from kvmigrate.state.section import pack, unpack

from .tiny import TIMER_VECTOR, TinyVm

# loop: inc rcx; jmp loop, 64-bit
SPIN64 = "48ffc1 ebfb"
# The local APIC timer's modes, bits 17 and 18 of its LVT entry.
ONE_SHOT, DEADLINE = 0, 2 << 17

State = tuple[dict[str, Any], list[dict[str, Any]]]


def set_register_page(regs: bytearray, offset: int, value: int) -> None:
    regs[offset : offset + 4] = value.to_bytes(4, "little")


def with_timer(vm: TinyVm, mode: int, initial_count: int) -> None:
    regs = bytearray(vm.cpu.get_lapic()["regs"])
    set_register_page(regs, 0xF0, 0x1FF)
    set_register_page(regs, 0x320, TIMER_VECTOR | mode)
    set_register_page(regs, 0x3E0, 0xB)
    set_register_page(regs, 0x380, initial_count)
    set_register_page(regs, 0x390, initial_count)
    vm.cpu.set_lapic({"regs": bytes(regs)})


def set_vectors(vm: TinyVm, xmm: list[bytes]) -> None:
    """XMM, x87 and MXCSR through the XSAVE area: KVM_SET_FPU does not say in XSTATE_BV that they are in use."""
    area = bytearray(vm.cpu.get_xsave())
    area[24:28] = (0x1F80 | 1 << 13).to_bytes(4, "little")
    area[32:160] = b"".join(bytes([0x40 + n] * 10 + [0] * 6) for n in range(8))
    area[160:416] = b"".join(xmm)
    area[512] |= 3
    vm.cpu.set_xsave(bytes(area))


def make_unlike_reset(vm: TinyVm) -> None:
    """Give every part of the state a value that no fresh VM has."""
    cpu = vm.cpu
    vm.long_mode_ring3(SPIN64)
    names = ("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", *(f"r{n}" for n in range(8, 16)))
    cpu.set_regs(cpu.get_regs() | {name: 0x1111 * n + 7 for n, name in enumerate(names)})
    set_vectors(vm, [bytes([n] * 16) for n in range(16)])
    cpu.set_debugregs({"db": [0x1000, 0x2000, 0x3000, 0x4000], "dr6": 0xFFFF0FF1, "dr7": 0x400, "flags": 0})
    assert not cpu.set_msrs({0xC0000081: 0x23001000000000, 0xC0000082: 0xFFFF800000001000, 0x174: 0x10, 0x2FF: 0xC06})
    assert not cpu.set_msrs({0xC0000102: 0x7FFF00001000, 0x200: 0x80000006, 0x201: 0xFF80000800, 0x3B: 0x1234})
    with_timer(vm, ONE_SHOT, 0xFFFFFFFF)
    cpu.set_vcpu_events(cpu.get_vcpu_events() | {"nmi": {"injected": 0, "pending": 0, "masked": 1}})
    pic = vm.vm.get_irqchip(0) | {"irq_base": 0x20, "imr": 0xFB, "init4": 1}
    vm.vm.set_irqchip(0, pic)
    ioapic = vm.vm.get_irqchip(2)
    ioapic["redirtbl"][4] = {"bits": 0x10034}
    vm.vm.set_irqchip(2, ioapic)
    pit = vm.vm.get_pit2()
    pit["channels"][2] |= {"mode": 3, "count": 0x4A9, "rw_mode": 3}
    vm.vm.set_pit2(pit)


def over_the_wire(state: State) -> State:
    """As the target gets it: through msgpack, nothing shared with the source."""
    vm, vcpus = unpack(pack([state[0], state[1]]), "state")
    return vm, vcpus


def transfer(source: TinyVm, target: TinyVm) -> tuple[State, Fidelity]:
    saved = save_state(source.vm)
    vm, vcpus = over_the_wire(saved)
    return saved, load_state(target.vm, vm, vcpus)


def differences(one: Any, other: Any, where: str = "") -> list[str]:
    if isinstance(one, dict) and isinstance(other, dict):
        keys = sorted(one.keys() | other.keys())
        return [d for key in keys for d in differences(one.get(key), other.get(key), f"{where}.{key}")]
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        pairs = enumerate(zip(one, other, strict=True))
        return [d for n, (a, b) in pairs for d in differences(a, b, f"{where}[{n}]")]
    return [] if one == other else [where]


def oracle(saved: State, target: TinyVm) -> list[str]:
    """Where the target's state differs from the saved one, clocks left out."""
    vm, vcpus = save_state(target.vm)
    found = differences(without_vm_clocks(saved[0]), without_vm_clocks(vm), "vm")
    for n, (one, other) in enumerate(zip(saved[1], vcpus, strict=True)):
        found += differences(without_vcpu_clocks(one), without_vcpu_clocks(other), f"vcpu{n}")
    return found


def not_exact(fidelity: Fidelity) -> dict[str, Verdict]:
    return {item.name: item.verdict for item in fidelity}
