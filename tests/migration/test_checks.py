"""Checks: what a destination answers, what it never does, and that it waits on for a guest whatever a peer sends."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmigrate.config import Address
from kvmigrate.contract import RunState
from kvmigrate.errors import BadField, Cancelled, ConfigError, HostError, MigrationError, PeerFailed, StateError
from kvmigrate.migration import wire
from kvmigrate.migration.checker import Checker
from kvmigrate.migration.checks import CHECK, MAX_ITEMS, MAX_TEXT, ONLY, Check, Checked, CheckResult, Row
from kvmigrate.migration.status import Status
from kvmigrate.state.fidelity import Fidelity, Verdict
from kvmigrate.state.frame import FrameKind, encode_frame
from kvmigrate.state.section import Section, encode, pack
from tests.fake_machine import MIB, FakeMachine, FakeTrial
from tests.migration.harness import Proxy, Receiving, check_no_files, check_resumed, make_source, migrate, run
from tests.migration.test_migrate import settled

Receive = Callable[..., Receiving]
ProxyTo = Callable[..., Proxy]


def check(machine: FakeMachine, receiving: Receiving) -> CheckResult:
    return Checker(machine, receiving.address, 5000.0).run()


def refusing(*items: str) -> Callable[[FakeTrial], None]:
    def prepare(trial: FakeTrial) -> None:
        trial.refuse = items

    return prepare


def takes_a_guest(machine: FakeMachine, receiving: Receiving, directory: Path) -> None:
    """It still waits: a real migration completes, and nothing of the checks is left."""
    assert receiving.error is None, receiving.error
    assert receiving.watch.words == [], "a check was told as a migration"
    assert receiving.machine is None, "a check built the machine that is for the guest"
    outcome = migrate(machine, receiving.address, directory)
    assert outcome.error is None
    settled(receiving)
    assert all(trial.closed for trial in receiving.trials)
    assert not any(trial.machine.ever_ran for trial in receiving.checks)
    check_no_files(directory)


def test_a_check_moves_nothing_and_leaves_the_destination_waiting(
    tmp_path: Path, source_machine: FakeMachine, receive: Receive
) -> None:
    receiving = receive()
    for _ in range(5):
        found = check(source_machine, receiving)
        assert found.checked.fits
        assert found.checked.counts["exact"] == 3, "rip and rsp of the CPU, lcr of the UART"
    assert source_machine.running
    assert (source_machine.nr_pauses, source_machine.nr_samples) == (0, 5)
    assert [trial.own for trial in receiving.trials] == [True] * 5
    check_no_files(tmp_path)
    takes_a_guest(source_machine, receiving, tmp_path)


def test_a_check_names_what_would_be_lost(tmp_path: Path, source_machine: FakeMachine, receive: Receive) -> None:
    receiving = receive(prepare_trial=refusing("vcpu0.msrs.MSR_LSTAR", "vcpu0.cpuid.avx2"))
    found = check(source_machine, receiving)
    assert not found.checked.fits
    assert found.checked.counts["refused"] == 2
    assert [(row.item, row.verdict) for row in found.checked.rows] == [
        ("vcpu0.msrs.MSR_LSTAR", Verdict.REFUSED),
        ("vcpu0.cpuid.avx2", Verdict.REFUSED),
    ]
    assert source_machine.running
    assert receiving.thread.is_alive()


@pytest.mark.parametrize("state", [RunState.PAUSED, RunState.SHUTDOWN])
def test_a_paused_guest_is_checked_and_one_that_ended_is_not(
    source_machine: FakeMachine, receive: Receive, state: RunState
) -> None:
    receiving = receive()
    if state is RunState.PAUSED:
        source_machine.pause(state)
        assert check(source_machine, receiving).checked.fits
    else:
        source_machine.end(state)
        with pytest.raises(StateError, match="shutdown"):
            check(source_machine, receiving)
    assert source_machine.runstate is state


def test_send_is_refused_before_a_page_moves(
    tmp_path: Path, source_machine: FakeMachine, receive: Receive, proxy_to: ProxyTo
) -> None:
    receiving = receive(prepare_trial=refusing("a", "b", "c", "d"))
    proxy = proxy_to(receiving)
    source = make_source(source_machine, proxy.address, tmp_path)
    outcome = run(source)
    assert isinstance(outcome.error, MigrationError)
    text = r"a is 0x1, there 0x2 \(the host took the value and holds another\); b is .*; c is .*; and 1 more items"
    with pytest.raises(MigrationError, match=text):
        raise outcome.error
    check_resumed(source_machine)
    assert source_machine.nr_pauses == 0
    result = source.query()
    assert result.status is Status.FAILED
    assert result.to_value()["check"]["counts"]["refused"] == 4
    receiving.join()
    # By now what the source said last has come through.
    assert proxy.seen["out"] == ["HELLO", "CONFIG", "CHECK", "SECTION", "SECTION", "FAILED"]
    assert proxy.seen["back"] == ["HELLO", "ACCEPT", "CHECKED"]
    assert isinstance(receiving.error, PeerFailed)
    assert not receiving.ran
    assert [trial.closed for trial in receiving.trials] == [True]
    check_no_files(tmp_path)


def test_send_tries_the_state_on_the_machine_that_is_to_have_it_and_takes_it_back(
    tmp_path: Path, source_machine: FakeMachine, receive: Receive
) -> None:
    loaded: list[bool] = []

    def prepare(trial: FakeTrial) -> None:
        empty, close = trial.machine.digest(), trial.close

        def closing() -> None:
            loaded.append(trial.machine.digest() != empty)
            close()
            assert trial.machine.digest() == empty

        trial.close = closing  # type: ignore[method-assign]

    source_machine.state["cpu0"]["rip"] = 0x1234
    receiving = receive(prepare_trial=prepare)
    outcome = migrate(source_machine, receiving.address, tmp_path)
    settled(receiving)
    (trial,) = receiving.trials
    assert trial.machine is receiving.machine
    assert (trial.own, trial.closed, loaded) == (False, True, [True])
    assert outcome.result is not None
    assert outcome.result.to_value()["check"]["fits"]
    assert outcome.result.to_value()["check"]["pause-time"] == 0.5


def test_a_sample_that_the_kernel_refuses_ends_the_send(
    tmp_path: Path, source_machine: FakeMachine, receive: Receive
) -> None:
    receiving = receive()
    source_machine.faults.once["sample"] = HostError("KVM_GET_REGS", 5)
    assert isinstance(migrate(source_machine, receiving.address, tmp_path).error, HostError)
    check_resumed(source_machine)
    receiving.join()
    assert not receiving.ran


def test_a_cancelled_check_ends_at_once(source_machine: FakeMachine) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        checker = Checker(source_machine, Address("127.0.0.1", silent.getsockname()[1]), 30_000.0)
        threading.Timer(0.1, checker.cancel).start()
        begin = time.monotonic()
        with pytest.raises(Cancelled, match="unchecked"):
            checker.run()
    assert time.monotonic() - begin < 10
    assert source_machine.running


# What a hostile peer may say.

HELLO = (FrameKind.HELLO, wire.Hello(wire.FORMAT, (CHECK, ONLY), "u-1", 7, "guest").to_payload())
CONFIG = (FrameKind.CONFIG, pack({"name": "guest", "uuid": "u-1", "memory_bytes": MIB, "slots": [[0, 0, 256]]}))
SECTIONS = [
    (FrameKind.SECTION, encode(Section(name, 1, body)))
    for name, body in (("cpu0", {"rip": 0x7C00, "rsp": 0}), ("serial0", {"lcr": 3}))
]
SECTIONS_BYTES = sum(32 + len(payload) for _, payload in SECTIONS)


def announce(
    sections: int = 2, sections_bytes: int = SECTIONS_BYTES, resident_bytes: int = 0
) -> tuple[FrameKind, bytes]:
    return FrameKind.CHECK, Check(sections, sections_bytes, resident_bytes).to_payload()


WHOLE = [HELLO, CONFIG, announce(), *SECTIONS]


def stream(frames: list[tuple[FrameKind, bytes]]) -> bytes:
    return b"".join(encode_frame(kind, payload, number) for number, (kind, payload) in enumerate(frames))


def say(receiving: Receiving, data: bytes) -> bytes:
    """Say ``data`` and nothing more; what came back until the destination hung up."""
    heard = bytearray()
    with socket.create_connection((receiving.address.host, receiving.address.port)) as sock:
        sock.settimeout(20)
        try:
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)
            while data := sock.recv(1 << 16):
                heard += data
        except ConnectionError:
            pass
    return bytes(heard)


@pytest.mark.parametrize(
    ("frames", "text"),
    [
        ([HELLO, HELLO], b"HELLO may not come while waiting for CONFIG"),
        ([HELLO, (FrameKind.COMMIT, wire.commit_payload(7))], b"COMMIT may not come"),
        ([HELLO, (FrameKind.CONFIG, pack([]))], b"expected a map"),
        ([HELLO, (FrameKind.CONFIG, pack({"uuid": "u-2"}))], b"not the one of HELLO"),
        ([HELLO, CONFIG, CONFIG], b"CONFIG may not come while waiting for CHECK"),
        ([HELLO, CONFIG, (FrameKind.PAGES, bytes(16))], b"PAGES may not come while waiting for CHECK"),
        ([HELLO, CONFIG, announce(0, 0)], b"field 'sections' is 0"),
        ([HELLO, CONFIG, announce(wire.MAX_SECTIONS + 1, 1 << 20)], b"field 'sections' is"),
        ([HELLO, CONFIG, announce(2, wire.MAX_SECTIONS_BYTES + 1)], b"field 'sections_bytes' is"),
        ([HELLO, CONFIG, announce(2, 63)], b"field 'sections_bytes' is 63"),
        ([HELLO, CONFIG, announce(1), *SECTIONS], b"bytes are left of the sections"),
        ([HELLO, CONFIG, announce(2, SECTIONS_BYTES - 1), *SECTIONS], b"more bytes than were announced"),
        ([HELLO, CONFIG, announce(3, SECTIONS_BYTES + 32), *SECTIONS, HELLO], b""),
        ([HELLO, CONFIG, announce(), SECTIONS[0], SECTIONS[0]], b"more bytes than were announced"),
        ([HELLO, (FrameKind.CONFIG, pack({"uuid": "u-1", "memory_bytes": 1 << 62})), *WHOLE[2:]], b"memory_bytes"),
        ([HELLO, CONFIG, (FrameKind.FAILED, pack({"error": "E", "item": "", "text": "x"}))], b""),
    ],
)
def test_what_a_peer_may_not_say_costs_him_his_answer_and_nobody_else_anything(
    tmp_path: Path,
    source_machine: FakeMachine,
    receive: Receive,
    frames: list[tuple[FrameKind, bytes]],
    text: bytes,
) -> None:
    receiving = receive()
    heard = say(receiving, stream(frames))
    assert b"counts" not in heard, "he had an answer"
    assert any(part in heard for part in text.split(b"|")), heard
    takes_a_guest(source_machine, receiving, tmp_path)


def test_a_check_cut_or_damaged_at_any_byte_leaves_the_destination_waiting(
    tmp_path: Path, source_machine: FakeMachine, receive: Receive
) -> None:
    receiving = receive()
    whole, hello = stream(WHOLE), len(stream([HELLO]))
    assert b"counts" in say(receiving, whole)
    for at in range(hello, len(whole)):
        assert b"counts" not in say(receiving, whole[:at]), f"answered after {at} of {len(whole)} bytes"
        damaged = bytearray(whole)
        damaged[at] ^= 1 << at % 8
        assert b"counts" not in say(receiving, bytes(damaged)), f"answered with byte {at} damaged"
    takes_a_guest(source_machine, receiving, tmp_path)


@pytest.mark.parametrize("gap_s", [0.02, 1.2])
def test_a_peer_that_trickles_is_cut_off_after_one_timeout_for_all(
    tmp_path: Path, source_machine: FakeMachine, receive: Receive, gap_s: float
) -> None:
    """Byte by byte, and frame by frame so that none of them is late."""
    receiving = receive(timeout_ms=2000.0)
    whole, hello = stream(WHOLE), len(stream([HELLO]))
    config = len(stream([HELLO, CONFIG]))
    cuts = [*range(hello, len(whole))] if gap_s < 1 else [hello, config]
    heard = bytearray()
    with socket.create_connection((receiving.address.host, receiving.address.port)) as sock:
        sock.sendall(whole[:hello])
        try:
            for at, end in zip(cuts, [*cuts[1:], len(whole)], strict=True):
                time.sleep(gap_s)
                sock.sendall(whole[at:end])
            while data := sock.recv(1 << 16):
                heard += data
        except OSError:
            pass
    assert b"counts" not in heard
    takes_a_guest(source_machine, receiving, tmp_path)


@pytest.mark.parametrize("error", [RuntimeError("a bug"), MemoryError(), BadField("a field"), OSError(5, "disk")])
def test_whatever_a_trial_raises_leaves_the_destination_waiting(
    tmp_path: Path, source_machine: FakeMachine, receive: Receive, error: Exception
) -> None:
    errors = [error]

    def prepare(trial: FakeTrial) -> None:
        trial.error = errors.pop() if errors else None

    receiving = receive(prepare_trial=prepare)
    with pytest.raises(PeerFailed):
        check(source_machine, receiving)
    assert source_machine.running
    takes_a_guest(source_machine, receiving, tmp_path)


def test_a_machine_that_cannot_be_built_there_is_an_answer(source_machine: FakeMachine, receive: Receive) -> None:
    def prepare(_: FakeTrial) -> None:
        raise ConfigError("the guest has 64 GiB of memory, this host only 1")

    found = check(source_machine, receive(prepare_trial=prepare))
    assert [(row.item, row.why) for row in found.checked.rows] == [
        ("machine", "the guest has 64 GiB of memory, this host only 1")
    ]


def test_a_destination_that_takes_a_guest_answers_no_check(
    tmp_path: Path, source_machine: FakeMachine, receive: Receive
) -> None:
    source_machine.start_writer(4, 100)
    receiving = receive()
    source = make_source(source_machine, receiving.address, tmp_path, bandwidth_bytes_s=4096)
    other = FakeMachine(MIB, running=True)
    thread = threading.Thread(target=run, args=(source,))
    thread.start()
    while receiving.watch.words != [Status.SETUP, Status.ACTIVE]:
        time.sleep(0.01)
    with pytest.raises(PeerFailed, match="busy with another guest"):
        check(other, receiving)
    source.cancel()
    thread.join(10)
    check_resumed(source_machine)
    other.close()


def test_the_operator_can_cancel_a_destination_in_the_middle_of_a_check(receive: Receive) -> None:
    receiving = receive()
    with socket.create_connection((receiving.address.host, receiving.address.port)) as sock:
        sock.sendall(stream([HELLO]))
        assert sock.recv(1)
        receiving.destination.cancel()
        receiving.join(5)
    assert isinstance(receiving.error, Cancelled)


# The payloads.

u64 = st.integers(0, 2**64 - 1)


@given(st.integers(1, 1024), st.integers(1 << 15, 16 << 20), u64)
def test_check_comes_back_as_it_went(sections: int, sections_bytes: int, resident_bytes: int) -> None:
    one = Check(sections, sections_bytes, resident_bytes)
    assert Check.from_payload(one.to_payload()) == one


def test_an_answer_has_room_for_any_number_of_items() -> None:
    fidelity = Fidelity()
    for number in range(2 * MAX_ITEMS):
        fidelity.adjusted(f"adjusted{number}", "\N{SNOWMAN}" * 9999, b"x" * 9999, "\n" * 9999)
    fidelity.refused("refused", {"a": [1] * 9999}, None, "why")
    payload = Checked.of(fidelity, 1.0, 2.0).to_payload()
    assert len(payload) <= 2 << 20
    back = Checked.from_payload(payload)
    assert back.counts == {"exact": 0, "adjusted": 2 * MAX_ITEMS, "dropped": 0, "refused": 1}
    assert len(back.rows) == MAX_ITEMS
    assert back.rows[0].item == "refused"
    assert not back.fits


GOOD = {"counts": {"exact": 1, "adjusted": 0, "dropped": 0, "refused": 1}, "items": [], "build_us": 0, "load_us": 0}


@pytest.mark.parametrize(
    "change",
    [
        {"counts": {"exact": 1}},
        {"counts": {**GOOD["counts"], "lost": 1}},  # type: ignore[dict-item]
        {"items": [["a", "refused", "", "", ""]] * 2},
        {"items": [["a", "adjusted", "", "", ""]]},
        {"items": [["a", "exact", "", "", ""]]},
        {"items": [["a", "gone", "", "", ""]]},
        {"items": [["a", "refused", "", ""]]},
        {"items": [["a", "refused", "", "", 1]]},
        {"items": [[]] * (MAX_ITEMS + 1)},
        {"build_us": -1},
        {"more": 1},
    ],
)
def test_an_answer_that_cannot_be_is_refused(change: dict[str, object]) -> None:
    Checked.from_payload(pack(GOOD))
    with pytest.raises(BadField):
        Checked.from_payload(pack(GOOD | change))


def test_a_peers_items_are_printable_and_short() -> None:
    row = ["\x1b[2Jx" + "y" * 999, "refused", "\n", "a\nb", "\x00"]
    (found,) = Checked.from_payload(pack(GOOD | {"items": [row]})).rows
    assert found == Row(("[2Jx" + "y" * 999)[:MAX_TEXT], Verdict.REFUSED, "", "a b", "")


def test_refused_items_that_were_not_listed_still_refuse() -> None:
    with pytest.raises(MigrationError, match=r"it does not say what; and 1 more"):
        Checked.from_payload(pack(GOOD)).require("peer")
