"""Single step and the four hardware breakpoints, on a guest that runs natively and on one in real mode."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvmigrate.errors import ConfigError
from kvmigrate.kvm import exits
from kvmigrate.kvm.breakpoints import debug_registers
from kvmigrate.kvm.vcpu import Vcpu
from tests.backends import EMULATED

from .tiny import CODE, TinyVm, tiny

# Four nops, then the end; in 64-bit and in real mode the same bytes.
NOPS = "90 90 90 90 e6f4 ebfe"
NATIVE_ON_PVM = pytest.mark.xfail(
    Path("/sys/module/kvm_pvm").exists(),
    reason="kvm_pvm hands debug exceptions of code that runs natively to the guest, or to nobody",
    strict=True,
)
NO_BREAKPOINTS_EMULATED = pytest.mark.xfail(
    EMULATED, reason="QEMU 7.2's emulated SVM stops at no hardware breakpoint of a guest", strict=True
)
MODES = pytest.mark.parametrize(
    "mode", ["real_mode", "long_mode_ring0", pytest.param("long_mode_ring3", marks=NATIVE_ON_PVM)]
)


def run_with_stops(vm: TinyVm) -> list[int]:
    """The program counters at which the guest came back for debugging until its end."""
    stops: list[int] = []

    def on_debug(vcpu: Vcpu) -> None:
        assert vcpu.run_area.exit_reason == exits.EXIT_DEBUG
        stops.append(int(vcpu.run_area.debug.arch.pc))

    vm.on_debug = on_debug
    vm.run_until_end()
    return stops


@pytest.mark.kvm
@MODES
def test_single_step_stops_after_every_instruction(mode: str) -> None:
    with tiny() as vm:
        getattr(vm, mode)(NOPS)
        vm.cpu.set_guest_debug(single_step=True)
        assert run_with_stops(vm)[:4] == [CODE + n for n in (1, 2, 3, 4)]


@pytest.mark.kvm
@NO_BREAKPOINTS_EMULATED
@MODES
def test_four_breakpoints_stop_before_their_instructions(mode: str) -> None:
    with tiny() as vm:
        getattr(vm, mode)(NOPS)
        vm.cpu.set_guest_debug(breakpoints=[(CODE + n, "x", 1) for n in range(4)])
        # Each stop would be met again on going on, so it is taken away when it is hit.
        left = [CODE + n for n in range(4)]

        def on_debug(vcpu: Vcpu) -> None:
            left.remove(int(vcpu.run_area.debug.arch.pc))
            vcpu.set_guest_debug(breakpoints=[(address, "x", 1) for address in left])

        vm.on_debug = on_debug
        vm.run_until_end()
        assert left == []


@pytest.mark.kvm
@NATIVE_ON_PVM
@NO_BREAKPOINTS_EMULATED
def test_a_write_to_watched_memory_stops_after_the_write() -> None:
    with tiny() as vm:
        # mov byte [0x10000],0x5a; nop; then the end
        vm.long_mode_ring3("c60425000001005a 90 e6f4 ebfe")
        vm.cpu.set_guest_debug(breakpoints=[(0x10000, "w", 1)])
        assert run_with_stops(vm) == [CODE + 8]
        assert vm.memory.read(0x10000, 1) == b"\x5a"


@pytest.mark.kvm
def test_debugging_ends_when_it_is_turned_off() -> None:
    with tiny() as vm:
        vm.long_mode_ring0(NOPS)
        vm.cpu.set_guest_debug(single_step=True)
        vm.cpu.set_guest_debug()
        assert run_with_stops(vm) == []


def test_debug_registers_are_as_the_manual_has_them() -> None:
    registers = debug_registers([(0x1000, "x", 1), (0x2002, "w", 2), (0x3004, "rw", 4), (0x4008, "w", 8)])
    assert registers[:4] == [0x1000, 0x2002, 0x3004, 0x4008]
    assert registers[7] & 0xAA == 0xAA
    assert [registers[7] >> 16 + 4 * n & 0xF for n in range(4)] == [0b0000, 0b0101, 0b1111, 0b1001]


@pytest.mark.parametrize(
    "breakpoints",
    [[(0, "x", 1)] * 5, [(0, "r", 1)], [(0, "w", 3)], [(0, "x", 4)], [(0x1001, "w", 2)], [(1 << 64, "w", 1)]],
)
def test_a_breakpoint_that_cannot_be_is_refused(breakpoints: list[tuple[int, str, int]]) -> None:
    with pytest.raises(ConfigError):
        debug_registers(breakpoints)
