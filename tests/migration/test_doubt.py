"""A guest whose COMMIT or RUNNING was lost while nobody can be asked: it runs nowhere until somebody says where."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from kvmigrate.contract import RunState
from kvmigrate.errors import CommitUnknown, PeerFailed, StateError
from kvmigrate.migration.journal import Entry, Journal
from kvmigrate.migration.source import Source
from kvmigrate.migration.status import Status
from tests.fake_machine import FakeMachine
from tests.migration.harness import (
    Outcome,
    Proxy,
    Receiving,
    Rule,
    check_never_two,
    check_resumed,
    make_source,
    migrate,
    run,
)
from tests.migration.test_faults import COMMIT, RUNNING, migrates_at_once

Receive = Callable[..., Receiving]
ProxyTo = Callable[..., Proxy]


@pytest.mark.parametrize(("direction", "number"), [("out", COMMIT), ("back", RUNNING)])
def test_with_the_link_down_the_source_stays_paused_in_doubt(
    tmp_path: Path, source_machine: FakeMachine, receive: Receive, proxy_to: ProxyTo, direction: str, number: int
) -> None:
    receiving = receive(in_doubt_ms=100.0)
    proxy = proxy_to(receiving, Rule(direction, number, "cut", link_stays_down=True))
    outcome = migrate(source_machine, proxy.address, tmp_path, ask_for_ms=300.0)
    assert isinstance(outcome.error, CommitUnknown)
    assert "kvmigrate resolve guest --run" in str(outcome.error)
    assert source_machine.runstate is RunState.FINISH_MIGRATE
    record = Journal(tmp_path, "guest").read()
    assert record is not None
    assert record.state is Entry.COMMITTED
    receiving.join()
    assert receiving.ran == (direction == "back")


@pytest.mark.parametrize(("direction", "number"), [("out", COMMIT), ("back", RUNNING)])
def test_when_the_link_is_back_the_answer_decides(
    tmp_path: Path, source_machine: FakeMachine, receive: Receive, proxy_to: ProxyTo, direction: str, number: int
) -> None:
    receiving = receive(in_doubt_ms=5000.0)
    proxy = proxy_to(receiving, Rule(direction, number, "cut", link_stays_down=True))
    source = make_source(source_machine, proxy.address, tmp_path, ask_for_ms=None)
    threading.Timer(0.4, proxy.link_up).start()
    outcome = run(source)
    receiving.join()
    check_never_two(source_machine, receiving)
    if direction == "back":
        assert outcome.error is None
        assert receiving.ran
    else:
        assert isinstance(outcome.error, PeerFailed)
        check_resumed(source_machine)
        assert not receiving.ran


def in_doubt(
    directory: Path, machine: FakeMachine, receive: Receive, proxy_to: ProxyTo
) -> tuple[threading.Thread, list[Outcome], Source]:
    """A source in its thread that is commit-unknown with its destination out of reach."""
    receiving = receive(in_doubt_ms=100.0)
    proxy = proxy_to(receiving, Rule("out", COMMIT, "cut", link_stays_down=True))
    source = make_source(machine, proxy.address, directory, ask_for_ms=None)
    outcomes: list[Outcome] = []
    thread = threading.Thread(target=lambda: outcomes.append(run(source)), daemon=True)
    thread.start()
    until = time.monotonic() + 5
    while source.query().status is not Status.COMMIT_UNKNOWN:
        assert time.monotonic() < until
        time.sleep(0.01)
    return thread, outcomes, source


def test_in_doubt_cancel_is_refused_and_the_operators_run_resumes(
    tmp_path: Path, source_machine: FakeMachine, receive: Receive, proxy_to: ProxyTo
) -> None:
    thread, outcomes, source = in_doubt(tmp_path, source_machine, receive, proxy_to)
    with pytest.raises(StateError, match="COMMIT was sent"):
        source.cancel()
    assert source_machine.runstate is RunState.FINISH_MIGRATE
    source.resolve(run_here=True)
    thread.join(5)
    assert "the operator said so" in str(outcomes[0].error)
    check_resumed(source_machine)
    migrates_at_once(source_machine, receive, tmp_path)


def test_in_doubt_the_operators_discard_completes(
    tmp_path: Path, source_machine: FakeMachine, receive: Receive, proxy_to: ProxyTo
) -> None:
    thread, outcomes, source = in_doubt(tmp_path, source_machine, receive, proxy_to)
    source.resolve(run_here=False)
    thread.join(5)
    assert outcomes[0].error is None
    assert source_machine.runstate is RunState.POSTMIGRATE
    assert Journal(tmp_path, "guest").read() is None


def test_resolve_is_refused_when_nothing_is_in_doubt(
    tmp_path: Path, source_machine: FakeMachine, receive: Receive
) -> None:
    source = make_source(source_machine, receive().address, tmp_path)
    with pytest.raises(StateError, match="not in doubt"):
        source.resolve(run_here=True)


def test_a_destination_that_loses_its_source_after_ready_may_be_run_by_the_operator(
    tmp_path: Path, source_machine: FakeMachine, receive: Receive, proxy_to: ProxyTo
) -> None:
    receiving = receive(in_doubt_ms=5000.0)
    proxy = proxy_to(receiving, Rule("out", COMMIT, "cut", link_stays_down=True))
    outcome = migrate(source_machine, proxy.address, tmp_path, ask_for_ms=0.0)
    assert isinstance(outcome.error, CommitUnknown)
    until = time.monotonic() + 5
    while receiving.destination.query()["status"] != "commit-unknown":
        assert time.monotonic() < until
        time.sleep(0.01)
    receiving.destination.resolve(run_here=True)
    receiving.join()
    assert receiving.error is None
    assert receiving.ran
    check_never_two(source_machine, receiving)
