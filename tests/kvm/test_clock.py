"""The guest's clocks across a move: the formula, the frequency's verdicts, and timers that were armed."""

from __future__ import annotations

import pytest

from kvmigrate.kvm.clock import ClockBase
from kvmigrate.kvm.vm_state import load_state, save_state
from kvmigrate.state.fidelity import Fidelity, Verdict

from .moving import DEADLINE, ONE_SHOT, not_exact, over_the_wire, with_timer
from .test_interrupts import answered, with_handler
from .tiny import TIMER_VECTOR, TinyVm, tiny, wait_until


def test_the_tsc_goes_on_by_exactly_the_time_that_kvmclock_went_on() -> None:
    """Source: guest TSC = 10**12 + 5·10**9 at kvmclock 7 s. Here kvmclock is 7 s + 2 ms, the host TSC is 4·10**6."""
    base = ClockBase(
        saved_clock_ns=7 * 10**9, saved_host_tsc=10**12, clock_ns=7 * 10**9 + 2 * 10**6, host_tsc=4 * 10**6
    )
    offset = base.moved_offset(5 * 10**9, 2_000_000)
    assert (4 * 10**6 + offset) % (1 << 64) == 10**12 + 5 * 10**9 + 2 * 2_000_000


def test_an_offset_below_zero_wraps_as_the_kernels_does() -> None:
    base = ClockBase(0, 0, 0, 10**12)
    assert base.moved_offset(0, 1_000_000) == (1 << 64) - 10**12


def test_a_tsc_that_lagged_when_its_offset_was_read_is_moved_on_and_all_others_with_it() -> None:
    base = ClockBase(saved_clock_ns=0, saved_host_tsc=10**12, clock_ns=0, host_tsc=5)
    second = base.not_back(0, 10**12 - 7, 10**6).not_back(0, 10**12 + 3000, 10**6).not_back(0, 10**12 + 10, 10**6)
    assert second.ahead == 3000
    assert [second.moved_offset(offset, 10**6) - base.moved_offset(offset, 10**6) for offset in (100, 200)] == [
        3000
    ] * 2


def test_an_offset_that_has_nothing_to_do_with_the_tsc_moves_nothing() -> None:
    base = ClockBase(0, 10**12, 0, 5)
    assert base.not_back(0, 10**12 + 2 * 10**9, 10**6) == base
    assert base.not_back(0, 0, 10**6) == base


def load_with_khz(factor: float) -> Fidelity:
    with tiny() as source, tiny() as target:
        vm, vcpus = over_the_wire(save_state(source.vm))
        vcpus[0]["tsc_khz"] = int(vcpus[0]["tsc_khz"] * factor)
        return load_state(target.vm, vm, vcpus)


@pytest.mark.kvm
def test_a_tsc_of_nearly_the_same_frequency_is_adjusted_and_another_one_scaled_or_refused() -> None:
    assert not_exact(load_with_khz(1.0001))["vcpu0.tsc_khz"] is Verdict.ADJUSTED
    other = load_with_khz(0.5)
    with tiny() as vm:
        can_scale = vm.cpu.host.can_scale_tsc
    assert ("vcpu0.tsc_khz" in other.exact_names()) == can_scale
    assert (not_exact(other).get("vcpu0.tsc_khz") is Verdict.REFUSED) == (not can_scale)


@pytest.mark.kvm
@pytest.mark.parametrize("mode", [ONE_SHOT, DEADLINE], ids=["one_shot", "tsc_deadline"])
def test_a_timer_that_was_armed_at_the_save_fires_after_the_load(mode: int) -> None:
    with tiny() as source, tiny() as target:
        arm(source, mode)
        target.memory.write(0, source.memory.read(0, source.memory.size_bytes))
        vm, vcpus = over_the_wire(save_state(source.vm))
        load_state(target.vm, vm, vcpus).require()
        target.start()
        target.group.resume()
        wait_until(lambda: answered(target))
        assert not source.out


def arm(vm: TinyVm, mode: int) -> None:
    """A halted guest, whose local APIC's timer fires in about 100 ms."""
    with_handler(vm, TIMER_VECTOR)
    with_timer(vm, mode, 50_000_000 if mode == ONE_SHOT else 0)
    if mode == DEADLINE:
        now = vm.cpu.get_msrs([0x10])[0x10]
        assert not vm.cpu.set_msrs({0x6E0: now + 100 * vm.cpu.get_tsc_khz()})
