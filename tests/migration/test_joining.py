"""Who may join a migration with a further connection, and what it costs those who may not."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from kvmigrate.config import MAX_CONNECTIONS
from kvmigrate.errors import BadField, KvmigrateError, PeerFailed, StreamError
from kvmigrate.migration.abort import Abort
from kvmigrate.migration.channel import Channel, expect
from kvmigrate.migration.joining import Join, dial
from kvmigrate.state.frame import FrameKind
from kvmigrate.state.section import pack
from tests.fake_machine import FakeMachine
from tests.migration.harness import Proxy, Receiving, Rule, check_resumed, make_source, migrate, run

Receive = Callable[..., Receiving]
ProxyTo = Callable[..., Proxy]


class Held:
    """A migration that stands still in its first round, so that others can try to join it."""

    def __init__(self, machine: FakeMachine, receiving: Receiving, proxy: Proxy, directory: Path) -> None:
        self._source = make_source(machine, proxy.address, directory, connections=2)
        self._thread = threading.Thread(target=run, args=(self._source,), daemon=True)
        self._thread.start()
        assert proxy.hit.wait(5)
        self.uuid, self.epoch = self._source._query.uuid, self._source._query.epoch
        self.address = receiving.address
        self.abort = Abort()

    def ask(self, kind: FrameKind, payload: bytes) -> KvmigrateError | None:
        """What the destination says to a connection that begins so."""
        channel = dial(self.address, self.abort, 4000.0)
        try:
            channel.send_payloads([(kind, payload)])
            expect(channel, FrameKind.JOIN)
        except KvmigrateError as error:
            return error
        finally:
            channel.close()
        return None

    def cancel(self) -> None:
        self._source.cancel()
        self._thread.join(5)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"epoch": 1}, "no such guest"),
        ({"uuid": "another"}, "no such guest"),
        ({"number": 2}, "is there already"),
        ({"number": 1}, "number"),
        ({"number": 4}, "cannot be"),
        ({"of": MAX_CONNECTIONS + 1}, "of"),
        ({"more": 1}, "more"),
    ],
)
def test_a_connection_that_does_not_belong_costs_itself_and_nobody_else(
    tmp_path: Path,
    large: FakeMachine,
    receive: Receive,
    proxy_to: ProxyTo,
    change: dict[str, object],
    says: str,
) -> None:
    receiving = receive()
    held = Held(large, receiving, proxy_to(receiving, Rule("out", 1, "hold", connection=2)), tmp_path)
    join = {"uuid": held.uuid, "epoch": held.epoch, "number": 3, "of": 3} | change
    error = held.ask(FrameKind.JOIN, pack(join))
    assert isinstance(error, PeerFailed)
    assert says in str(error)
    assert receiving.error is None
    held.cancel()


def test_nobody_joins_a_guest_whose_source_announced_no_further_connections(
    tmp_path: Path, source_machine: FakeMachine, receive: Receive, proxy_to: ProxyTo
) -> None:
    receiving = receive(timeout_ms=5000.0)
    proxy = proxy_to(receiving, Rule("out", 5, "hold"))
    source = make_source(source_machine, proxy.address, tmp_path, timeout_ms=5000.0, connections=1)
    thread = threading.Thread(target=run, args=(source,), daemon=True)
    thread.start()
    assert proxy.hit.wait(5)
    channel = dial(receiving.address, Abort(), 4000.0)
    channel.send_payloads([(FrameKind.JOIN, Join(source._query.uuid, source._query.epoch, 2, 2).to_payload())])
    with pytest.raises(PeerFailed, match="no such guest"):
        expect(channel, FrameKind.JOIN)
    channel.close()
    source.cancel()
    thread.join(5)


@pytest.mark.parametrize(
    "payload",
    [b"", pack({}), pack({"uuid": "u", "epoch": 1, "number": 3, "of": 2}), pack({"uuid": 1, "epoch": 1})],
)
def test_a_hostile_join_is_a_stream_error(payload: bytes) -> None:
    with pytest.raises(StreamError):
        Join.from_payload(payload)


def test_an_answer_for_another_connection_is_refused(
    tmp_path: Path, large: FakeMachine, receive: Receive, monkeypatch: pytest.MonkeyPatch
) -> None:
    receiving = receive()
    monkeypatch.setattr("kvmigrate.migration.further._Connection._take_frame", lambda self: False)
    send = Channel.send_payloads

    def wrong(self: Channel, frames: object, **options: bool) -> None:
        kinds = list(frames)  # type: ignore[call-overload]
        if kinds[0][0] == FrameKind.JOIN and "source" in self.peer:
            kinds = [(FrameKind.JOIN, Join("u", 1, 2, 2).to_payload())]
        send(self, kinds, **options)

    monkeypatch.setattr(Channel, "send_payloads", wrong)
    outcome = migrate(large, receiving.address, tmp_path, connections=2)
    assert isinstance(outcome.error, BadField)
    check_resumed(large)
