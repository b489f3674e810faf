"""Every frame cut, held back and damaged, either way: who owns the guest afterwards, and that it still migrates.

The cells of the fault matrix that lie between a source and a destination. Each runs over the real stream with a proxy
that knows frames; the guest is the fake one.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from kvmigrate.config import PAGE_BYTES
from kvmigrate.contract import RunState
from kvmigrate.errors import Cancelled, CommitUnknown, ConfigError, HostError, MigrationError, PeerFailed, PeerTimeout
from kvmigrate.migration.status import Status
from tests.devices.conftest import wait_until
from tests.fake_machine import MIB, FakeMachine
from tests.migration.harness import (
    Proxy,
    Receiving,
    Rule,
    Watch,
    check_never_two,
    check_no_files,
    check_resumed,
    make_source,
    migrate,
    patience_ms,
    run,
)
from tests.migration.test_connections import write_when_saved
from tests.migration.test_migrate import BACK, OUT, settled

Receive = Callable[..., Receiving]
ProxyTo = Callable[..., Proxy]
COMMIT, DONE = OUT.index("COMMIT"), OUT.index("DONE")
RUNNING = BACK.index("RUNNING")

ACTIONS = ("cut", "cut-after", "hold", "flip")
KINDS = {"out": OUT[:COMMIT], "back": BACK[:RUNNING]}
BEFORE_COMMIT = [
    (way, number, action)
    for way in KINDS
    for number in range(len(KINDS[way]))
    for action in ACTIONS
    # Once READY has arrived the link may die: that is the COMMIT's trouble, tested below.
    if (KINDS[way][number], action) != ("READY", "cut-after")
]


def name_of(cell: tuple[str, int, str]) -> str:
    direction, number, action = cell
    return f"{action}-{direction}-{number}-{(OUT if direction == 'out' else BACK)[number]}"


def journal_of(machine: FakeMachine, directory: Path) -> Path:
    return directory / f"{machine.describe()['name']}.journal"


def migrates_at_once(machine: FakeMachine, receive: Receive, directory: Path) -> None:
    """The same machine, right away, to a new destination: whole."""
    again = receive(name="again")
    outcome = migrate(machine, again.address, directory)
    assert outcome.error is None
    settled(again)
    assert again.machine is not None
    assert again.machine.digest() == machine.digest()


@pytest.mark.parametrize("cell", BEFORE_COMMIT, ids=name_of)
def test_any_fault_before_commit_resumes_the_source(
    tmp_path: Path, source_machine: FakeMachine, receive: Receive, proxy_to: ProxyTo, cell: tuple[str, int, str]
) -> None:
    direction, number, action = cell
    receiving = receive(in_doubt_ms=200.0, timeout_ms=patience_ms(action))
    proxy = proxy_to(receiving, Rule(direction, number, action, at=40))
    begin = time.monotonic()
    outcome = migrate(source_machine, proxy.address, tmp_path, timeout_ms=patience_ms(action))
    assert outcome.error is not None
    assert "\n" not in str(outcome.error)
    check_resumed(source_machine)
    assert time.monotonic() - begin < 8.0
    receiving.join()
    assert receiving.error is not None
    assert not receiving.ran
    receiving.close()
    assert not journal_of(source_machine, tmp_path).exists(), "nothing is in doubt"
    migrates_at_once(source_machine, receive, tmp_path)


@pytest.mark.parametrize("at", [32 + 16 + 16, 32 + 16 + 16 + 4095])
def test_a_damaged_page_is_never_run(
    tmp_path: Path, source_machine: FakeMachine, receive: Receive, proxy_to: ProxyTo, at: int
) -> None:
    receiving = receive()
    proxy = proxy_to(receiving, Rule("out", OUT.index("PAGES"), "flip", at=at))
    outcome = migrate(source_machine, proxy.address, tmp_path)
    assert isinstance(outcome.error, PeerFailed)
    assert "digest of the pages" in str(outcome.error)
    check_resumed(source_machine)
    receiving.join()
    assert not receiving.ran


@pytest.mark.parametrize("action", ["cut", "hold", "flip"])
def test_a_lost_commit_brings_the_guest_back_to_the_source(
    tmp_path: Path, source_machine: FakeMachine, receive: Receive, proxy_to: ProxyTo, action: str
) -> None:
    receiving = receive(timeout_ms=patience_ms(action))
    proxy = proxy_to(receiving, Rule("out", COMMIT, action, at=40))
    outcome = migrate(source_machine, proxy.address, tmp_path, timeout_ms=patience_ms(action))
    assert isinstance(outcome.error, PeerFailed), outcome.error
    assert "gave the guest up before it ran there" in str(outcome.error)
    check_resumed(source_machine)
    receiving.join()
    assert not receiving.ran
    receiving.close()
    check_no_files(tmp_path)
    migrates_at_once(source_machine, receive, tmp_path)


def test_a_link_that_dies_as_ready_arrives_brings_the_guest_back(
    tmp_path: Path, source_machine: FakeMachine, receive: Receive, proxy_to: ProxyTo
) -> None:
    receiving = receive()
    proxy = proxy_to(receiving, Rule("back", BACK.index("READY"), "cut-after"))
    outcome = migrate(source_machine, proxy.address, tmp_path)
    receiving.join()
    # COMMIT may have left before the cut or may not; either way exactly one side has the guest.
    check_never_two(source_machine, receiving)
    assert source_machine.running != receiving.ran
    assert (outcome.error is None) == receiving.ran


@pytest.mark.parametrize(
    ("direction", "number", "action"),
    [("out", COMMIT, "cut-after"), ("back", RUNNING, "cut"), ("back", RUNNING, "hold"), ("back", RUNNING, "flip")],
)
def test_a_lost_running_completes_by_asking(
    tmp_path: Path,
    source_machine: FakeMachine,
    receive: Receive,
    proxy_to: ProxyTo,
    direction: str,
    number: int,
    action: str,
) -> None:
    receiving = receive(timeout_ms=patience_ms(action))
    proxy = proxy_to(receiving, Rule(direction, number, action, at=40))
    outcome = migrate(source_machine, proxy.address, tmp_path, timeout_ms=patience_ms(action))
    assert outcome.result is not None, outcome.error
    assert outcome.result.status is Status.COMPLETED
    assert source_machine.runstate is RunState.POSTMIGRATE
    if direction == "back":
        # Having asked, the source acknowledges the answer; a RUNNING that slipped through before the cut it cannot.
        settled(receiving)
        check_no_files(tmp_path)
    receiving.join()
    assert receiving.ran
    check_never_two(source_machine, receiving)


@pytest.mark.parametrize("action", ["cut", "hold", "flip"])
def test_a_lost_done_changes_nothing(
    tmp_path: Path, source_machine: FakeMachine, receive: Receive, proxy_to: ProxyTo, action: str
) -> None:
    receiving = receive(timeout_ms=patience_ms(action))
    proxy = proxy_to(receiving, Rule("out", DONE, action, at=40))
    outcome = migrate(source_machine, proxy.address, tmp_path, timeout_ms=patience_ms(action))
    assert outcome.error is None
    receiving.join()
    assert receiving.ran
    check_never_two(source_machine, receiving)


def test_a_source_whose_disks_the_destination_still_holds_goes_on_when_they_come_back(
    tmp_path: Path, source_machine: FakeMachine, receive: Receive
) -> None:
    receiving = receive()
    source_machine.faults.once |= {"save": HostError("KVM_save", 5), "resume": ConfigError("a disk is in use")}
    outcome = migrate(source_machine, receiving.address, tmp_path)
    assert isinstance(outcome.error, HostError)
    check_resumed(source_machine)
    receiving.join()
    assert "KVM_save" in str(receiving.error), "the destination is told the reason"


@pytest.mark.parametrize("where", ["pause", "save"])
def test_a_failure_of_the_source_itself_resumes_it(
    tmp_path: Path, source_machine: FakeMachine, receive: Receive, where: str
) -> None:
    receiving = receive()
    source_machine.faults.once[where] = HostError(f"KVM_{where}", 5)
    outcome = migrate(source_machine, receiving.address, tmp_path)
    assert isinstance(outcome.error, HostError)
    check_resumed(source_machine)
    receiving.join()
    assert not receiving.ran
    assert f"KVM_{where}" in str(receiving.error), "the destination is told the reason"
    migrates_at_once(source_machine, receive, tmp_path)


def test_a_journal_that_cannot_be_written_is_no_commit(
    tmp_path: Path, source_machine: FakeMachine, receive: Receive
) -> None:
    receiving = receive()
    outcome = migrate(source_machine, receiving.address, tmp_path / "missing")
    assert isinstance(outcome.error, HostError)
    assert "journal" in str(outcome.error)
    check_resumed(source_machine)
    receiving.join()
    assert not receiving.ran


def test_a_destination_without_a_journal_refuses_the_guest(tmp_path: Path, source_machine: FakeMachine) -> None:
    receiving = Receiving(tmp_path / "missing")
    outcome = migrate(source_machine, receiving.address, tmp_path)
    assert isinstance(outcome.error, PeerFailed)
    assert "journal" in str(outcome.error)
    check_resumed(source_machine)
    receiving.close()


def test_a_destination_whose_journal_fails_at_commit_gives_the_guest_back(
    tmp_path: Path, source_machine: FakeMachine
) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    receiving = Receiving(theirs, prepare=lambda machine: setattr(machine, "load", spoil(machine, theirs)))
    outcome = migrate(source_machine, receiving.address, tmp_path)
    assert isinstance(outcome.error, PeerFailed)
    assert "gave the guest up before it ran there" in str(outcome.error)
    check_resumed(source_machine)
    receiving.join()
    assert not receiving.ran
    receiving.close()


def spoil(machine: FakeMachine, directory: Path) -> Callable[..., object]:
    """A load after which the journal's directory takes no file any more."""
    load = machine.load

    def loaded(*sections: Any, **named: Any) -> object:
        for path in directory.glob("*"):
            path.unlink()
        if directory.exists():
            directory.rmdir()
        return load(*sections, **named)

    return loaded


