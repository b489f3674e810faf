"""The decision when to stop the guest, over numbers alone: a model guest is played against it round by round."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmigrate.config import PAGE_BYTES
from kvmigrate.precopy.converge import (
    ASSUMED_BANDWIDTH,
    FIXED_MS,
    TINY_MS,
    Action,
    Decision,
    Limits,
    Stats,
    decide,
    measured_bandwidth,
    sample,
)
from kvmigrate.precopy.ledger import RoundRecord

GIB = 1 << 30
MIB = 1 << 20


@dataclass
class Guest:
    """A guest that writes ``writes`` bytes/s over a working set of ``working_set`` pages."""

    ram_pages: int
    writes: float
    working_set: int

    def dirtied(self, time_ms: float) -> int:
        return min(int(self.writes * time_ms / 1e3 / PAGE_BYTES), self.working_set)


def record(number: int, pages: int, bandwidth: float, zero: int = 0) -> RoundRecord:
    sent = pages - zero
    ms = sent * PAGE_BYTES / bandwidth * 1e3
    return RoundRecord(number, pages, zero, 0, sent, sent * PAGE_BYTES, ms + 0.05, ms, 0.0)


def play(guest: Guest, bandwidth: float, limits: Limits) -> tuple[Decision, list[RoundRecord], int]:
    """Rounds until the decision is no longer CONTINUE; returns it, the rounds and the pages left."""
    rounds: list[RoundRecord] = []
    left, knees = guest.ram_pages, 0
    while True:
        rounds.append(record(len(rounds), left, bandwidth))
        left = guest.dirtied(rounds[-1].time_ms)
        decision = decide(Stats(tuple(rounds), left, limits, knees))
        knees = decision.knees
        if decision.action is not Action.CONTINUE:
            return decision, rounds, left


LIMITS = Limits(downtime_limit_ms=300.0, max_rounds=30)


def test_quiet_guest_is_not_stopped_for_its_whole_budget() -> None:
    decision, rounds, left = play(Guest(262144, 20e6, 4000), 1.0 * GIB, LIMITS)
    assert decision.action is Action.SWITCH
    assert left * PAGE_BYTES / GIB * 1e3 < TINY_MS
    assert len(rounds) <= 4


def test_guest_that_writes_nothing_switches_after_round_0() -> None:
    decision, rounds, left = play(Guest(262144, 0.0, 0), 1.0 * GIB, LIMITS)
    assert (decision.action, len(rounds), left) == (Action.SWITCH, 1, 0)


def test_working_set_that_fits_the_limit_switches_at_the_knee() -> None:
    decision, rounds, left = play(Guest(262144, 8.0 * GIB, 12800), 1.0 * GIB, LIMITS)
    assert decision.action is Action.SWITCH
    assert left == 12800
    assert decision.expected_downtime_ms == pytest.approx(50 * MIB / GIB * 1e3 + FIXED_MS, rel=0.05)
    assert len(rounds) <= 5, "it goes on copying the same working set for nothing"


def test_writer_above_the_bandwidth_is_given_up_with_both_rates_and_both_ways_out() -> None:
    decision, rounds, _ = play(Guest(1 << 18, 1.9 * GIB, 1 << 22), 1.1 * GIB, Limits(300.0, 4))
    assert decision.action is Action.GIVE_UP
    assert len(rounds) == 4
    assert "the guest writes 1.9 GiB/s, the link carries 1.1 GiB/s" in decision.why
    assert "needs a downtime limit of " in decision.why
    assert " × the bandwidth" in decision.why


@pytest.mark.parametrize("guest", [Guest(1 << 20, 1.9 * GIB, 400_000), Guest(1 << 18, 1.9 * GIB, 1 << 22)])
def test_the_faster_link_that_is_named_does_work(guest: Guest) -> None:
    given_up, _, _ = play(guest, 1.1 * GIB, Limits(300.0, 4))
    faster = float(given_up.why.split(" or ")[1].split(" ×")[0])
    assert play(guest, 1.1 * GIB * faster * 1.05, Limits(300.0, 30))[0].action is Action.SWITCH


def test_the_longer_downtime_that_is_named_does_work() -> None:
    guest = Guest(1 << 20, 1.9 * GIB, 400_000)
    given_up, _, _ = play(guest, 1.1 * GIB, Limits(300.0, 12))
    limit_ms = float(given_up.why.split("limit of ")[1].split(" ms")[0])
    assert play(guest, 1.1 * GIB, Limits(limit_ms, 12))[0].action is Action.SWITCH


def test_limit_below_the_floor_still_moves_an_idle_guest() -> None:
    decision, _, _ = play(Guest(262144, 1e5, 100), 1.0 * GIB, Limits(1.0, 30))
    assert decision.action is Action.SWITCH


def test_scanning_time_is_not_taken_for_a_slow_link() -> None:
    slow_scan = RoundRecord(0, 1 << 20, 1 << 20, 0, 1000, 1000 * PAGE_BYTES, 5000.0, 4.0, 4996.0)
    assert measured_bandwidth([slow_scan], 0) == pytest.approx(1000 * PAGE_BYTES / 0.004)


def test_bandwidth_is_never_above_the_cap() -> None:
    assert measured_bandwidth([record(0, 1000, 1.0 * GIB)], 10 * MIB) == 10 * MIB


def test_nothing_sent_takes_the_assumed_link() -> None:
    assert measured_bandwidth([record(0, 10, 1.0 * GIB, zero=10)], 0) == ASSUMED_BANDWIDTH


def test_sample_is_the_newest_rounds_that_sent_enough() -> None:
    rounds = [record(0, 100_000, 1e9), record(1, 3000, 1e9), record(2, 3000, 1e9)]
    assert [r.round for r in sample(rounds)] == [1, 2]
    assert [r.round for r in sample(rounds[1:2])] == [1]


def test_last_allowed_round_switches_when_the_limit_allows_it() -> None:
    decision = decide(Stats((record(0, 262144, 1.0 * GIB),), 12800, Limits(300.0, 1), 0))
    assert decision.action is Action.SWITCH
    assert "after 1 rounds" in decision.why


writers = st.builds(
    Guest,
    ram_pages=st.integers(256, 1 << 22),
    writes=st.floats(0, 20.0 * GIB),
    working_set=st.integers(0, 1 << 20),
)


@given(writers, st.floats(MIB, 12.0 * GIB), st.floats(1, 5000), st.integers(1, 40))
def test_it_always_ends_and_never_over_the_limit(
    guest: Guest, bandwidth: float, limit_ms: float, max_rounds: int
) -> None:
    decision, rounds, left = play(guest, bandwidth, Limits(limit_ms, max_rounds))
    assert len(rounds) <= max_rounds
    if decision.action is Action.SWITCH:
        really_ms = left * PAGE_BYTES / bandwidth * 1e3 + FIXED_MS
        assert really_ms <= max(limit_ms, FIXED_MS + TINY_MS) * 1.01
    else:
        assert decision.expected_downtime_ms > limit_ms


@given(st.integers(256, 1 << 22), st.floats(50.0 * MIB, 12.0 * GIB), st.floats(0, 0.5))
def test_a_writer_well_below_the_bandwidth_is_stopped_with_almost_nothing_left(
    ram_pages: int, bandwidth: float, share: float
) -> None:
    guest = Guest(ram_pages, bandwidth * share, ram_pages)
    decision, _, left = play(guest, bandwidth, LIMITS)
    assert decision.action is Action.SWITCH
    assert left * PAGE_BYTES / bandwidth * 1e3 < TINY_MS


@given(st.lists(st.integers(0, 1 << 20), min_size=1, max_size=20), st.integers(0, 1 << 20))
def test_any_ledger_gives_a_decision_with_its_reason(pages: list[int], left: int) -> None:
    rounds = tuple(record(n, p, 1.0 * GIB) for n, p in enumerate(pages))
    decision = decide(Stats(rounds, left, LIMITS))
    assert decision.why
    assert decision == decide(Stats(rounds, left, LIMITS))
