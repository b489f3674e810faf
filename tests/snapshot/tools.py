"""What the tests of snapshots share: a guest that remembers what was saved, and frames taken apart and put together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from kvmigrate.config import PAGE_BYTES, Compression, MemoryBackend, SnapshotParameters
from kvmigrate.contract import RunState
from kvmigrate.precopy.converge import Decision
from kvmigrate.precopy.ledger import RoundRecord
from kvmigrate.precopy.progress import Progress
from kvmigrate.snapshot.load import Restored, restore
from kvmigrate.state import frame, section
from kvmigrate.state.section import Section, Value
from tests.fake_machine import MIB, FakeMachine

RAW = SnapshotParameters()
ZSTD = SnapshotParameters(compression=Compression(1))
PAUSED = SnapshotParameters(paused=True)
PAUSED_ZSTD = SnapshotParameters(paused=True, compression=Compression(1))


class Guest(FakeMachine):
    """Keeps the digest of what it was when it was saved: nothing may write to it from then until it is resumed."""

    saved: tuple[list[bytes], dict[str, dict[str, Value]]] | None = None
    save_writes: Mapping[int, bytes] = {}
    """What saving writes into guest memory, as some devices do."""

    def save(self) -> Sequence[Section]:
        sections = super().save()
        for gpa, data in self.save_writes.items():
            self.write(gpa, data)
        self.saved = self.digest()
        return sections


def build(description: Mapping[str, Value], backend: MemoryBackend = MemoryBackend.ANONYMOUS) -> Guest:
    """A builder without the fake machine's limit of 64 MiB."""
    machine = Guest(description["memory_bytes"], name=description["name"], backend=backend)
    machine.uuid = description["uuid"]
    return machine


@contextmanager
def guest(memory_bytes: int = 8 * MIB, *, running: bool = True) -> Iterator[Guest]:
    machine = Guest(memory_bytes, running=running)
    try:
        yield machine
    finally:
        machine.close()


@contextmanager
def restored(directory: Path, backend: MemoryBackend = MemoryBackend.ANONYMOUS) -> Iterator[Restored]:
    result = restore(directory, partial(build, backend=backend))
    try:
        yield result
    finally:
        result.machine.close()


@dataclass
class Watcher:
    """An observer that keeps what it saw and calls ``then`` after each round."""

    machine: Guest
    then: Callable[[RoundRecord, Decision | None], None] = lambda record, decision: None

    def __post_init__(self) -> None:
        self.progress: Progress | None = None
        self.seen: list[tuple[RunState, Decision | None]] = []

    def started(self, progress: Progress) -> None:
        self.progress = progress

    def round_ended(self, record: RoundRecord, decision: Decision | None) -> None:
        self.seen.append((self.machine.runstate, decision))
        self.then(record, decision)


def assert_unharmed(machine: FakeMachine, parent: Path, left: Sequence[str] = ()) -> None:
    """The guest runs, nothing is logged, and ``parent`` holds nothing but ``left``."""
    assert machine.runstate is RunState.RUNNING
    assert not machine.dirty_log.active
    assert sorted(path.name for path in parent.iterdir()) == sorted(left)


@dataclass
class RawFrame:
    """One frame of ``state``, its payload decoded."""

    kind: int
    value: Value
    mandatory: bool = True


def read_frames(path: Path) -> list[RawFrame]:
    data, at, found = path.read_bytes(), 0, []
    while at < len(data):
        header = frame.decode_header(data[at : at + 32])
        payload = data[at + 32 : at + 32 + header.length]
        found.append(RawFrame(header.kind, section.unpack(payload, "test"), header.mandatory))
        at += 32 + header.length
    return found


def write_frames(path: Path, frames: Sequence[RawFrame]) -> None:
    """Valid frames, whatever is in them: right checksums, right sequence."""
    data = b""
    for sequence, raw in enumerate(frames):
        payload = section.pack(raw.value)
        data += frame.encode_frame(raw.kind, payload, sequence, mandatory=raw.mandatory)  # type: ignore[arg-type]
    path.write_bytes(data)


def edit(directory: Path, change: Callable[[list[RawFrame]], None]) -> None:
    """Rewrite ``state`` with ``change`` made to its decoded frames."""
    frames = read_frames(directory / "state")
    change(frames)
    write_frames(directory / "state", frames)


def page(number: int) -> int:
    return number * PAGE_BYTES
