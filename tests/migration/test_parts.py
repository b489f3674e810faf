"""The parts of a migration by themselves: frames' payloads, addresses, abort, the channel."""

from __future__ import annotations

import socket
import time
from pathlib import Path

import pytest
import xxhash
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from kvmigrate.config import MAX_CONNECTIONS, Address, MigrationParameters
from kvmigrate.contract import RunState
from kvmigrate.errors import (
    BadField,
    BadVersion,
    Cancelled,
    ChannelError,
    HostError,
    MigrationError,
    PeerTimeout,
    StreamError,
    TooLarge,
    UnexpectedFrame,
)
from kvmigrate.migration import source as source_module
from kvmigrate.migration import wire
from kvmigrate.migration.abort import Abort
from kvmigrate.migration.address import Listener, connect
from kvmigrate.migration.channel import MAX_BYTES, Channel
from kvmigrate.migration.checks import Check, Checked
from kvmigrate.migration.journal import Entry, Record, Role
from kvmigrate.migration.pages import Decompressor
from kvmigrate.migration.source import Source
from kvmigrate.migration.watchdog import Watchdog
from kvmigrate.state.fidelity import Fidelity
from kvmigrate.state.frame import FrameHeader, FrameKind, encode_frame, encode_header
from kvmigrate.state.section import pack, unpack
from tests.fake_machine import MIB, FakeMachine
from tests.migration.harness import LOCAL, Receiving

RECORD = Record("guest", "u-1", 7, Role.DESTINATION, Entry.RECEIVING, "tcp://h:1", 1)
MINE = wire.Query("u-1", 7)
u64 = st.integers(0, 2**64 - 1)
micros = st.integers(0, 1 << 30).map(lambda us: us / 1e3)


@given(u64, u64, u64, u64, st.booleans(), st.integers(0, MAX_CONNECTIONS - 1))
def test_end_comes_back_as_it_went(
    pages: int, cleared: int, digest: int, nr_hashed: int, autostart: bool, further: int
) -> None:
    end = wire.End(pages, cleared, digest, nr_hashed, autostart, further)
    assert wire.End.from_payload(end.to_payload()) == end


def test_over_one_connection_end_says_nothing_that_an_older_destination_does_not_know() -> None:
    said = unpack(wire.End(1, 2, 3, 4, True).to_payload(), "x")
    assert isinstance(said, dict)
    assert said.keys() == {"pages", "cleared", "digest", "nr_hashed", "autostart"}


@given(u64, u64, micros, micros)
def test_ready_comes_back_as_it_went(digest: int, nr_hashed: int, load_ms: float, check_ms: float) -> None:
    ready = wire.Ready(digest, nr_hashed, load_ms, check_ms)
    assert wire.Ready.from_payload(ready.to_payload()) == ready


@given(st.binary(max_size=200))
@pytest.mark.parametrize(
    "parse",
    [
        wire.Hello,
        wire.Resident,
        wire.Round,
        wire.End,
        wire.Ready,
        wire.Running,
        wire.Query,
        wire.Answer,
        wire.Failed,
        Check,
        Checked,
    ],
)
def test_any_bytes_are_a_payload_or_a_stream_error(parse: type[wire.End], payload: bytes) -> None:
    try:
        parse.from_payload(payload)
    except StreamError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize(
    "change",
    [{"more": 1}, {"digest": -1}, {"digest": True}, {"digest": 1.5}, {"digest": ""}, {"autostart": 1}, {"pages": None}],
)
def test_a_field_too_many_or_of_a_wrong_type_is_refused(change: dict[str, object]) -> None:
    value = unpack(wire.End(1, 2, 3, 4, True).to_payload(), "x") | change
    with pytest.raises(BadField):
        wire.End.from_payload(pack(value))


def test_the_answer_to_commit_has_room_for_what_64_vcpus_adjust() -> None:
    fidelity = Fidelity()
    for cpu in range(64):
        for item in range(8):
            fidelity.adjusted(
                f"vcpu{cpu}.msrs.MSR_{item}", 2**64 - 1, 2**64 - 1, "the TSC goes on from the saved value"
            )
    payload = wire.Running(1.0, 1.0, 1.0, fidelity.to_value()).to_payload()
    assert 16 << 10 < len(payload) <= MAX_BYTES[FrameKind.RUNNING]


def test_a_later_format_is_refused_by_number() -> None:
    hello = unpack(wire.Hello(1, (), "u", 1, "n").to_payload(), "x")
    with pytest.raises(BadVersion, match="format 2"):
        wire.Hello.from_payload(pack(hello | {"format": 2}))
    with pytest.raises(BadVersion, match="'multifd', which this kvmigrate does not know"):
        wire.Hello.from_payload(pack(hello | {"features": ["multifd"]}))


def test_sections_without_their_size_are_refused() -> None:
    with pytest.raises(BadField):
        wire.Round.from_payload(wire.Round(0, 0, 0, 0, 4, 10).to_payload())
    with pytest.raises(BadField):
        wire.Round.from_payload(wire.Round(0, 0, 0, 0, 0, 100).to_payload())
    with pytest.raises(BadField):
        wire.Round.from_payload(wire.Round(0, 0, 0, 0, 4, wire.MAX_SECTIONS_BYTES + 1).to_payload())


