"""The judge of heartbeats says no to every way in which a guest can run twice, not at all, or from the wrong point."""

from __future__ import annotations

import pytest

from .heartbeat import OracleError, judge
from .recorder import SerialLog


def log(side: str, *chunks: tuple[float, bytes]) -> SerialLog:
    return SerialLog(side, list(chunks))


def test_one_stream_over_two_sides_passes_and_gives_the_blackout() -> None:
    source = log("source", (1.0, b"H 0 1 10 5\nH 0 2 20 6\nH 0 "), (1.1, b"3 3"))
    destination = log("destination", (1.15, b"0 7\nH 0 4 40 8\nOK updates 8 tickets 8\n"))
    verdict = judge([source, destination])
    assert verdict.beats == {0: 4} and verdict.ended
    assert verdict.blackouts_ms == pytest.approx([50.0])


def test_a_side_that_never_spoke_is_no_hop() -> None:
    assert judge([log("a", (1.0, b"H 0 1\n")), log("b"), log("c", (1.5, b"H 0 2\n"))]).blackouts_ms == (500.0,)


@pytest.mark.parametrize(
    "second",
    [
        pytest.param(b"H 0 3\n", id="repeated"),
        pytest.param(b"H 0 5\n", id="missing"),
        pytest.param(b"0 4\n", id="half a line lost"),
        pytest.param(b"H 0 4\nH 0 4\n", id="twice on one side"),
        pytest.param(b"H 0 4 1\n", id="a word lost"),
        pytest.param(b"BAD page\n", id="the guest complains"),
    ],
)
def test_anything_but_the_next_number_is_refused(second: bytes) -> None:
    first = log("source", (1.0, b"H 0 1\nH 0 2\nH 0 3\n"))
    with pytest.raises(OracleError):
        if second == b"0 4\n":
            first.chunks.append((1.1, b"H "))
            second = b" 4\n"
        judge([first, log("destination", (1.2, second))])


def test_two_vcpus_count_apart() -> None:
    assert judge([log("a", (1.0, b"H 0 1\nH 1 1\nH 1 2\nH 0 2\n"))]).beats == {0: 2, 1: 2}


def test_a_source_that_speaks_after_the_destination_is_refused() -> None:
    source = log("source", (1.0, b"H 0 1\n"), (2.0, b"H 0 2\n"))
    with pytest.raises(OracleError, match="spoke"):
        judge([source, log("destination", (1.5, b"H 0 3\n"))])