def test_a_load_that_fails_is_told_in_the_sources_error(
    tmp_path: Path, source_machine: FakeMachine, receive: Receive
) -> None:
    receiving = receive(prepare=lambda m: m.faults.once.update(load=HostError("KVM_SET_SREGS", 22)))
    outcome = migrate(source_machine, receiving.address, tmp_path)
    assert isinstance(outcome.error, PeerFailed)
    assert "KVM_SET_SREGS" in str(outcome.error)
    check_resumed(source_machine)
    migrates_at_once(source_machine, receive, tmp_path)


def test_a_refused_item_is_named_with_both_values(
    tmp_path: Path, source_machine: FakeMachine, receive: Receive
) -> None:
    receiving = receive(prepare=lambda m: setattr(m.faults, "refuse", "cpu0.efer"))
    outcome = migrate(source_machine, receiving.address, tmp_path)
    assert isinstance(outcome.error, PeerFailed)
    assert "cpu0.efer: saved 0x1, this host has 0x2" in str(outcome.error)
    check_resumed(source_machine)
    receiving.join()
    assert not receiving.ran


def test_a_guest_that_cannot_be_run_there_is_nobodys_until_the_operator_decides(
    tmp_path: Path, source_machine: FakeMachine, receive: Receive
) -> None:
    receiving = receive(prepare=lambda m: m.faults.once.update(resume=HostError("KVM_RUN", 5)))
    outcome = migrate(source_machine, receiving.address, tmp_path, ask_for_ms=200.0)
    assert isinstance(outcome.error, CommitUnknown)
    assert "could not be run" in str(outcome.error)
    assert source_machine.runstate is RunState.FINISH_MIGRATE


