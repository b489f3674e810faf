"""A migration that nothing disturbs: what arrives, what it tells, and what it leaves behind."""

from __future__ import annotations

import gc
import json
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from kvmigrate.config import Address
from kvmigrate.contract import RunState
from kvmigrate.errors import NotConverged
from kvmigrate.memory.region import GuestMemory
from kvmigrate.migration.abort import Abort
from kvmigrate.migration.pages import ANNOUNCED_PAGES
from kvmigrate.migration.warming import WARM_FOR_S, WarmUp
from tests.fake_machine import MIB, FakeMachine
from tests.migration.harness import Proxy, Receiving, check_no_files, check_resumed, migrate

TRIED = ["CHECK", "SECTION", "SECTION"]
LAST = ["ROUND", "SECTION", "ROUND", "SECTION", "PAGES", "END", "COMMIT", "DONE"]
OUT = ["HELLO", "CONFIG", *TRIED, "PAGES", "ROUND", *LAST]
BACK = ["HELLO", "ACCEPT", "CHECKED", "ROUND", "READY", "RUNNING"]
Receive = Callable[..., Receiving]


def settled(receiving: Receiving) -> None:
    """Wait until the destination has heard DONE."""
    receiving.join()
    assert receiving.error is None
    assert receiving.destination._custody is not None
    assert receiving.destination._custody.told.wait(5)
    receiving.destination.close()


@pytest.mark.parametrize("compression", ["none", "zstd", "zstd:-5"])
def test_every_page_and_the_state_arrive(
    tmp_path: Path, source_machine: FakeMachine, receive: Receive, compression: str
) -> None:
    source_machine.fill(150, first=30)
    source_machine.write(200 * 4096, b"compressible" * 3000)
    source_machine.state["cpu0"]["rip"] = 0xFFFFFFFF81000000
    receiving = receive()
    outcome = migrate(source_machine, receiving.address, tmp_path, compression=compression)
    settled(receiving)
    assert outcome.error is None
    assert receiving.machine is not None
    assert receiving.machine.digest() == source_machine.digest()
    assert receiving.machine.runstate is RunState.RUNNING
    assert source_machine.runstate is RunState.POSTMIGRATE
    assert not source_machine.dirty_log.active
    check_no_files(tmp_path)


def test_a_writing_guest_arrives_whole(tmp_path: Path, receive: Receive) -> None:
    machine = FakeMachine(32 * MIB, running=True)
    machine.fill(6000)
    machine.start_writer(3000, 40_000)
    receiving = receive()
    # So long that the guest has written to many pages meanwhile, and more than fit into the limit.
    outcome = migrate(
        machine, receiving.address, tmp_path, timeout_ms=5000, bandwidth_bytes_s=400 * MIB, downtime_limit_ms=5
    )
    settled(receiving)
    assert outcome.result is not None, outcome.error
    assert receiving.machine is not None
    assert receiving.machine.digest() == machine.digest()
    assert len(outcome.result.rounds) >= 3, "a guest that writes takes more than one round"
    machine.close()


def test_the_frames_are_those_of_the_specification(
    tmp_path: Path, source_machine: FakeMachine, receive: Receive, proxy_to: Callable[..., Proxy]
) -> None:
    receiving = receive()
    proxy = proxy_to(receiving)
    assert migrate(source_machine, proxy.address, tmp_path).error is None
    settled(receiving)
    assert proxy.seen == {"out": OUT, "back": BACK}


def test_both_sides_warm_up_before_the_guest_has_to_wait(
    tmp_path: Path, source_machine: FakeMachine, receive: Receive
) -> None:
    receiving = receive()
    outcome = migrate(source_machine, receiving.address, tmp_path)
    settled(receiving)
    assert outcome.result is not None and receiving.machine is not None
    assert set(source_machine.warmed_in) == {RunState.RUNNING}
    assert set(receiving.machine.warmed_in) == {RunState.INMIGRATE}


def test_the_source_warms_up_while_the_destination_does(
    tmp_path: Path, source_machine: FakeMachine, receive: Receive, monkeypatch: pytest.MonkeyPatch
) -> None:
    receiving = receive(prepare=partial(meet, threading.Barrier(2, timeout=5.0), source_machine))
    outcome = migrate(source_machine, receiving.address, tmp_path)
    settled(receiving)
    assert outcome.error is None, "neither waits for the other one to be done with it"


def meet(barrier: threading.Barrier, source: FakeMachine, destination: FakeMachine) -> None:
    """Have the first warm-up of either wait for the other's."""
    for machine in (source, destination):
        machine.warm_up = partial(_warm_up, barrier, machine)  # type: ignore[method-assign]


def _warm_up(barrier: threading.Barrier, machine: FakeMachine) -> None:
    if not machine.warmed_in:
        barrier.wait()
    FakeMachine.warm_up(machine)


