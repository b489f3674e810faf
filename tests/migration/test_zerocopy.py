"""Moves whose pages leave from where they lie: what arrives, what is refused, and what the result says of it."""

from __future__ import annotations

import dataclasses
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import pytest

from kvmigrate._core import lib
from kvmigrate.cli import report
from kvmigrate.config import PAGE_BYTES, Address, Compression, MigrationParameters
from kvmigrate.errors import ConfigError, KvmigrateError, PeerTimeout, UnsupportedError
from kvmigrate.memory.region import GuestMemory
from kvmigrate.migration.abort import Abort
from kvmigrate.migration.channel import Channel
from kvmigrate.migration.sink import StreamSink
from kvmigrate.migration.zerocopy import References, lockable_bytes, require_possible
from kvmigrate.state.frame import FrameKind
from tests.fake_machine import MIB, FakeMachine
from tests.memory.limits import drop_ipc_lock, in_thread, lockable
from tests.memory.tools import fill, new_round
from tests.migration.harness import (
    Outcome,
    Proxy,
    Receiving,
    Rule,
    check_never_two,
    check_no_files,
    check_resumed,
    make_source,
    migrate,
    patience_ms,
    run,
)
from tests.migration.shaped import THERE, ShapedLink, possible
from tests.migration.test_migrate import settled

Receive = Callable[..., Receiving]
ProxyTo = Callable[..., Proxy]


def references(outcome: Outcome) -> References:
    """What came of the sends of a move that went well."""
    assert outcome.result is not None, outcome.error
    assert outcome.result.zero_copy is not None
    return outcome.result.zero_copy


def arrived(receiving: Receiving, machine: FakeMachine) -> None:
    settled(receiving)
    assert receiving.machine is not None
    assert receiving.machine.digest() == machine.digest()


@pytest.mark.parametrize("compression", ["none", "auto"])
@pytest.mark.parametrize("connections", [1, 3])
def test_a_writing_guest_arrives_whole(tmp_path: Path, receive: Receive, connections: int, compression: str) -> None:
    machine = FakeMachine(48 * MIB, running=True)
    machine.fill(8000)
    machine.start_writer(3000, 30_000)
    receiving = receive()
    outcome = migrate(
        machine, receiving.address, tmp_path, connections=connections, compression=compression, zero_copy=True,
        downtime_limit_ms=100.0,
    )  # fmt: skip
    found = references(outcome)
    assert found.sends > 0
    assert 0 < found.copied <= found.sends, "over the loopback the kernel copies in the end"
    arrived(receiving, machine)
    check_no_files(tmp_path)
    machine.close()


def test_without_it_nothing_is_said_of_it(tmp_path: Path, large: FakeMachine, receive: Receive) -> None:
    receiving = receive()
    outcome = migrate(large, receiving.address, tmp_path)
    assert outcome.result is not None and outcome.result.zero_copy is None
    assert "zero-copy" not in outcome.result.to_value()
    settled(receiving)


@pytest.mark.skipif(not possible(), reason="a shaped link takes root, ip and tc")
def test_over_a_slow_link_on_which_pages_wait_a_writing_guest_arrives_whole(tmp_path: Path) -> None:
    """In the queue of a veth pair's token bucket pages lie by reference until they leave."""
    machine = FakeMachine(16 * MIB, running=True)
    machine.fill(2000)
    machine.start_writer(2000, 20_000)
    link = ShapedLink("400mbit")
    try:
        with link.there():
            receiving = Receiving(tmp_path, listen=Address(THERE, 0))
        outcome = migrate(machine, receiving.address, tmp_path, zero_copy=True, downtime_limit_ms=300.0)
        receiving.join()
        assert references(outcome).sends > 0
        arrived(receiving, machine)
        receiving.close()
    finally:
        link.close()
        machine.close()


class TestRefused:
    """What cannot be is said before a page moves, and the guest runs on."""

    def refused(self, machine: FakeMachine, receiving: Receiving, directory: Path, connections: int = 1) -> str:
        outcome = migrate(machine, receiving.address, directory, zero_copy=True, connections=connections)
        assert isinstance(outcome.error, ConfigError)
        assert "\n" not in str(outcome.error) and "--zerocopy" in str(outcome.error)
        check_resumed(machine)
        assert not receiving.ran and receiving.machine is None
        return str(outcome.error)

    def test_over_a_unix_socket(self, tmp_path: Path, large: FakeMachine, receive: Receive) -> None:
        receiving = receive(listen=Address.parse(f"unix:{tmp_path}/in.sock"))
        assert "UNIX socket" in self.refused(large, receiving, tmp_path)

    def test_where_too_little_memory_may_be_locked(self, tmp_path: Path, large: FakeMachine, receive: Receive) -> None:
        receiving = receive()

        def work() -> str:
            drop_ipc_lock()
            return self.refused(large, receiving, tmp_path, connections=3)

        with lockable(2 * MIB):
            assert "3072 KiB" in in_thread(work)

    def test_of_pages_that_are_all_compressed(self) -> None:
        parameters = MigrationParameters(zero_copy=True, compression=Compression(3))
        with pytest.raises(ConfigError, match="zstd:3"):
            require_possible(Address("127.0.0.1", 1), parameters)
        require_possible(Address("127.0.0.1", 1), dataclasses.replace(parameters, zero_copy=False))

    def test_by_a_socket_that_cannot(self) -> None:
        ours, theirs = socket.socketpair()
        abort = Abort()
        with ours, theirs, pytest.raises(UnsupportedError, match="MSG_ZEROCOPY"):
            Channel(ours, abort, 1000.0, "a peer").send_by_reference()
        abort.close()


