"""A peer on this host is known as one, and its pages are not copied on their way there."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from kvmigrate.config import Address
from kvmigrate.migration.abort import Abort
from kvmigrate.migration.address import Listener, connect
from kvmigrate.migration.channel import Channel
from kvmigrate.migration.local import on_this_host
from kvmigrate.migration.sink import StreamSink
from tests.fake_machine import FakeMachine

from .harness import Receiving, migrate
from .test_migrate import settled

Receive = Callable[..., Receiving]
HERE = ["127.0.0.1", "::1"]
AS_FROM_ELSEWHERE = "127.0.0.2"
"""An address of this host that connections come to from another one of its addresses."""


def connected(host: str) -> tuple[socket.socket, socket.socket]:
    abort = Abort()
    listener = Listener(Address(host, 0))
    try:
        ours = connect(listener.address, abort, 1000.0)
        theirs = listener.accept(abort)
    finally:
        listener.close()
        abort.close()
    assert theirs is not None
    return ours, theirs


def congestion_control(sock: socket.socket) -> bytes:
    return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16).rstrip(b"\0")


@pytest.mark.parametrize(("host", "here"), [*((host, True) for host in HERE), (AS_FROM_ELSEWHERE, False)])
def test_both_sides_of_a_connection_within_this_host_have_one_address(host: str, here: bool) -> None:
    ours, theirs = connected(host)
    with ours, theirs:
        assert on_this_host(ours) is on_this_host(theirs) is here


def test_a_unix_socket_leads_nowhere_else() -> None:
    for sock in socket.socketpair():
        with sock:
            assert on_this_host(sock)


def test_of_a_socket_without_a_peer_nothing_is_said() -> None:
    with socket.socket() as sock:
        assert not on_this_host(sock)


@pytest.mark.parametrize("host", HERE)
def test_within_this_host_nothing_is_paced(host: str) -> None:
    ours, theirs = connected(host)
    with ours, theirs:
        assert congestion_control(ours) == b"reno"


def test_to_elsewhere_the_hosts_own_congestion_control_stays() -> None:
    default = Path("/proc/sys/net/ipv4/tcp_congestion_control").read_text().strip().encode()
    ours, theirs = connected(AS_FROM_ELSEWHERE)
    with ours, theirs:
        assert congestion_control(ours) == default


@pytest.mark.parametrize("connections", [1, 3])
@pytest.mark.parametrize(("host", "spliced"), [("127.0.0.1", True), (AS_FROM_ELSEWHERE, False), ("", True)])
def test_only_within_this_host_do_pages_go_through_pipes(
    tmp_path: Path,
    large: FakeMachine,
    receive: Receive,
    monkeypatch: pytest.MonkeyPatch,
    host: str,
    spliced: bool,
    connections: int,
) -> None:
    opened: list[Channel] = []
    sent: list[int] = []
    spare_copies, close = StreamSink.spare_copies, StreamSink.close

    def note(sink: StreamSink, *, zero_copy: bool) -> None:
        spare_copies(sink, zero_copy=zero_copy)
        opened.extend(sink._channels)

    def count(sink: StreamSink) -> None:
        sent.extend(channel.splice.sent_bytes for channel in opened if channel.splice)
        close(sink)

    monkeypatch.setattr(StreamSink, "spare_copies", note)
    monkeypatch.setattr(StreamSink, "close", count)
    receiving = receive(listen=Address(host, 0) if host else Address.parse(f"unix:{tmp_path}/in.sock"))
    outcome = migrate(large, receiving.address, tmp_path, connections=connections)
    assert outcome.result is not None, outcome.error
    settled(receiving)
    assert receiving.machine is not None and receiving.machine.digest() == large.digest()
    assert len(opened) == connections
    # Which of them gets how much is chance.
    assert len(sent) == (connections if spliced else 0)
    assert (sum(sent) > 0) is spliced
    # The first one's is closed with it, after the sink.
    assert all(channel.splice.fd[0] == -1 for channel in opened if channel.splice)
