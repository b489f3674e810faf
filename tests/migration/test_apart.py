"""Both sides of a move on one host keep to processors of their own around the blackout."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from kvmigrate.contract import RunState
from kvmigrate.errors import HostError
from kvmigrate.memory.prefault import Prefault
from kvmigrate.memory.region import GuestMemory
from kvmigrate.migration import incoming
from kvmigrate.migration.apart import Apart
from kvmigrate.migration.pages import ANNOUNCED_PAGES
from kvmigrate.migration.sink import _pool
from tests.fake_machine import MIB, FakeMachine

from .harness import Receiving, migrate

Receive = Callable[..., Receiving]
ALLOWED = os.sched_getaffinity(0)
needs_two = pytest.mark.skipif(len(ALLOWED) < 2, reason="there is nothing to share")


@pytest.fixture(autouse=True)
def unchanged() -> Iterator[None]:
    yield
    os.sched_setaffinity(0, ALLOWED)


def connected() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        source = socket.create_connection(listener.getsockname())
        destination, _ = listener.accept()
    return source, destination


def halves(attempt: int) -> tuple[set[int], set[int]]:
    """Where a source and its destination keep themselves in that attempt."""
    source, destination = connected()
    with source, destination:
        kept = []
        for sock, half in ((source, attempt), (destination, attempt + 1)):
            apart = Apart(sock)
            apart.keep(half)
            apart.keep(half)
            kept.append(os.sched_getaffinity(0))
            apart.end()
            apart.end()
            assert os.sched_getaffinity(0) == ALLOWED
    return kept[0], kept[1]


@needs_two
def test_both_sides_share_all_processors_and_have_none_in_common() -> None:
    one, other = halves(0)
    assert one | other == ALLOWED and not one & other
    assert abs(len(one) - len(other)) <= 1


@needs_two
def test_a_side_may_move_over_to_the_others_half() -> None:
    one, other = halves(0)
    source, destination = connected()
    with source, destination:
        apart = Apart(source)
        for half, expected in ((0, one), (1, other), (1, other), (2, one)):
            apart.keep(half)
            assert os.sched_getaffinity(0) == expected
        apart.end()
        assert os.sched_getaffinity(0) == ALLOWED


@needs_two
def test_a_source_leaves_its_processors_to_the_guest_that_went_on(
    tmp_path: Path, source_machine: FakeMachine, receive: Receive, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[RunState, set[int]] = {}
    pause = source_machine.pause

    def spied(reason: RunState = RunState.PAUSED) -> None:
        seen[reason] = os.sched_getaffinity(0)
        pause(reason)

    monkeypatch.setattr(source_machine, "pause", spied)
    receiving = receive()
    assert migrate(source_machine, receiving.address, tmp_path).error is None
    receiving.join()
    before, after = seen[RunState.FINISH_MIGRATE], seen[RunState.POSTMIGRATE]
    assert before | after == ALLOWED and not before & after


@needs_two
def test_another_attempt_changes_places() -> None:
    assert halves(7) == tuple(reversed(halves(6)))


def test_a_process_with_one_processor_keeps_it() -> None:
    cpu = min(ALLOWED)
    source, destination = connected()
    with source, destination:
        os.sched_setaffinity(0, {cpu})
        for half in (0, 1):
            Apart(source).keep(half)
            assert os.sched_getaffinity(0) == {cpu}


def test_two_hosts_have_nothing_to_share() -> None:
    for sock in socket.socketpair():
        with sock:
            Apart(sock).keep(0)
    assert os.sched_getaffinity(0) == ALLOWED


def test_a_destination_is_apart_until_the_guest_runs_and_what_was_started_meanwhile_may_then_run_everywhere(
    tmp_path: Path, source_machine: FakeMachine, receive: Receive, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[tuple[FakeMachine, str], set[int]] = {}
    over, started = threading.Event(), list[threading.Thread]()

    def spy(name: str) -> None:
        real = getattr(FakeMachine, name)

        def spied(machine: FakeMachine, *arguments: Any, **named: Any) -> Any:
            seen[machine, name] = os.sched_getaffinity(0)
            if name != "warm_up":
                # As a device does.
                started.append(threading.Thread(target=over.wait))
                started[-1].start()
            return real(machine, *arguments, **named)

        monkeypatch.setattr(FakeMachine, name, spied)

    for name in ("warm_up", "load", "resume"):
        spy(name)
    # Not warm from the trial of the state, but each time.
    monkeypatch.setattr("kvmigrate.migration.warming.WARM_FOR_S", 0.0)
    receiving = receive()
    assert migrate(source_machine, receiving.address, tmp_path).error is None
    receiving.join()
    assert receiving.machine is not None
    there, here = seen[receiving.machine, "warm_up"], seen[source_machine, "warm_up"]
    assert there | here == ALLOWED and (len(ALLOWED) == 1 or not there & here)
    assert seen[receiving.machine, "load"] == seen[receiving.machine, "resume"] == there
    assert len(started) > 1
    assert all(os.sched_getaffinity(thread.native_id or 0) == ALLOWED for thread in started)
    over.set()


def test_what_touches_memory_ahead_of_the_pages_may_run_everywhere(
    tmp_path: Path, receive: Receive, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[set[int]] = []

    class Spied(Prefault):
        def __init__(self, memory: GuestMemory, runs: Sequence[tuple[int, int]]) -> None:
            seen.append(os.sched_getaffinity(0))
            super().__init__(memory, runs)

    monkeypatch.setattr(incoming, "Prefault", Spied)
    machine = FakeMachine(48 * MIB, running=True)
    machine.fill(ANNOUNCED_PAGES)
    receiving = receive()
    assert migrate(machine, receiving.address, tmp_path).error is None
    receiving.join()
    assert seen == [ALLOWED]
    machine.close()


def test_a_guest_that_goes_on_at_its_source_may_run_everywhere_and_so_may_who_sent_it(
    tmp_path: Path, source_machine: FakeMachine, receive: Receive, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[set[int]] = []
    resume = source_machine.resume

    def resuming() -> None:
        seen.append(os.sched_getaffinity(0))
        resume()

    monkeypatch.setattr(source_machine, "resume", resuming)
    refusing = receive(prepare=lambda machine: machine.faults.once.update(load=HostError("KVM_SET_SREGS", 22)))
    assert migrate(source_machine, refusing.address, tmp_path).error is not None
    assert seen == [ALLOWED]
    assert os.sched_getaffinity(0) == ALLOWED
    assert migrate(source_machine, receive().address, tmp_path).error is None
    assert os.sched_getaffinity(0) == ALLOWED


def test_a_thread_for_pages_that_starts_late_may_run_everywhere() -> None:
    with _pool(1) as pool:
        os.sched_setaffinity(0, {min(ALLOWED)})
        assert pool.submit(os.sched_getaffinity, 0).result() == ALLOWED
