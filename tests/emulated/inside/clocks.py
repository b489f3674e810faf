"""The clocks of a guest that kvm_amd moves, as the guest itself reads them: kvmclock's page and the TSC.

Bounds are wide, since an emulated processor may take a while from one instruction to the next; what may not happen at
all, a step back or time that nobody lived through, is told exactly.
"""

from __future__ import annotations

import time
from contextlib import ExitStack

from kvmigrate.kvm.vm_state import load_state, save_state
from tests.kvm.moving import over_the_wire
from tests.kvm.pvclock import PvClock, guest_clock_ns, guest_tsc, run_a_while, with_kvmclock
from tests.kvm.tiny import TinyVm, tiny

NR_MOVES = 5
AWAY_S = 2.0
SLACK_NS = 1_500_000_000
TSC = 0x10


def move(source: TinyVm, target: TinyVm, away_s: float, *, count: bool = False) -> int:
    """Move the guest; returns for how many nanoseconds it stood, from its save to its load."""
    saved = over_the_wire(save_state(source.vm))
    at = time.monotonic_ns()
    target.memory.write(0, source.memory.read(0, source.memory.size_bytes))
    time.sleep(away_s)
    load_state(target.vm, *saved, count_downtime=count).require()
    return time.monotonic_ns() - at


def seen_over_a_move(*, count: bool) -> tuple[int, int, int]:
    """What the guest saw pass between its last look there and its first here; between both by the host; standing."""
    with tiny() as source, tiny() as target:
        with_kvmclock(source)
        run_a_while(source)
        before, left = guest_clock_ns(source), time.monotonic_ns()
        stood = move(source, target, AWAY_S, count=count)
        run_a_while(target)
        return PvClock.read(target).system_time - before, time.monotonic_ns() - left, stood


def test_time_stands_still_over_a_move() -> None:
    went_on, passed, stood = seen_over_a_move(count=False)
    assert 0 <= went_on <= passed - stood + SLACK_NS
    assert went_on < AWAY_S * 1e9


def test_time_away_is_counted_when_asked_for() -> None:
    went_on, passed, stood = seen_over_a_move(count=True)
    assert stood - 1_000_000 <= went_on <= passed + SLACK_NS


def test_neither_clock_goes_back_over_many_moves() -> None:
    clock, tsc = [0], [0]
    with ExitStack() as stack:
        here = stack.enter_context(tiny())
        with_kvmclock(here)
        for _ in range(NR_MOVES):
            run_a_while(here)
            clock += [PvClock.read(here).system_time, guest_clock_ns(here)]
            tsc.append(guest_tsc(here))
            there = stack.enter_context(tiny())
            move(here, there, 0.0)
            # Not more than the guest will see there: KVM lets an unstable TSC go on from its last exit at each ioctl.
            tsc.append(there.cpu.get_msrs([TSC])[TSC])
            here = there
    assert clock == sorted(clock)
    assert tsc == sorted(tsc)
