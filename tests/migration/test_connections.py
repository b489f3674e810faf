"""Pages over several connections: what arrives, who waits for whom, and what becomes of the guest when one is hurt."""

from __future__ import annotations

import errno
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import pytest

from kvmigrate.config import FEW_PAGES, MAX_CONNECTIONS, PAGE_BYTES, Address, MigrationParameters, default_connections
from kvmigrate.errors import ChannelError, ConfigError, HostError, PeerFailed
from kvmigrate.memory.region import GuestMemory
from kvmigrate.migration.abort import Abort
from kvmigrate.migration.channel import Channel
from kvmigrate.migration.sink import PART_PAGES, StreamSink, Writer
from kvmigrate.precopy.ledger import RoundRecord
from kvmigrate.precopy.rounds import Round
from kvmigrate.state.fidelity import Fidelity
from kvmigrate.state.section import Section
from tests.fake_machine import MIB, FakeMachine
from tests.migration.harness import (
    SILENCE_MS,
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
from tests.migration.test_migrate import settled

Receive = Callable[..., Receiving]
ProxyTo = Callable[..., Proxy]
OUT = ["JOIN", "PAGES", "ROUND", "LAST", "DONE"]
BACK = ["JOIN", "ROUND"]


def write_when_saved(machine: FakeMachine, nr_pages: int, value: bytes) -> None:
    """Make the last round one of ``nr_pages``."""
    save = machine.save

    def saving() -> Sequence[Section]:
        machine.write(0, value * (nr_pages * PAGE_BYTES // len(value)))
        return save()

    machine.save = saving  # type: ignore[method-assign]


@pytest.mark.parametrize("compression", ["none", "zstd", "auto"])
@pytest.mark.parametrize("connections", [2, 5, MAX_CONNECTIONS])
def test_a_writing_guest_arrives_whole(tmp_path: Path, receive: Receive, connections: int, compression: str) -> None:
    machine = FakeMachine(48 * MIB, running=True)
    machine.fill(3000)
    machine.write(4000 * PAGE_BYTES, b"compressible" * (8 * MIB // 12))
    machine.start_writer(3000, 30_000)
    receiving = receive()
    outcome = migrate(
        machine, receiving.address, tmp_path, connections=connections, compression=compression, downtime_limit_ms=100.0
    )
    assert outcome.result is not None, outcome.error
    settled(receiving)
    assert receiving.machine is not None
    assert receiving.machine.digest() == machine.digest()
    check_no_files(tmp_path)
    machine.close()


def test_each_connection_carries_pages_of_the_first_round_and_of_a_large_last_one(
    tmp_path: Path, large: FakeMachine, receive: Receive, proxy_to: ProxyTo
) -> None:
    write_when_saved(large, 30 * PART_PAGES, b"late")
    receiving = receive()
    proxy = proxy_to(receiving)
    # So slow that no thread comes too late for the first round, whatever else the machine does.
    outcome = migrate(large, proxy.address, tmp_path, connections=3, bandwidth_bytes_s=100 * MIB)
    settled(receiving)
    assert receiving.machine is not None
    assert receiving.machine.digest() == large.digest()
    for seen in proxy.seen_on[1:3]:
        once = [kind for n, kind in enumerate(seen["out"]) if kind != "PAGES" or seen["out"][n - 1] != "PAGES"]
        assert once == ["JOIN", "PAGES", "ROUND", "LAST", "PAGES", "DONE"]
        assert seen["back"] == BACK
    assert "JOIN" not in proxy.seen_on[0]["out"]
    assert outcome.result is not None
    assert [record.connections for record in outcome.result.rounds] == [3, 3]


def test_over_a_unix_socket(tmp_path: Path, large: FakeMachine, receive: Receive) -> None:
    receiving = receive(listen=Address.parse(f"unix:{tmp_path}/in.sock"))
    outcome = migrate(large, receiving.address, tmp_path, connections=MAX_CONNECTIONS)
    assert outcome.error is None
    settled(receiving)
    assert receiving.machine is not None
    assert receiving.machine.digest() == large.digest()


def test_where_only_one_connection_comes_through_the_error_says_what_to_do(
    tmp_path: Path, large: FakeMachine, receive: Receive, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(address: Address, abort: Abort, timeout_ms: float) -> Channel:
        raise HostError(str(address), errno.ECONNREFUSED)

    monkeypatch.setattr("kvmigrate.migration.joining.dial", refused)
    receiving = receive()
    outcome = migrate(large, receiving.address, tmp_path, connections=2)
    assert "connection 2 of 2" in str(outcome.error)
    assert "--connections 1" in str(outcome.error)
    check_resumed(large)
    receiving.join()
    assert not receiving.ran


def test_few_pages_are_not_spread(tmp_path: Path, large: FakeMachine, receive: Receive, proxy_to: ProxyTo) -> None:
    write_when_saved(large, PART_PAGES, b"late")
    receiving = receive()
    proxy = proxy_to(receiving)
    assert migrate(large, proxy.address, tmp_path, connections=3).error is None
    settled(receiving)
    assert [seen["out"][-1] for seen in proxy.seen_on[1:3]] == ["ROUND"] * 2


def test_the_last_pages_lie_over_what_loading_the_state_wrote(
    tmp_path: Path, large: FakeMachine, receive: Receive
) -> None:
    nr_pages = 8 * PART_PAGES
    write_when_saved(large, nr_pages, b"last")

    def slow(machine: FakeMachine) -> None:
        load = machine.load

        def loading(sections: Sequence[Section], *, more: bool = False) -> Fidelity:
            time.sleep(0.2)
            # As KVM does: some of what is loaded has it write to guest memory.
            machine.write(0, b"load" * (nr_pages * PAGE_BYTES // 4))
            return load(sections, more=more)

        machine.load = loading  # type: ignore[method-assign]

    receiving = receive(prepare=slow)
    assert migrate(large, receiving.address, tmp_path, connections=4).error is None
    settled(receiving)
    assert receiving.machine is not None
    assert receiving.machine.digest() == large.digest()


def test_rewritten_pages_go_as_what_changed_over_all_of_them(
    tmp_path: Path, receive: Receive, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = FakeMachine(32 * MIB, running=True)
    machine.fill(4000)
    end_round = StreamSink.end_round

    def then_write(self: StreamSink, record: RoundRecord) -> None:
        end_round(self, record)
        if record.round < 4:
            for page in range(2000):
                machine.write(page * PAGE_BYTES, bytes([record.round + 1]) * 8)

    monkeypatch.setattr(StreamSink, "end_round", then_write)
    receiving = receive()
    outcome = migrate(
        machine, receiving.address, tmp_path, connections=3, compression="zstd", bandwidth_bytes_s=40 * MIB,
        downtime_limit_ms=1.0,
    )  # fmt: skip
    assert outcome.result is not None, outcome.error
    settled(receiving)
    assert sum(record.pages_delta for record in outcome.result.rounds) > 1000
    assert receiving.machine is not None
    assert receiving.machine.digest() == machine.digest()
    machine.close()


def test_a_cap_is_one_for_all_connections(tmp_path: Path, large: FakeMachine, receive: Receive) -> None:
    receiving = receive()
    begin = time.monotonic()
    assert migrate(large, receiving.address, tmp_path, connections=4, bandwidth_bytes_s=32 * MIB).error is None
    assert time.monotonic() - begin > 0.8 * 16 * PART_PAGES * PAGE_BYTES / (32 * MIB)
    settled(receiving)


CELLS = [
    (way, kind, action)
    for way, kinds in (("out", OUT), ("back", BACK))
    for kind in kinds
    for action in ("cut", "hold", "flip")
]


@pytest.mark.parametrize("cell", CELLS, ids="-".join)
def test_any_fault_on_one_of_several_connections_resumes_the_source(
    tmp_path: Path, large: FakeMachine, receive: Receive, proxy_to: ProxyTo, cell: tuple[str, str, str]
) -> None:
    direction, kind, action = cell
    write_when_saved(large, 8 * PART_PAGES, b"last")
    receiving = receive(in_doubt_ms=200.0, timeout_ms=patience_ms(action))
    proxy = proxy_to(receiving, Rule(direction, 0, action, at=40, connection=3, kind=kind))
    # So slow that the third one gets pages too, whatever else the machine does.
    outcome = migrate(
        large, proxy.address, tmp_path, timeout_ms=patience_ms(action), connections=3, bandwidth_bytes_s=100 * MIB
    )
    assert outcome.error is not None
    assert "\n" not in str(outcome.error)
    check_resumed(large)
    receiving.join()
    assert not receiving.ran
    check_never_two(large, receiving)
    receiving.close()
    again = receive(name="again")
    assert migrate(large, again.address, tmp_path, connections=3).error is None
    settled(again)
    assert again.machine is not None
    assert again.machine.digest() == large.digest()


@pytest.mark.parametrize("action", ["cut", "hold"])
def test_the_connection_that_failed_is_named(
    tmp_path: Path, large: FakeMachine, receive: Receive, proxy_to: ProxyTo, action: str
) -> None:
    receiving = receive(timeout_ms=8000.0)
    proxy = proxy_to(receiving, Rule("out", 2, action, connection=2))
    outcome = migrate(large, proxy.address, tmp_path, connections=3, timeout_ms=SILENCE_MS)
    assert isinstance(outcome.error, ChannelError | PeerFailed)
    receiving.join()
    # Whoever notices first closes the others, and the other side may see only that.
    assert "(connection 2 of 3)" in f"{outcome.error} {receiving.error}"
    check_resumed(large)


def test_a_failure_beside_one_connection_ends_the_others_at_once(
    tmp_path: Path, large: FakeMachine, receive: Receive, monkeypatch: pytest.MonkeyPatch
) -> None:
    receiving = receive()
    write = Writer.write

    def failing(self: Writer, memory: GuestMemory, round_: Round) -> None:
        if "connection 2" in self.channel.peer:
            raise HostError("reading guest memory", 5)
        write(self, memory, round_)

    monkeypatch.setattr(Writer, "write", failing)
    begin = time.monotonic()
    # All of it would take eight seconds.
    outcome = migrate(large, receiving.address, tmp_path, connections=3, bandwidth_bytes_s=2 * MIB)
    assert isinstance(outcome.error, HostError)
    assert time.monotonic() - begin < 3.0
    check_resumed(large)
    receiving.join()
    assert not receiving.ran


def test_cancel_stops_every_connection(tmp_path: Path, large: FakeMachine, receive: Receive, proxy_to: ProxyTo) -> None:
    receiving = receive(timeout_ms=5000.0)
    proxy = proxy_to(receiving, Rule("out", 1, "hold", connection=2))
    source = make_source(large, proxy.address, tmp_path, timeout_ms=5000.0, connections=3)

    def cancel() -> None:
        proxy.hit.wait(5)
        source.cancel()

    threading.Thread(target=cancel, daemon=True).start()
    begin = time.monotonic()
    outcome = run(source)
    assert "cancelled by the operator" in str(outcome.error)
    assert time.monotonic() - begin < 2.0
    check_resumed(large)


def descriptors() -> Iterator[str]:
    """What this process has open."""
    for fd in sorted(Path("/proc/self/fd").iterdir()):
        with suppress(FileNotFoundError):  # the directory's own
            yield f"{fd.name} {fd.readlink()}"


def test_no_thread_and_no_descriptor_is_left(tmp_path: Path, receive: Receive) -> None:
    def left() -> tuple[Counter[str], Counter[str]]:
        return Counter(f"{thread.name} {thread.ident}" for thread in threading.enumerate()), Counter(descriptors())

    def once(name: str, rule: Rule | None) -> None:
        machine = FakeMachine(MIB, running=True)
        machine.fill(200)
        receiving = receive(name=name)
        proxy = Proxy(receiving.address, rule)
        assert (migrate(machine, proxy.address, tmp_path, connections=4).error is None) == (rule is None)
        receiving.join()
        proxy.close()
        receiving.close()
        machine.close()

    once("warm-up", None)
    time.sleep(0.2)
    before = left()
    for n, rule in enumerate([None, Rule("out", 0, "cut", connection=2, kind="ROUND"), None]):
        once(f"n{n}", rule)
    # A thread that has let go of everything may still be on its way out.
    until = time.monotonic() + 5.0
    while any(now.total() > then.total() for now, then in zip(left(), before, strict=True)):
        assert time.monotonic() < until, [now - then for now, then in zip(left(), before, strict=True)]
        time.sleep(0.02)


@pytest.mark.parametrize("connections", [-1, MAX_CONNECTIONS + 1])
def test_a_number_of_connections_that_cannot_be_is_refused(connections: int) -> None:
    with pytest.raises(ConfigError, match="connections"):
        MigrationParameters(connections=connections)


@pytest.mark.parametrize(("processors", "connections"), [(1, 1), (2, 2), (4, 4), (64, 4)])
def test_the_default_goes_by_the_processors(monkeypatch: pytest.MonkeyPatch, processors: int, connections: int) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(processors)))
    assert default_connections(FEW_PAGES) == connections


def test_a_small_guest_is_not_kept_waiting_for_further_connections() -> None:
    assert default_connections(FEW_PAGES - 1) == 1


@pytest.mark.parametrize(("nr_pages", "further"), [(FEW_PAGES + 100, True), (1000, False)])
def test_what_is_in_use_decides_how_many_are_opened(
    tmp_path: Path, receive: Receive, monkeypatch: pytest.MonkeyPatch, nr_pages: int, further: bool
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1, 2})
    machine = FakeMachine(48 * MIB, running=True)
    machine.fill(nr_pages)
    receiving = receive()
    outcome = migrate(machine, receiving.address, tmp_path, connections=0)
    assert outcome.result is not None, outcome.error
    assert outcome.result.rounds[0].connections == (3 if further else 1)
    settled(receiving)
    machine.close()