def test_a_peers_text_is_one_printable_line() -> None:
    failed = wire.Failed("E", "", "\x1b[2Jgone\nand " + "x" * 1000)
    error = wire.Failed.from_payload(pack(failed.to_value())).to_error("peer")
    assert "\x1b" not in str(error)
    assert "\n" not in str(error)
    assert len(str(error)) < 500


def test_an_address_in_use_says_what_to_do(tmp_path: Path) -> None:
    for address in (LOCAL, Address(path=str(tmp_path / "s"))):
        listener = Listener(address)
        with pytest.raises(HostError, match="take another, or stop what listens there"):
            Listener(listener.address)
        listener.close()


def test_a_stale_socket_is_taken_over_and_a_file_is_not(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    listener = Listener(Address(path=str(path)))
    listener.close()
    assert not path.exists()
    path.write_text("precious")
    with pytest.raises(HostError):
        Listener(Address(path=str(path)))
    assert path.read_text() == "precious"


def test_nobody_there_says_what_to_do(tmp_path: Path) -> None:
    listener = Listener(LOCAL)
    listener.close()
    abort = Abort()
    for address in (listener.address, Address(path=str(tmp_path / "none"))):
        with pytest.raises(HostError, match="start `kvmigrate receive` first"):
            connect(address, abort, 1000)
    with pytest.raises(ChannelError, match="cannot be looked up"):
        connect(Address("no-such-host.invalid", 1), abort, 1000)
    abort.close()


def test_a_bound_wakes_whoever_sleeps() -> None:
    abort = Abort()
    watchdog = Watchdog(abort)
    watchdog.start()
    begin = time.monotonic()
    watchdog.bound(50, PeerTimeout("late"))
    with pytest.raises(PeerTimeout):
        abort.sleep(10_000)
    assert 0.05 <= time.monotonic() - begin < 5
    watchdog.close()
    abort.close()


def test_what_is_over_in_time_is_not_bound_any_more() -> None:
    abort = Abort()
    watchdog = Watchdog(abort)
    watchdog.start()
    watchdog.bound(150, PeerTimeout("late"))
    watchdog.close()
    abort.sleep(400)
    abort.close()


def test_after_the_point_of_no_return_nothing_fires() -> None:
    abort = Abort()
    abort.disarm()
    assert not abort.fire(Cancelled("late"))
    abort.sleep(1)
    abort.close()


def test_a_cancel_before_the_point_of_no_return_is_seen_there() -> None:
    abort = Abort()
    assert abort.fire(Cancelled("in time"))
    with pytest.raises(Cancelled):
        abort.disarm()
    abort.close()


def exchange(data: bytes) -> tuple[Channel, Abort]:
    """A channel on which ``data`` and then the end of the stream have come."""
    near, far = socket.socketpair()
    far.sendall(data)
    far.close()
    abort = Abort()
    return Channel(near, abort, 500.0, "the peer"), abort


@pytest.mark.parametrize("kind", sorted(MAX_BYTES))
def test_a_frame_over_its_limit_is_refused_before_it_is_read(kind: int) -> None:
    channel, abort = exchange(encode_header(FrameHeader(kind, 1, MAX_BYTES[kind] + 1, 0, 0)))
    with pytest.raises(TooLarge):
        channel.recv()
    channel.close()
    abort.close()


def test_an_unknown_optional_frame_is_skipped_and_a_mandatory_one_is_not() -> None:
    optional = encode_header(FrameHeader(99, 0, 3, xxhash.xxh3_64_intdigest(b"abc"), 0)) + b"abc"
    channel, abort = exchange(optional + encode_frame(FrameKind.DONE, pack({}), 1))
    assert channel.recv().kind == FrameKind.DONE
    channel.close()
    channel, _ = exchange(encode_header(FrameHeader(99, 1, 3, 0, 0)) + b"abc")
    assert channel.recv().name == "kind 99"
    channel.close()
    abort.close()


def test_a_repeated_frame_is_refused() -> None:
    frame = encode_frame(FrameKind.DONE, pack({}), 0)
    channel, abort = exchange(frame + frame)
    channel.recv()
    with pytest.raises(BadField, match="frame 0 came where frame 1 was due"):
        channel.recv()
    channel.close()
    abort.close()


def test_compressed_pages_of_another_size_are_refused_before_they_are_expanded() -> None:
    expand = Decompressor()._expand
    bomb = zstandard.compress(bytes(64 << 20))
    with pytest.raises(BadField, match="another size"):
        expand(bomb, 4096)
    good = zstandard.compress(b"x" * 4096)
    assert expand(good, 4096) == b"x" * 4096
    for damaged in (good + b"trailing", good[:-1], b"", b"not zstd", good[:4] + b"\xff" + good[5:]):
        with pytest.raises(StreamError):
            expand(damaged, 4096)


def talk(receiving: Receiving, *frames: tuple[FrameKind, bytes]) -> None:
    """Say ``frames`` to a destination and wait until it hangs up."""
    with socket.create_connection((receiving.address.host, receiving.address.port)) as sock:
        for number, (kind, payload) in enumerate(frames):
            sock.sendall(encode_frame(kind, payload, number))
        sock.settimeout(10)
        try:
            while sock.recv(1 << 16):
                continue
        except OSError:
            pass
    receiving.join()


HELLO = (FrameKind.HELLO, wire.Hello(wire.FORMAT, (), "u-1", 7, "guest").to_payload())
CONFIG = (
    FrameKind.CONFIG,
    pack({"name": "guest", "uuid": "u-1", "memory_bytes": MIB, "slots": [[0, 0, 256]]}),
)
SWITCH = (FrameKind.ROUND, wire.Round(0, 0, 0, 0, 1, 1000).to_payload())


@pytest.mark.parametrize(
    ("frames", "text"),
    [
        ([CONFIG], "the frame CONFIG may not come while waiting for a source"),
        ([HELLO, HELLO], "the frame HELLO may not come while waiting for CONFIG"),
        ([HELLO, (FrameKind.COMMIT, wire.commit_payload(7))], "the frame COMMIT may not come while waiting for CONFIG"),
        ([HELLO, CONFIG, CONFIG], "the frame CONFIG may not come while receiving pages"),
        ([HELLO, CONFIG, (FrameKind.COMMIT, wire.commit_payload(7))], "the frame COMMIT may not come while receiving"),
        ([HELLO, CONFIG, (FrameKind.END, wire.End(0, 0, 0, 0, True).to_payload())], "the frame END may not come"),
        ([HELLO, CONFIG, SWITCH, SWITCH, (FrameKind.DONE, bytes(2000))], "the frame ROUND may not come"),
    ],
)
def test_a_frame_at_the_wrong_time_is_named_with_the_state(
    tmp_path: Path, frames: list[tuple[FrameKind, bytes]], text: str
) -> None:
    receiving = Receiving(tmp_path)
    talk(receiving, *frames)
    assert isinstance(receiving.error, UnexpectedFrame), receiving.error
    assert any(part in str(receiving.error) for part in text.split("|"))
    assert not receiving.ran
    receiving.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("run", [(0, 257), (256, 1), (1 << 40, 1), (2**64 - 1, 2**64 - 1)])
def test_a_hint_at_memory_that_is_none_is_refused(tmp_path: Path, run: tuple[int, int]) -> None:
    receiving = Receiving(tmp_path)
    talk(receiving, HELLO, CONFIG, (FrameKind.RESIDENT, wire.Resident((run,)).to_payload()))
    assert isinstance(receiving.error, BadField), receiving.error
    assert not receiving.ran
    receiving.close()


@pytest.mark.parametrize(
    "config",
    [
        pack([]),
        pack({"uuid": "u-2"}),
        pack({"uuid": "u-1"}),
        pack({"name": "guest", "uuid": "u-1", "memory_bytes": 1 << 62, "slots": []}),
        pack({"name": "guest", "uuid": "u-1", "memory_bytes": -1, "slots": []}),
        pack({"name": "guest", "uuid": "u-1", "memory_bytes": MIB, "slots": [[0, 0, 257]]}),
        b"\xc1",
    ],
)
def test_a_hostile_config_is_refused(tmp_path: Path, config: bytes) -> None:
    receiving = Receiving(tmp_path)
    talk(receiving, HELLO, (FrameKind.CONFIG, config))
    assert isinstance(receiving.error, StreamError), receiving.error
    receiving.close()


def test_something_that_is_not_ours_is_refused_at_once(tmp_path: Path) -> None:
    receiving = Receiving(tmp_path)
    with socket.create_connection((receiving.address.host, receiving.address.port)) as sock:
        sock.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        receiving.join()
    assert isinstance(receiving.error, StreamError)
    assert "not a kvmigrate stream" in str(receiving.error)
    receiving.close()


def test_a_commit_for_another_attempt_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = FakeMachine(MIB, running=True)
    receiving = Receiving(tmp_path)
    real = wire.commit_payload
    monkeypatch.setattr(wire, "commit_payload", lambda epoch: real(epoch + 1))
    source = Source(machine, receiving.address, MigrationParameters(timeout_ms=2000.0), tmp_path)
    with pytest.raises(MigrationError, match="gave the guest up before it ran there"):
        source.run()
    receiving.join()
    assert not receiving.ran
    assert machine.running
    receiving.close()
    machine.close()


def test_even_a_bug_after_commit_does_not_resume_the_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = FakeMachine(MIB, running=True)
    receiving = Receiving(tmp_path)

    def broken(*_: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(source_module, "commit", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        Source(machine, receiving.address, MigrationParameters(timeout_ms=500.0), tmp_path).run()
    assert machine.runstate is RunState.FINISH_MIGRATE
    receiving.close()
    machine.close()
