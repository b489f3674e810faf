"""The bench judges by what it measured: ranks, goals, plots, and links that are as slow as they say."""

from __future__ import annotations

import math
import socket
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path

import pytest

from . import link
from .goals import Goal, Group
from .observer import GuestDamaged, Heartbeats
from .plan import PLANS
from .plots import distribution
from .report import goals_table, section
from .samples import Sample, Series, interleave, quantile


def row(name: str, *values: float, failures: int = 0) -> Series:
    samples = [Sample({"blackout ms": value}) for value in values]
    return Series(name, lambda: samples[0], not name.startswith("QEMU"), None, samples, ["why"] * failures)


def group(goal: Goal, *rows: Series) -> Group:
    return Group("Title", list(rows), ["blackout ms"], [goal], name="name")


def test_a_quantile_is_a_value_that_was_measured() -> None:
    values = [float(value) for value in range(1, 101)]
    assert [quantile(values, share) for share in (0.5, 0.9, 0.99, 1)] == [50, 90, 99, 100]
    assert quantile([3.0], 0.5) == 3 and quantile([], 0.5) == math.inf


def test_a_run_that_failed_counts_as_endless() -> None:
    assert row("QEMU", 1, 1, failures=1).statistic("blackout ms", "p50") == 1
    assert row("QEMU", 1, failures=2).statistic("blackout ms", "p50") == math.inf


def test_a_ratio_is_held_against_the_best_row_of_the_rival() -> None:
    goal = Goal("goal", "blackout ms", 0.5)
    (verdict,) = group(goal, row("QEMU a", 9, 9, 9), row("QEMU b", 4, 4, 40), row("kvmigrate", 2, 2, 3)).verdicts()
    assert verdict.rival is not None and verdict.rival.name == "QEMU b"
    assert verdict.measured == 0.5 and verdict.reached
    (verdict,) = group(goal, row("QEMU b", 4), row("kvmigrate", 2.1)).verdicts()
    assert not verdict.reached and "**not reached**" in goals_table([verdict])


def test_a_copy_that_is_no_qemu_is_no_rival_unless_it_is_named() -> None:
    rows = [row("QEMU", 8), row("plain copy", 1), row("kvmigrate", 2)]
    rows[1].ours = False
    (best,) = group(Goal("goal", "blackout ms", 1), *rows).verdicts()
    (plain,) = group(Goal("goal", "blackout ms", 1, "p50", "plain copy"), *rows).verdicts()
    assert (best.measured, plain.measured) == (0.25, 2)


def test_a_goal_without_any_run_is_not_reached() -> None:
    (verdict,) = group(Goal("goal", "blackout ms", 5, "p50", None), row("kvmigrate", failures=1)).verdicts()
    assert not verdict.reached


def test_rows_take_turns_and_end_in_time() -> None:
    order: list[str] = []

    def noting(name: str) -> Callable[[], Sample]:
        return lambda: order.append(name) or Sample({"x": 1.0})  # type: ignore[func-returns-value]

    rows = [Series(name, noting(name)) for name in ("a", "b")]
    interleave(rows, 2, math.inf, lambda _: None)
    assert order == ["a", "b", "a", "b"]
    interleave(rows, 5, 0, lambda _: None)
    assert order == ["a", "b", "a", "b", "a", "b"]


def test_a_row_of_the_rival_that_is_far_behind_its_best_runs_no_more() -> None:
    rows = [row("QEMU far", 8), row("QEMU near", 5), row("QEMU", 4), row("QEMU failed", failures=1)]
    found = group(Goal("goal", "blackout ms", 0.5), *rows, row("kvmigrate", 9), row("plain copy", 99))
    found.rows[-1].ours = False
    assert [one.name for one in found.rows if found.is_beaten(one)] == ["QEMU far", "QEMU failed"]
    found.figures.append("total ms")
    found.goals.clear()
    assert not any(map(found.is_beaten, rows)), "behind in one figure, and in the other one nobody has a value"
    interleave(rows[:2], 2, math.inf, lambda _: None, lambda one: one is rows[0])
    assert [len(one.samples) for one in rows[:2]] == [1, 3]


def test_a_failed_run_is_told_in_the_report() -> None:
    def fail() -> Sample:
        raise RuntimeError("the guest is gone")

    series = Series("kvmigrate", fail, True)
    interleave([series, other := row("QEMU", 1)], 1, math.inf, lambda _: None)
    text = section(Group("Title", [series, other], ["blackout ms"], name="name"), 1)
    assert "kvmigrate: RuntimeError: the guest is gone" in text


def test_plots_are_well_formed_and_name_every_row() -> None:
    chart = distribution(group(Goal("goal", "blackout ms", 1), row("QEMU <a>", 5, 200), row("kvmigrate", 1.5, 2)))
    root = ElementTree.fromstring(chart.to_text())
    texts = [element.text or "" for element in root.iter() if element.tag.endswith("text")]
    assert any("QEMU <a>" in text for text in texts) and any("kvmigrate" in text for text in texts)


def test_every_group_has_a_name_of_its_own() -> None:
    assert len({plan.name for plan in PLANS}) == len(PLANS)


def test_a_guest_that_complains_is_heard(tmp_path: Path) -> None:
    heartbeats = Heartbeats(tmp_path / "serial")
    with socket.socket(socket.AF_UNIX) as guest:
        guest.connect(str(tmp_path / "serial"))
        guest.send(b"H 0 1\n")
        first = heartbeats.wait_first(5)
        heartbeats.check()
        guest.send(b"BAD filled page changed\n")
        heartbeats.wait_after(first, 5)
    with pytest.raises(GuestDamaged, match="BAD filled page changed"):
        heartbeats.check()
    heartbeats.close()


@pytest.mark.skipif(bool(link.why_not_shaped()), reason=link.why_not_shaped())
def test_a_shaped_link_is_as_slow_as_it_says_and_is_removed() -> None:
    listen = "import socket as s; l = s.create_server(('0.0.0.0', 4444)); print('up', flush=True); c, _ = l.accept()\n"
    send = "import socket as s, sys; c = s.create_connection((sys.argv[1], 4444)); c.sendall(bytes(1 << 20))\n"
    with link.shaped(20, 400) as shaped:
        command = [*shaped.prefix(0), sys.executable, "-c", listen + "while c.recv(1 << 20): pass"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as receiver:
            assert receiver.stdout is not None and receiver.stdout.readline() == "up\n"
            began = time.monotonic()
            address = shaped.uri(0).split(":")[1]
            subprocess.run([*shaped.prefix(1), sys.executable, "-c", send, address], check=True)
            receiver.wait(30)
            took_s = time.monotonic() - began
        assert 0.9 * 8 * (1 << 20) / 20e6 < took_s < 10
        namespaces = [shaped.prefix(side)[-1] for side in (0, 1)]
        assert all(Path("/run/netns", name).exists() for name in namespaces)
    assert not any(Path("/run/netns", name).exists() for name in namespaces)