def test_who_may_lock_everything_has_no_limit() -> None:
    def without() -> int | None:
        drop_ipc_lock()
        return lockable_bytes()

    with lockable(MIB):
        assert in_thread(without) == MIB


def test_where_the_limit_is_reached_on_the_way_the_move_goes_on_and_says_so(
    tmp_path: Path, large: FakeMachine, receive: Receive
) -> None:
    receiving = receive()

    def work() -> Outcome:
        drop_ipc_lock()
        source = make_source(large, receiving.address, tmp_path, zero_copy=True)
        sink = source._open_sink

        def then_limit(channel: Channel) -> StreamSink:
            limit.enter_context(lockable(PAGE_BYTES))
            return sink(channel)

        source._open_sink = then_limit  # type: ignore[method-assign]
        return run(source)

    with ExitStack() as limit:
        found = references(in_thread(work))
    assert (found.sends, found.copied) == (0, 0)
    assert found.refused > 0
    arrived(receiving, large)


@pytest.mark.parametrize("connection", [1, 3])
@pytest.mark.parametrize("action", ["cut", "hold", "flip"])
def test_a_link_that_fails_with_sends_under_way_resumes_the_source(
    tmp_path: Path, large: FakeMachine, receive: Receive, proxy_to: ProxyTo, action: str, connection: int
) -> None:
    receiving = receive(in_doubt_ms=200.0, timeout_ms=patience_ms(action))
    proxy = proxy_to(receiving, Rule("out", 0, action, at=200_000, connection=connection, kind="PAGES"))
    # Under a cap no connection takes all there is before the others have begun.
    outcome = migrate(
        large, proxy.address, tmp_path, connections=connection, zero_copy=True, timeout_ms=patience_ms(action),
        bandwidth_bytes_s=64 * MIB,
    )  # fmt: skip
    assert proxy.hit.is_set()
    assert outcome.error is not None
    assert "\n" not in str(outcome.error)
    check_resumed(large)
    receiving.join()
    check_never_two(large, receiving)
    receiving.close()
    again = receive(name="again")
    assert references(migrate(large, again.address, tmp_path, connections=connection, zero_copy=True)).sends > 0
    arrived(again, large)


def test_cancel_does_not_wait_for_sends_under_way(
    tmp_path: Path, large: FakeMachine, receive: Receive, proxy_to: ProxyTo
) -> None:
    receiving = receive(timeout_ms=5000.0)
    proxy = proxy_to(receiving, Rule("out", 0, "hold", kind="PAGES"))
    source = make_source(large, proxy.address, tmp_path, timeout_ms=5000.0, zero_copy=True)

    def cancel() -> None:
        proxy.hit.wait(5)
        source.cancel()

    threading.Thread(target=cancel, daemon=True).start()
    begin = time.monotonic()
    outcome = run(source)
    assert "cancelled by the operator" in str(outcome.error)
    assert time.monotonic() - begin < 2.0
    check_resumed(large)


@contextmanager
def reports_waiting() -> Iterator[tuple[Channel, socket.socket]]:
    """A channel of whose sends the kernel has something to report, and its peer."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ours, theirs = socket.create_connection(listener.getsockname()), listener.accept()[0]
    abort = Abort()
    channel = Channel(ours, abort, 300.0, "a peer")
    channel.send_by_reference()
    with theirs, closing(abort), closing(channel), GuestMemory(MIB) as memory:
        fill(memory, range(8))
        round_ = new_round(first=True)
        round_.zerocopy = channel.zero_copy
        lib.kmig_round_begin(memory.handle, round_)
        assert lib.kmig_stream_send_some(memory.handle, round_, channel.fd, channel.sequence, 99, 2**63) == 0
        assert channel.zero_copy.sends == 1
        poll = select.poll()
        poll.register(channel.fd, 0)
        assert poll.poll(5000) == [(channel.fd, select.POLLERR)]
        yield channel, theirs


def test_a_report_is_no_word_of_the_peers() -> None:
    with reports_waiting() as (channel, _):
        assert not channel.pending()
        assert channel.zero_copy.reported == 1


def test_waiting_for_the_peer_sleeps_though_a_report_waits() -> None:
    with reports_waiting() as (channel, _):
        used, began = time.thread_time(), time.monotonic()
        with pytest.raises(PeerTimeout):
            channel.recv()
        assert time.monotonic() - began > 0.25
        assert time.thread_time() - used < 0.1


def test_a_peer_that_speaks_or_dies_is_heard_behind_a_report() -> None:
    with reports_waiting() as (channel, theirs):
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        theirs.close()
        assert channel.pending()
        with pytest.raises(KvmigrateError, match="closed the connection"):
            channel.recv()


def test_control_frames_are_never_sent_by_reference() -> None:
    with reports_waiting() as (channel, _):
        channel.send_payloads([(FrameKind.SECTION, bytes(100_000))])
        assert channel.zero_copy.sends == 1


@pytest.mark.parametrize(
    ("counts", "line"),
    [
        ((12, 0, 0), "zero-copy: 12 sends without a copy"),
        ((1200, 7, 0), "zero-copy: copied by the kernel anyway: 7 of 1,200 sends"),
        ((12, 12, 0), "zero-copy: copied by the kernel anyway: 12 of 12 sends (nothing is gained by it on this link)"),
        ((12, 0, 3), "zero-copy: 12 sends without a copy; 3 went as a copy, since too many were under way or no more"),
        ((0, 0, 3), "zero-copy: 0 sends without a copy; 3 went as a copy"),
    ],
)
def test_the_report_says_what_it_brought(counts: tuple[int, int, int], line: str) -> None:
    value = References(*counts).to_value()
    assert report.zero_copy({name: int(str(count)) for name, count in value.items()}).startswith(line)
