"""A short stream cut after every byte and damaged in every byte, on both sides: only the whole of it runs a guest.

A recording of one migration is played to a fresh destination, and the destination's half of it to a fresh source.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path

import pytest

from kvmigrate.config import PAGE_BYTES, Address
from kvmigrate.errors import CommitUnknown, KvmigrateError
from kvmigrate.migration.channel import kind_name
from kvmigrate.migration.journal import Journal
from kvmigrate.state.frame import HEADER, decode_header
from tests.fake_machine import MIB, FakeMachine
from tests.migration.harness import Receiving, make_source, run
from tests.migration.test_migrate import BACK, OUT, settled

EPOCH = 1_700_000_000_000_000_000


@dataclass
class Recording:
    """Both halves of one migration, and where each frame ends."""

    out: bytes
    back: bytes

    def ends(self, way: str) -> dict[str, int]:
        """The offset behind the last frame of each kind."""
        data, at, found = (self.out if way == "out" else self.back), 0, {}
        while at < len(data):
            header = decode_header(data[at : at + HEADER.size])
            at += HEADER.size + header.length
            found[kind_name(header.kind)] = at
        return found


def guest() -> FakeMachine:
    machine = FakeMachine(MIB, name="guest", running=True)
    machine.uuid = "00000000-0000-4000-8000-000000000001"
    machine.fill(1)
    return machine


class Tap:
    """Passes bytes between one source and one destination and keeps them."""

    def __init__(self, target: Address) -> None:
        self.halves = [bytearray(), bytearray()]
        self._server = socket.create_server(("127.0.0.1", 0))
        self.address = Address("127.0.0.1", self._server.getsockname()[1])
        self._target = target
        self._thread = threading.Thread(target=self._accept)
        self._thread.start()

    def _accept(self) -> None:
        near = self._server.accept()[0]
        far = socket.create_connection((self._target.host, self._target.port))
        pumps = [
            threading.Thread(target=self._pump, args=args)
            for args in ((near, far, self.halves[0]), (far, near, self.halves[1]))
        ]
        for pump in pumps:
            pump.start()
        for pump in pumps:
            pump.join()
        near.close()
        far.close()

    @staticmethod
    def _pump(near: socket.socket, far: socket.socket, keep: bytearray) -> None:
        while data := near.recv(1 << 16):
            keep += data
            far.sendall(data)
        try:
            far.shutdown(socket.SHUT_WR)
        except OSError:
            pass

    def close(self) -> None:
        self._thread.join(10)
        self._server.close()


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Recording]:
    directory = tmp_path_factory.mktemp("recording")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kvmigrate.migration.source.time.time_ns", lambda: EPOCH)
        receiving = Receiving(directory)
        tap = Tap(receiving.address)
        machine = guest()
        assert run(make_source(machine, tap.address, directory)).error is None
        settled(receiving)
        receiving.close()
        machine.close()
        tap.close()
        yield Recording(bytes(tap.halves[0]), bytes(tap.halves[1]))


def offsets(data: bytes) -> list[int]:
    """Every byte of the frames, and every 61st of a page's data, which one digest covers alike."""
    found, at = [], 0
    while at < len(data):
        length = decode_header(data[at : at + HEADER.size]).length
        end = at + HEADER.size + length
        dense = end if length < PAGE_BYTES else at + HEADER.size + 48
        found += [*range(at, dense), *range(dense, end, 61)]
        at = end
    return found


def play_to_destination(directory: Path, data: bytes) -> Receiving:
    """A fresh destination that is sent ``data`` and then nothing more."""
    receiving = Receiving(directory, in_doubt_ms=0.0, timeout_ms=2000.0)
    with socket.create_connection((receiving.address.host, receiving.address.port)) as sock:
        try:
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)
            while sock.recv(1 << 16):
                continue
        except OSError:
            pass
    receiving.join()
    receiving.close()
    return receiving


