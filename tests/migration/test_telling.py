"""What an observer of a migration is told, and when."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from kvmigrate.contract import RunState
from kvmigrate.migration.status import Status
from kvmigrate.precopy.ledger import RoundRecord
from tests.fake_machine import MIB, FakeMachine

from .harness import Receiving, Watch, migrate
from .test_migrate import settled

Receive = Callable[..., Receiving]


def test_what_the_observer_is_told(tmp_path: Path, source_machine: FakeMachine, receive: Receive) -> None:
    receiving, watch = receive(), Watch()
    migrate(source_machine, receiving.address, tmp_path, watch=watch)
    settled(receiving)
    assert watch.words == [Status.SETUP, Status.ACTIVE, Status.DEVICE, Status.COMPLETED]
    assert [r.round for r in watch.rounds] == [0]
    assert receiving.watch.words == [Status.SETUP, Status.ACTIVE, Status.COMPLETED]


def test_nobody_is_told_anything_right_before_the_pause_and_all_of_it_after(tmp_path: Path, receive: Receive) -> None:
    machine, watch = FakeMachine(48 * MIB, running=True), Watch()
    machine.fill(3000)
    machine.start_writer(3000, 30_000)
    pause, told_at_pause = machine.pause, list[list[RoundRecord]]()

    def pausing(reason: RunState) -> None:
        told_at_pause.append(list(watch.rounds))
        pause(reason)

    machine.pause = pausing  # type: ignore[method-assign]
    receiving = receive()
    outcome = migrate(
        machine, receiving.address, tmp_path, watch=watch, bandwidth_bytes_s=40 * MIB, downtime_limit_ms=300.0
    )
    assert outcome.result is not None, outcome.error
    settled(receiving)
    rounds = outcome.result.rounds
    assert len(rounds) > 2
    assert told_at_pause[0] == list(rounds[:-2]), "the last but one is told later, and the last is the blackout's"
    assert watch.rounds == list(rounds[:-1])
    machine.close()


def test_an_observer_that_raises_decides_nothing(tmp_path: Path, source_machine: FakeMachine, receive: Receive) -> None:
    class Broken(Watch):
        def status(self, word: Status) -> None:
            raise RuntimeError(word)

    receiving = receive()
    assert migrate(source_machine, receiving.address, tmp_path, watch=Broken()).error is None
    settled(receiving)
