"""Who is told of a run state hears of each, in order, and keeps no guest waiting."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from kvmigrate.contract import RunState
from kvmigrate.errors import StateError
from kvmigrate.machine.platform import Platform
from kvmigrate.machine.runstate import RunStateBox

from .boot_sector import HANG, machine_with


def test_each_move_is_told_once_and_in_order() -> None:
    told: list[RunState] = []
    box = RunStateBox(RunState.PRELAUNCH)
    box.on_change = told.append
    box.enter(RunState.RUNNING)
    assert box.runs and told == []
    box.move(RunState.PAUSED)
    box.move(RunState.PAUSED)
    box.tell()
    assert told == [RunState.RUNNING, RunState.PAUSED]


def test_a_move_that_is_none_changes_and_tells_nothing() -> None:
    told: list[RunState] = []
    box = RunStateBox(RunState.POSTMIGRATE)
    box.on_change = told.append
    with pytest.raises(StateError):
        box.move(RunState.PAUSED)
    assert box.state is RunState.POSTMIGRATE and told == []


def test_the_end_is_told_after_what_was_told_late() -> None:
    """The guest may end in its own thread before the one that let it go has told of that."""
    told: list[RunState] = []
    box = RunStateBox(RunState.PRELAUNCH)
    box.on_change = told.append
    box.enter(RunState.RUNNING)
    ended = threading.Thread(target=box.move, args=(RunState.SHUTDOWN,))
    ended.start()
    ended.join()
    box.tell()
    assert told == [RunState.RUNNING, RunState.SHUTDOWN]


@pytest.mark.kvm
def test_a_guest_runs_before_anybody_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = machine_with(tmp_path, HANG)
    order: list[object] = []
    let_go = Platform.let_go

    def letting_go(platform: Platform) -> None:
        let_go(platform)
        order.append("let go")

    monkeypatch.setattr(Platform, "let_go", letting_go)
    machine.on_change(order.append)
    machine.start()
    machine.resume()
    machine.close()
    assert order[:2] == ["let go", RunState.RUNNING]