def test_what_was_just_gone_through_is_not_gone_through_again(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    abort = Abort()
    machine, warm_up = FakeMachine(MIB), WarmUp(abort)
    for at, times in ((100.0, 1), (100.0 + WARM_FOR_S / 2, 1), (100.0 + WARM_FOR_S, 2), (200.0, 3)):
        now[0] = at
        warm_up.go(machine)
        assert len(machine.warmed_in) == times
    machine.close()
    warm_up.close()
    abort.close()


def test_before_a_short_round_a_destination_warms_up_while_the_source_begins_it_and_while_it_pauses(
    tmp_path: Path, source_machine: FakeMachine, receive: Receive, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvmigrate.migration.warming.WARM_FOR_S", 60.0)
    receiving = receive()
    assert migrate(source_machine, receiving.address, tmp_path).error is None
    settled(receiving)
    assert receiving.machine is not None and receiving.machine.warmed_in == [RunState.INMIGRATE] * 2


def test_a_destination_that_has_tried_the_state_warms_up_before_the_first_round_comes(
    tmp_path: Path, source_machine: FakeMachine, receive: Receive, monkeypatch: pytest.MonkeyPatch
) -> None:
    warm = threading.Event()
    start = source_machine.dirty_log.start
    in_time: list[bool] = []

    def starting() -> None:
        in_time.append(warm.wait(5.0))
        start()

    monkeypatch.setattr(source_machine.dirty_log, "start", starting)
    receiving = receive(prepare=lambda machine: setattr(machine, "warm_up", warm.set))
    assert migrate(source_machine, receiving.address, tmp_path).error is None
    settled(receiving)
    assert in_time == [True]


def test_a_destination_warms_up_once_it_has_answered_and_the_source_pauses(
    tmp_path: Path, source_machine: FakeMachine, receive: Receive, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvmigrate.migration.warming.WARM_FOR_S", 60.0)
    paused = threading.Event()
    pause = source_machine.pause

    def pausing(reason: RunState = RunState.PAUSED) -> None:
        pause(reason)
        paused.set()

    monkeypatch.setattr(source_machine, "pause", pausing)
    in_time: list[bool] = []

    def warm_up() -> None:
        # The first time the source has just begun.
        in_time.append(bool(in_time) and paused.wait(5.0))

    receiving = receive(prepare=lambda machine: setattr(machine, "warm_up", warm_up))
    assert migrate(source_machine, receiving.address, tmp_path).error is None
    settled(receiving)
    assert in_time == [False, True]


def test_a_warm_up_whose_source_has_said_something_is_cut_short(monkeypatch: pytest.MonkeyPatch) -> None:
    abort = Abort()
    machine, warm_up = FakeMachine(MIB), WarmUp(abort)
    talks: list[bool] = []
    monkeypatch.setattr(WarmUp, "_talk", lambda _: talks.append(True))
    warm_up.now(machine, lambda: True)
    assert (len(machine.warmed_in), talks) == (1, [])
    warm_up.now(machine, lambda: False)
    assert (len(machine.warmed_in), talks) == (2, [True])
    machine.close()
    abort.close()


def test_a_page_written_while_saving_arrives(tmp_path: Path, source_machine: FakeMachine, receive: Receive) -> None:
    receiving = receive()
    migrate(source_machine, receiving.address, tmp_path)
    settled(receiving)
    assert receiving.machine is not None
    assert receiving.machine.memory.read(4096, 22) == b"completed while saving"


def test_a_paused_guest_arrives_paused(tmp_path: Path, source_machine: FakeMachine, receive: Receive) -> None:
    source_machine.pause(RunState.PAUSED)
    receiving = receive()
    assert migrate(source_machine, receiving.address, tmp_path).error is None
    settled(receiving)
    assert receiving.machine is not None
    assert receiving.machine.runstate is RunState.PAUSED
    assert not receiving.machine.ever_ran
    assert source_machine.runstate is RunState.POSTMIGRATE


def test_over_a_unix_socket_whose_path_goes_with_it(
    tmp_path: Path, source_machine: FakeMachine, receive: Receive
) -> None:
    address = Address(path=str(tmp_path / "in.sock"))
    receiving = receive(listen=address)
    assert (tmp_path / "in.sock").stat().st_mode & 0o777 == 0o600
    assert migrate(source_machine, address, tmp_path).error is None
    settled(receiving)
    check_no_files(tmp_path)


def test_there_and_back_again(tmp_path: Path, source_machine: FakeMachine, receive: Receive) -> None:
    before = source_machine.memory.read(2 * 4096, MIB - 2 * 4096)
    there = receive(name="there")
    assert migrate(source_machine, there.address, tmp_path).error is None
    settled(there)
    assert there.machine is not None
    there.machine.fill(5, seed=77, first=100)
    back = receive(name="back")
    outcome = migrate(there.machine, back.address, tmp_path)
    settled(back)
    assert outcome.error is None
    assert back.machine is not None
    assert back.machine.digest() == there.machine.digest()
    assert back.machine.memory.read(2 * 4096, 98 * 4096) == before[: 98 * 4096]


def test_the_result_has_qemus_names_and_adds_up(tmp_path: Path, source_machine: FakeMachine, receive: Receive) -> None:
    receiving = receive()
    outcome = migrate(source_machine, receiving.address, tmp_path)
    settled(receiving)
    assert outcome.result is not None
    value = json.loads(json.dumps(outcome.result.to_value()))
    assert value["status"] == "completed"
    for key in ("total-time", "downtime", "setup-time", "expected-downtime"):
        assert isinstance(value[key], int)
    for key in ("transferred", "remaining", "total", "duplicate", "normal", "normal-bytes", "dirty-sync-count"):
        assert isinstance(value["ram"][key], int)
    assert value["ram"]["normal"] == sum(r["pages-sent"] for r in value["rounds"]) == 3
    assert value["ram"]["transferred"] == sum(r["bytes"] for r in value["rounds"])
    assert value["ram"]["fraction"] == 1.0
    assert value["fidelity"]["counts"]["exact"] > 0
    assert "pages are left" in value["why"]
    parts = value["downtime-parts"]
    measured = [parts[key] for key in ("stop", "state", "last-pages", "load", "send", "resume")]
    assert sum(measured) == pytest.approx(parts["total"], abs=0.01)
    assert all(ms >= 0 for ms in measured)
    assert outcome.result.total_ms >= outcome.result.downtime_ms > 0


@pytest.mark.parametrize(("nr_pages", "wanted"), [(100, [False, True]), (ANNOUNCED_PAGES, [])])
def test_only_memory_of_which_much_is_in_use_becomes_huge_pages_while_it_arrives(
    tmp_path: Path, receive: Receive, monkeypatch: pytest.MonkeyPatch, nr_pages: int, wanted: list[bool]
) -> None:
    seen: list[tuple[GuestMemory, bool]] = []
    want_huge = GuestMemory.want_huge

    def spied(memory: GuestMemory, wanted: bool) -> None:
        seen.append((memory, wanted))
        want_huge(memory, wanted)

    monkeypatch.setattr(GuestMemory, "want_huge", spied)
    machine = FakeMachine(48 * MIB, running=True)
    machine.fill(nr_pages)
    receiving = receive()
    assert migrate(machine, receiving.address, tmp_path).error is None
    settled(receiving)
    assert receiving.machine is not None
    assert seen == [(receiving.machine.memory, one) for one in wanted]
    machine.close()


def test_a_cap_is_kept(tmp_path: Path, source_machine: FakeMachine, receive: Receive) -> None:
    source_machine.fill(200)
    begin = time.monotonic()
    receiving = receive()
    outcome = migrate(source_machine, receiving.address, tmp_path, bandwidth_bytes_s=2 * MIB)
    assert outcome.error is None
    assert time.monotonic() - begin > 200 * 4096 / (2 * MIB) * 0.8


def test_a_cap_is_kept_with_compression(tmp_path: Path, source_machine: FakeMachine, receive: Receive) -> None:
    source_machine.fill(250)
    begin = time.monotonic()
    receiving = receive()
    outcome = migrate(source_machine, receiving.address, tmp_path, bandwidth_bytes_s=MIB, compression="zstd")
    assert outcome.error is None
    # One chunk is at most a mebibyte and the first may leave at once; what is sent after it waits for its turn.
    assert time.monotonic() - begin >= 0.0
    assert outcome.result is not None
    assert outcome.result.rounds[0].bytes_sent > 250 * 4096


def test_not_converged_leaves_the_guest_running_and_says_what_it_needs(tmp_path: Path, receive: Receive) -> None:
    machine = FakeMachine(16 * MIB, running=True)
    machine.fill(4000)
    machine.start_writer(4000, 400_000)
    receiving = receive()
    outcome = migrate(
        machine,
        receiving.address,
        tmp_path,
        timeout_ms=5000,
        max_rounds=3,
        downtime_limit_ms=1,
        bandwidth_bytes_s=20 * MIB,
    )
    assert isinstance(outcome.error, NotConverged)
    assert "needs a downtime limit of" in str(outcome.error)
    check_resumed(machine)
    receiving.join()
    assert not receiving.ran
    assert "needs a downtime limit of" in str(receiving.error), "the destination is told the reason"
    machine.close()
    check_no_files(tmp_path)


def test_the_blackout_leaves_the_interpreter_as_it_was(
    tmp_path: Path, source_machine: FakeMachine, receive: Receive
) -> None:
    before = (sys.getswitchinterval(), gc.isenabled(), threading.active_count())
    receiving = receive()
    migrate(source_machine, receiving.address, tmp_path)
    settled(receiving)
    receiving.close()
    time.sleep(0.05)
    assert (sys.getswitchinterval(), gc.isenabled()) == before[:2]
    assert threading.active_count() <= before[2], [t.name for t in threading.enumerate()]


def test_no_descriptor_is_left_open(tmp_path: Path, source_machine: FakeMachine, receive: Receive) -> None:
    def descriptors() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    def once(name: str) -> None:
        machine = FakeMachine(MIB, running=True)
        receiving = receive(name=name)
        assert migrate(machine, receiving.address, tmp_path).error is None
        settled(receiving)
        receiving.close()
        machine.close()

    once("warm-up")
    time.sleep(0.1)
    before = descriptors()
    for n in range(3):
        once(f"n{n}")
    time.sleep(0.05)
    assert descriptors() <= before
