"""Whole migrations in which pages go as what changed in them, and peers that do not know of it or lie about it."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvmigrate.config import MigrationParameters
from kvmigrate.errors import BadField, ConfigError, PeerFailed, StreamError
from kvmigrate.migration import channel as channel_module
from kvmigrate.migration import incoming
from kvmigrate.migration.delta import DELTA, Offer
from kvmigrate.migration.incoming import Incoming, State
from kvmigrate.migration.sink import StreamSink
from kvmigrate.precopy.ledger import RoundRecord
from kvmigrate.state.frame import FrameKind, encode_frame
from kvmigrate.state.section import pack
from tests.fake_machine import MIB, FakeMachine

from .harness import Outcome, Receiving, migrate

Receive = Callable[..., Receiving]


class Guest(FakeMachine):
    """Writes one word of each hot page after every round but the last."""

    def __init__(self) -> None:
        super().__init__(32 * MIB, running=True)
        self.fill(2000)
        self.nr_writes = 0

    def touch(self, first: int = 100, end: int = 1500) -> None:
        self.nr_writes += 1
        for page in range(first, end):
            self.write(page * 4096 + 64, self.nr_writes.to_bytes(8, "little"))


@pytest.fixture
def guest(monkeypatch: pytest.MonkeyPatch) -> Iterator[Guest]:
    """One that writes while rounds go on, without a clock."""
    machine = Guest()
    end_round = StreamSink.end_round

    def then_write(self: StreamSink, record: RoundRecord) -> None:
        end_round(self, record)
        if record.round < 4:
            machine.touch(end=1500 if record.round < 3 else 110)

    monkeypatch.setattr(StreamSink, "end_round", then_write)
    yield machine
    machine.close()


def move(machine: FakeMachine, receiving: Receiving, directory: Path, **parameters: Any) -> Outcome:
    outcome = migrate(machine, receiving.address, directory, compression="zstd", **parameters)
    receiving.join()
    return outcome


def deltas(outcome: Outcome) -> list[int]:
    assert outcome.error is None and outcome.result is not None, outcome.error
    return [record.pages_delta for record in outcome.result.rounds]


def test_rewritten_pages_go_as_what_changed_and_arrive(tmp_path: Path, guest: Guest, receive: Receive) -> None:
    receiving = receive()
    outcome = move(guest, receiving, tmp_path)
    first, second, *later = deltas(outcome)
    assert (first, second) == (0, 0) and later[0] == 1400 and later[-1] in (10, 1400)
    assert outcome.result is not None
    record = outcome.result.rounds[2]
    assert record.codec == "zstd:1+delta" and "1,400 pages as changes" in record.codec_why
    assert record.bytes_sent < 1400 * 4096 / 50
    assert outcome.result.rounds[-1].last
    assert receiving.machine is not None and receiving.machine.digest() == guest.digest()


def test_without_a_cache_or_without_compression_nothing_is_offered(
    tmp_path: Path, guest: Guest, receive: Receive, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(incoming, "STEPS", {k: v for k, v in incoming.STEPS.items() if k[1] != FrameKind.OFFER})
    assert not any(deltas(move(guest, receive(), tmp_path, delta_cache_bytes=0)))


def test_a_destination_that_does_not_know_of_it_gets_whole_pages(
    tmp_path: Path, guest: Guest, receive: Receive, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An OFFER is to it a frame of an unknown kind that is not mandatory."""
    known = {kind: limit for kind, limit in channel_module.MAX_BYTES.items() if kind != FrameKind.OFFER}
    monkeypatch.setattr(channel_module, "MAX_BYTES", known)
    receiving = receive()
    assert not any(deltas(move(guest, receiving, tmp_path)))
    assert receiving.machine is not None and receiving.machine.digest() == guest.digest()


def test_changes_to_another_page_than_is_there_end_the_migration_with_the_guest_running_here(
    tmp_path: Path, guest: Guest, receive: Receive, monkeypatch: pytest.MonkeyPatch
) -> None:
    round_ = Incoming._round

    def damaging(self: Incoming, frame: channel_module.Frame) -> State:
        if len(self.rounds) == 1:
            self._built().memory.write(700 * 4096 + 9, b"\xa5")
        return round_(self, frame)

    monkeypatch.setattr(incoming, "STEPS", {**incoming.STEPS, (State.RECEIVING, FrameKind.ROUND): damaging})
    receiving = receive()
    outcome = move(guest, receiving, tmp_path)
    assert isinstance(outcome.error, PeerFailed) and "changes to others than are here" in str(outcome.error)
    assert isinstance(receiving.error, StreamError) and not receiving.ran
    assert guest.running and not guest.dirty_log.active
    monkeypatch.undo()
    assert move(guest, receive(), tmp_path).error is None


def test_changes_that_nobody_agreed_on_are_refused(
    tmp_path: Path, guest: Guest, receive: Receive, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Offer, "known", lambda self: Offer(()))
    sending = Offer.from_payload
    monkeypatch.setattr(Offer, "from_payload", lambda payload: Offer((*sending(payload).features, DELTA)))
    receiving = receive()
    outcome = move(guest, receiving, tmp_path)
    assert isinstance(receiving.error, BadField) and "nobody has agreed" in str(receiving.error)
    assert isinstance(outcome.error, PeerFailed) and guest.running


@pytest.mark.parametrize(
    "value", [{}, {"features": "delta"}, {"features": [1]}, {"features": ["a"] * 33}, {"features": [], "more": 1}, []]
)
def test_a_hostile_offer_is_refused(value: object) -> None:
    with pytest.raises(StreamError):
        Offer.from_payload(pack(value))


def test_an_unknown_feature_in_an_offer_is_left_out_of_the_answer() -> None:
    assert Offer.from_payload(Offer(("later", DELTA, "\x00")).to_payload()).known() == Offer((DELTA,))


def test_a_second_offer_is_refused(tmp_path: Path, receive: Receive) -> None:
    from kvmigrate.migration import wire

    machine = FakeMachine(8 * MIB, running=True)
    receiving = receive()
    description = dict(machine.describe())
    hello = wire.Hello(wire.FORMAT, (), str(description["uuid"]), 7, "guest").to_payload()
    offer = Offer((DELTA,)).to_payload()
    frames = ((FrameKind.HELLO, hello), (FrameKind.CONFIG, pack(description)), *[(FrameKind.OFFER, offer)] * 2)
    with socket.create_connection((receiving.address.host, receiving.address.port)) as sock:
        for number, (kind, payload) in enumerate(frames):
            sock.sendall(encode_frame(kind, payload, number))
        sock.settimeout(10)
        while sock.recv(1 << 16):
            continue
    receiving.join()
    assert isinstance(receiving.error, StreamError) and "OFFER" in str(receiving.error)
    machine.close()


@pytest.mark.parametrize("size_bytes", [-1, 1, (1 << 20) - 1])
def test_a_cache_too_small_to_be_meant_is_refused(size_bytes: int) -> None:
    with pytest.raises(ConfigError, match="delta cache"):
        MigrationParameters(delta_cache_bytes=size_bytes)