def test_a_stream_cut_after_any_byte_never_runs_before_its_commit(tmp_path: Path, recording: Recording) -> None:
    commit = recording.ends("out")["COMMIT"]
    for cut in offsets(recording.out):
        receiving = play_to_destination(tmp_path, recording.out[:cut])
        assert receiving.ran == (cut >= commit), f"cut after byte {cut}, COMMIT ends at {commit}"
        if cut < commit:
            assert isinstance(receiving.error, KvmigrateError), (cut, receiving.error)


def test_a_stream_with_any_byte_damaged_never_runs(tmp_path: Path, recording: Recording) -> None:
    commit = recording.ends("out")["COMMIT"]
    for at in offsets(recording.out[:commit]):
        damaged = bytearray(recording.out)
        damaged[at] ^= 1 << at % 8
        receiving = play_to_destination(tmp_path, bytes(damaged))
        assert not receiving.ran, f"ran with byte {at} damaged"
        assert isinstance(receiving.error, KvmigrateError), (at, receiving.error)
        assert "\n" not in str(receiving.error)


class Actor:
    """Plays the destination's half of a recording to one source: each answer when the frame that asks for it has come.
    Hangs up at the end of ``data``, which may be cut short."""

    ASKS = {
        "HELLO": "HELLO",
        "CONFIG": "ACCEPT",
        "CHECK": "CHECKED",
        "ROUND": "ROUND",
        "END": "READY",
        "COMMIT": "RUNNING",
    }

    def __init__(self, data: bytes, ends: dict[str, int]) -> None:
        self._data = data
        self._ends = ends
        self._server = socket.create_server(("127.0.0.1", 0))
        self.address = Address("127.0.0.1", self._server.getsockname()[1])
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        sock = self._server.accept()[0]
        self._server.close()
        with sock, sock.makefile("rb") as stream:
            try:
                self._play(sock, stream)
            except OSError:
                pass

    def _play(self, sock: socket.socket, stream: BufferedReader) -> None:
        at = 0
        while len(head := stream.read(HEADER.size)) == HEADER.size:
            header = decode_header(head)
            stream.read(header.length)
            answer = self.ASKS.get(kind_name(header.kind))
            if answer is None:
                continue
            sock.sendall(self._data[at : self._ends[answer]])
            at = self._ends[answer]
            if at >= len(self._data):
                return

    def close(self) -> None:
        self._thread.join(10)
        assert not self._thread.is_alive()


def play_to_source(directory: Path, recording: Recording, data: bytes) -> tuple[FakeMachine, BaseException | None]:
    machine = guest()
    actor = Actor(data, recording.ends("back"))
    outcome = run(make_source(machine, actor.address, directory, ask_for_ms=0.0, timeout_ms=2000.0))
    actor.close()
    machine.memory.close()
    Journal(directory, "guest").remove()
    return machine, outcome.error


@pytest.mark.parametrize("damage", [False, True], ids=["cut", "damaged"])
def test_a_source_that_is_answered_wrongly_resumes_before_commit_and_stays_paused_after(
    tmp_path: Path, recording: Recording, monkeypatch: pytest.MonkeyPatch, damage: bool
) -> None:
    monkeypatch.setattr("kvmigrate.migration.source.time.time_ns", lambda: EPOCH)
    ends = recording.ends("back")
    for at in range(ends["RUNNING"]):
        data = bytearray(recording.back)
        data[at] ^= 1 << at % 8
        machine, error = play_to_source(tmp_path, recording, bytes(data if damage else recording.back[:at]))
        assert isinstance(error, KvmigrateError), (at, error)
        in_doubt = at >= ends["READY"]
        assert isinstance(error, CommitUnknown) == in_doubt, (at, error)
        assert machine.running != in_doubt, (at, error)


def test_the_whole_recording_completes(tmp_path: Path, recording: Recording, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvmigrate.migration.source.time.time_ns", lambda: EPOCH)
    machine, error = play_to_source(tmp_path, recording, recording.back)
    assert error is None
    assert not machine.running


def test_the_recordings_are_whole(recording: Recording) -> None:
    assert set(recording.ends("out")) == set(OUT)
    assert set(recording.ends("back")) == set(BACK)
