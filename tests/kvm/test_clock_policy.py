"""What a guest's clocks make of a move: they go on, by the time that passed or without it, and never back."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack

import pytest

from kvmigrate.kvm.vm_state import load_state, save_state
from kvmigrate.state.fidelity import Fidelity, Verdict

from .moving import State, not_exact, over_the_wire
from .pvclock import PvClock, guest_clock_ns, run_a_while, with_kvmclock
from .tiny import TinyVm, tiny

pytestmark = pytest.mark.kvm

AWAY_S = 0.3
SLACK_NS = 100_000_000
"""What a busy machine may take to get from one line to the next here."""
NR_CYCLES = 30


def load(saved: State, source: TinyVm, target: TinyVm, *, count: bool = False) -> Fidelity:
    target.memory.write(0, source.memory.read(0, source.memory.size_bytes))
    return load_state(target.vm, *over_the_wire(saved), count_downtime=count)


def time_gone_by(*, count: bool) -> tuple[int, int]:
    """By how much kvmclock went on over a save, AWAY_S and a load; and the host's own clock meanwhile."""
    with tiny() as source, tiny() as target:
        before = time.monotonic_ns()
        saved = save_state(source.vm)
        time.sleep(AWAY_S)
        load(saved, source, target, count=count).require()
        now = target.vm.get_clock()["clock"]
        return now - saved[0]["clock"]["clock"], time.monotonic_ns() - before


def test_time_stands_still_between_save_and_load() -> None:
    went_on, passed = time_gone_by(count=False)
    assert 0 <= went_on < SLACK_NS < passed


def test_the_time_between_save_and_load_is_counted_when_asked_for() -> None:
    went_on, passed = time_gone_by(count=True)
    assert int(AWAY_S * 1e9) <= went_on <= passed + 1_000_000


def refusal(change: Callable[[dict[str, int]], None]) -> Verdict | None:
    with tiny() as source, tiny() as target:
        saved = over_the_wire(save_state(source.vm))
        change(saved[0]["clock"])
        return not_exact(load(saved, source, target, count=True)).get("clock.realtime")


@pytest.mark.parametrize(
    "realtime", [0, time.time_ns() + 3600 * 10**9, 1], ids=["not_known", "in_the_future", "half_a_century_ago"]
)
def test_a_real_time_that_cannot_be_counted_from(realtime: int) -> None:
    wanted = None if realtime == 1 else Verdict.REFUSED
    assert refusal(lambda clock: clock.update(realtime=realtime, flags=0)) is wanted


def test_more_time_than_kvmclock_can_hold_is_refused() -> None:
    def late(clock: dict[str, int]) -> None:
        clock.update(clock=(1 << 62) - 10**9, realtime=1, flags=0)

    assert refusal(late) is Verdict.REFUSED


def test_the_guests_clock_never_goes_back_over_many_moves() -> None:
    with ExitStack() as stack:
        here = stack.enter_context(tiny())
        with_kvmclock(here)
        seen = [0]
        for _ in range(NR_CYCLES):
            run_a_while(here)
            # The page is filled when a vCPU is entered: the first time that the guest could have seen here.
            seen += [PvClock.read(here).system_time, guest_clock_ns(here), here.vm.get_clock()["clock"]]
            there = stack.enter_context(tiny())
            load(save_state(here.vm), here, there).require()
            seen.append(there.vm.get_clock()["clock"])
            here = there
        assert seen == sorted(seen)


def test_vcpus_with_one_tsc_offset_get_one_again() -> None:
    with tiny(2) as source, tiny(2) as target:
        if not all(vcpu.has_tsc_offset for vcpu in source.vm.vcpus):
            pytest.skip("this kernel has no KVM_VCPU_TSC_OFFSET")
        saved = over_the_wire(save_state(source.vm))
        for body in saved[1]:
            body["tsc_offset"] = 12345
        given: list[int] = []

        def take(offset: int) -> None:
            given.append(offset)

        for vcpu in target.vm.vcpus:
            vcpu.set_tsc_offset = take  # type: ignore[method-assign]
        load(saved, source, target)
        assert len(given) == 2
        assert given[0] == given[1]