@pytest.mark.parametrize("number", range(COMMIT))
def test_cancel_in_any_phase_resumes_at_once(
    tmp_path: Path, source_machine: FakeMachine, receive: Receive, proxy_to: ProxyTo, number: int
) -> None:
    receiving = receive(in_doubt_ms=100.0, timeout_ms=5000.0)
    proxy = proxy_to(receiving, Rule("out", number, "hold"))
    source = make_source(source_machine, proxy.address, tmp_path, timeout_ms=5000.0)

    def cancel() -> None:
        proxy.hit.wait(5)
        time.sleep(0.05)
        source.cancel()

    threading.Thread(target=cancel, daemon=True).start()
    begin = time.monotonic()
    outcome = run(source)
    assert isinstance(outcome.error, Cancelled)
    assert time.monotonic() - begin < 2.0
    assert source.query().status is Status.CANCELLED
    check_resumed(source_machine)
    proxy.close()
    receiving.join()
    assert not receiving.ran
    receiving.close()
    migrates_at_once(source_machine, receive, tmp_path)


def test_a_peer_that_never_says_ready_cannot_hold_the_guest_paused(
    tmp_path: Path, source_machine: FakeMachine, receive: Receive, proxy_to: ProxyTo
) -> None:
    receiving = receive(timeout_ms=5000.0)
    proxy = proxy_to(receiving, Rule("back", BACK.index("READY"), "hold"))
    paused: list[float] = []
    real = source_machine.pause

    def pause(reason: RunState) -> None:
        paused.append(time.monotonic())
        real(reason)

    source_machine.pause = pause  # type: ignore[method-assign]
    outcome = migrate(source_machine, proxy.address, tmp_path, timeout_ms=300.0, downtime_limit_ms=100.0)
    assert isinstance(outcome.error, PeerTimeout)
    assert time.monotonic() - paused[0] < 1.5
    check_resumed(source_machine)


def test_a_link_that_is_slow_but_never_silent_cannot_hold_the_guest_paused(
    tmp_path: Path, receive: Receive, proxy_to: ProxyTo
) -> None:
    machine, watch = FakeMachine(48 * MIB, running=True), Watch()
    # More than all buffers on the way hold, none of it zero.
    write_when_saved(machine, 40 * MIB // PAGE_BYTES, b"last")
    receiving = receive(timeout_ms=5000.0)
    proxy = proxy_to(receiving, Rule("out", 0, "slow", kind="PAGES"))
    outcome = migrate(machine, proxy.address, tmp_path, timeout_ms=500.0, downtime_limit_ms=100.0, watch=watch)
    assert isinstance(outcome.error, PeerTimeout)
    assert "took over 0.5 s to take the paused guest over" in str(outcome.error)
    check_resumed(machine)
    assert [record.round for record in watch.rounds] == [0], "what was kept for after the blackout is told"
    assert watch.words[-1] is Status.FAILED
    receiving.join()
    assert not receiving.ran
    machine.close()


def test_the_journal_is_there_before_ready_comes_and_gone_when_it_does_not(
    tmp_path: Path, source_machine: FakeMachine, receive: Receive, proxy_to: ProxyTo
) -> None:
    receiving = receive()
    proxy = proxy_to(receiving, Rule("back", BACK.index("READY"), "hold"))
    journal = journal_of(source_machine, tmp_path)
    with ThreadPoolExecutor(1) as pool:
        outcome = pool.submit(migrate, source_machine, proxy.address, tmp_path, timeout_ms=2000.0)
        assert proxy.hit.wait(10)
        wait_until(journal.exists, "the journal")
        assert not outcome.done()
    assert isinstance(outcome.result().error, PeerTimeout)
    check_resumed(source_machine)
    assert not journal.exists()


def test_a_guest_that_ends_while_it_is_copied_is_not_moved(
    tmp_path: Path, source_machine: FakeMachine, receive: Receive
) -> None:
    receiving = receive(prepare=lambda _: source_machine.end())
    outcome = migrate(source_machine, receiving.address, tmp_path)
    assert isinstance(outcome.error, MigrationError)
    assert "the guest ended (shutdown)" in str(outcome.error)
    assert source_machine.runstate is RunState.SHUTDOWN
    receiving.join()
    assert not receiving.ran


def test_a_refused_connection_says_what_to_do(tmp_path: Path, source_machine: FakeMachine) -> None:
    receiving = Receiving(tmp_path)
    receiving.close()
    outcome = migrate(source_machine, receiving.address, tmp_path)
    assert isinstance(outcome.error, HostError)
    assert "start `kvmigrate receive` first" in str(outcome.error)
    check_resumed(source_machine)
