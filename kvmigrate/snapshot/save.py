"""Take a snapshot while the guest runs: pre-copy to a file, and a pause for the last round alone.

::

    staging directory ─ logging on ─ rounds while the guest runs ─┐
      ┌───────────────────────────────────────────────────────────┘
      └ pause ─ save state ─ last sync, last round ─ RESUME ─ chunk hashes ─ logging off ─ fsync ─ rename ─ fsync

With ``paused`` the guest stands still from before the first page until the snapshot is durable.
"""

from __future__ import annotations

import os
import select
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol

from .._core import ffi, lib
from ..config import SnapshotParameters
from ..contract import Migratable, RunState
from ..errors import Cancelled, HostError, NotConverged, StateError, check
from ..memory.region import GuestMemory
from ..precopy.converge import Decision, Limits
from ..precopy.ledger import Downtime, RoundRecord, Totals
from ..precopy.progress import Progress
from ..precopy.rounds import PreCopy
from ..record import dataclass
from ..state.section import Section, Value
from .format import STATE_FILE, ChunkHashes, IndexSlot, MemoryIndex
from .sink import MemorySink, open_sink, write_all
from .staging import Staging, cannot_write
from .statefile import encode_state

_SAVABLE = (RunState.RUNNING, RunState.PAUSED, RunState.PRELAUNCH)


class Observer(Protocol):
    """Who wants to watch. Called from the thread that takes the snapshot; must not block and not raise."""

    def started(self, progress: Progress) -> None:
        """Copying begins; ``progress.view()`` may be asked by any thread from now on."""
        ...

    def round_ended(self, record: RoundRecord, decision: Decision | None) -> None:
        """A round is over, and what was decided after it. The last one comes with None, and of a live snapshot only
        when the guest runs again."""
        ...


@dataclass(frozen=True, slots=True)
class SnapshotResult:
    """What taking the snapshot did. Times in milliseconds."""

    directory: Path
    rounds: tuple[RoundRecord, ...]
    pause: Downtime
    """From before the first vCPU was stopped until all were let go again, in its parts; all 0 when the guest did not
    run anyway. ``send`` is the flushing of the files, which a live snapshot does not do in the pause."""
    total_ms: float
    """Until the snapshot was durable under its name."""
    state_bytes: int
    why: str
    """Why the guest was stopped for the last round just then."""

    @property
    def pause_ms(self) -> float:
        """How long the guest stood still."""
        return self.pause.total

    @property
    def totals(self) -> Totals:
        """The sums over all rounds; a page that was written twice counts twice."""
        return Totals.of(self.rounds)

    def to_value(self) -> dict[str, Value]:
        """For JSON; times in milliseconds, ``bytes`` of both files, ``pages`` and ``zero`` in pages."""
        totals = self.totals
        return {
            "directory": str(self.directory),
            "rounds": [record.to_value() for record in self.rounds],
            "pause-time": round(self.pause_ms, 3),
            "pause": {part: ms for part, ms in self.pause.to_value().items() if part != "load"},
            "total-time": round(self.total_ms, 3),
            "bytes": totals.bytes_sent + self.state_bytes,
            "pages": totals.normal,
            "zero": totals.zero,
            "why": self.why,
        }


def take(
    machine: Migratable,
    directory: Path,
    parameters: SnapshotParameters,
    observer: Observer | None = None,
    abort_fd: int = -1,
) -> SnapshotResult:
    """Save ``machine`` as the snapshot ``directory``, which must not exist; its parent must.

    The machine is running, paused or not yet started; when this returns or raises it runs again if it did, is paused
    if it did not, and logging is off. ``abort_fd`` is an eventfd that cancels when it is readable (-1: none).

    Raises :class:`SnapshotError` (the directory exists or cannot be written), :class:`NotConverged`,
    :class:`Cancelled`, :class:`StateError`, :class:`HostError`. Nothing is left of the directory then.
    """
    if machine.runstate not in _SAVABLE:
        raise StateError(machine.runstate, "running or paused")
    if machine.dirty_log.active:
        raise StateError("being copied already", "left alone by migrations and other snapshots")
    begin = time.monotonic()
    with Staging(directory) as staging:
        sink = open_sink(staging, machine.memory, parameters.compression)
        job = _Job(machine, staging, sink, parameters, observer, abort_fd)
        with _explained(staging, sink):
            state_bytes = job.run_paused() if parameters.paused else job.run_live()
    return SnapshotResult(
        directory=directory,
        rounds=tuple(job.precopy.records),
        pause=job.pause,
        total_ms=(time.monotonic() - begin) * 1e3,
        state_bytes=state_bytes,
        why=job.why,
    )


@contextmanager
def _explained(staging: Staging, sink: MemorySink) -> Iterator[None]:
    """Turn what went wrong with a file into an error that says which, and what to do about it."""
    try:
        yield
    except OSError as error:
        raise cannot_write(staging.target, error) from error
    except HostError as error:
        if error.what != str(staging.path(sink.name)):
            raise
        raise cannot_write(staging.path(sink.name), error) from error
    except NotConverged as error:
        raise NotConverged(f"{error}; or stop the guest for all of it with --paused") from error


class _Laps:
    """What each part of the pause took, in milliseconds, under the names of :class:`Downtime`."""

    def __init__(self) -> None:
        self._last = time.monotonic()
        self.ms: dict[str, float] = {}

    def lap(self, part: str) -> None:
        now = time.monotonic()
        self.ms[part] = (now - self._last) * 1e3
        self._last = now


class _Job:
    """One snapshot being taken. ``pause`` and ``why`` are what the result tells of it."""

    def __init__(
        self,
        machine: Migratable,
        staging: Staging,
        sink: MemorySink,
        parameters: SnapshotParameters,
        observer: Observer | None,
        abort_fd: int,
    ) -> None:
        self._machine = machine
        self._staging = staging
        self._sink = sink
        self._observer = observer
        self._abort_fd = abort_fd
        self._before = machine.runstate
        # Now, before the guest is paused: a restored one starts by itself if this one ran.
        self._description = {"autostart": self._before is RunState.RUNNING, **machine.describe()}
        self.precopy = PreCopy(
            machine.memory,
            machine.dirty_log,
            sink,
            Limits(parameters.downtime_limit_ms, parameters.max_rounds),
            abort_fd=abort_fd,
            observe=self._round_ended,
        )
        self.pause = Downtime()
        self.why = "the guest stood still for all of it"

    def run_live(self) -> int:
        """Copy while the guest runs, stop it for the last round only; returns the size of ``state`` in bytes."""
        self._tell_start()
        try:
            self.why = self.precopy.run().why
            with self._stopped() as laps:
                sections = self._machine.save()
                laps.lap("state")
                # Saving may write guest memory, so the last sync comes after it.
                self.precopy.last_round()
                laps.lap("last_pages")
            self._tell_end()
            # Only copying a page changes its hash, so what the guest writes from here on is not in them.
            index, hashes = self._index()
        finally:
            self.precopy.stop()
        return self._finish(sections, index, hashes)

    def run_paused(self) -> int:
        """Stop the guest until the snapshot is durable; returns the size of ``state`` in bytes."""
        self._tell_start()
        with self._stopped() as laps:
            # As above: the pages last.
            sections = self._machine.save()
            laps.lap("state")
            self.precopy.copy_paused()
            laps.lap("last_pages")
            self._tell_end()
            written = self._finish(sections, *self._index())
            laps.lap("send")
        return written

    @contextmanager
    def _stopped(self) -> Iterator[_Laps]:
        """The guest stands still inside, and goes on afterwards as it did before, whatever happened."""
        laps = _Laps()
        try:
            self._machine.pause(RunState.SAVE_VM)
            if self._machine.runstate is not RunState.SAVE_VM:
                raise StateError(self._machine.runstate, "running or paused")
            laps.lap("stop")
            yield laps
        finally:
            # A guest that ended by itself meanwhile has another state by now, and keeps it. One that could not be
            # stopped may have some of its vCPUs parked: it is let go, too.
            if self._machine.runstate in (RunState.SAVE_VM, self._before):
                if self._before is RunState.RUNNING:
                    self._machine.resume()
                    laps.lap("resume")
                    self.pause = Downtime(**laps.ms)
                else:
                    # A guest that was not started yet is a paused one now: there is no way back to PRELAUNCH.
                    self._machine.pause(RunState.PAUSED)

    def _index(self) -> tuple[MemoryIndex, ChunkHashes]:
        """What the page hashes in memory say of the file."""
        memory: GuestMemory = self._machine.memory
        slots = tuple(IndexSlot(slot.id, slot.base_gfn, slot.nr_pages) for slot in memory.slots)
        hashes = ChunkHashes(slots)
        for position, slot in enumerate(slots):
            words = ffi.new("uint64_t[]", slot.nr_chunks)
            check(lib.kmig_file_chunk_hashes(memory.handle, position, words), "kmig_file_chunk_hashes")
            hashes.of_slot[position].frombytes(ffi.buffer(words))
        size_bytes = os.fstat(self._staging.fd(self._sink.name)).st_size
        index = MemoryIndex(
            self._sink.name, size_bytes, self._sink.nr_frames, memory.handle.digest, memory.handle.nr_hashed, slots
        )
        return index, hashes

    def _finish(self, sections: Sequence[Section], index: MemoryIndex, hashes: ChunkHashes) -> int:
        """Write ``state`` and publish; returns its size in bytes."""
        fd = self._staging.create(STATE_FILE)
        written = write_all(fd, list(encode_state(self._description, sections, index, hashes)))
        self._give_up_if_cancelled()
        self._staging.publish()
        self.precopy.progress.finish()
        return written

    def _give_up_if_cancelled(self) -> None:
        poller = select.poll()
        if self._abort_fd >= 0:
            poller.register(self._abort_fd, select.POLLIN)
        if poller.poll(0):
            raise Cancelled("cancelled before the snapshot was complete; the guest runs on")

    def _tell_start(self) -> None:
        self._tell(lambda observer: observer.started(self.precopy.progress))

    def _round_ended(self, record: RoundRecord, decision: Decision) -> None:
        self._tell(lambda observer: observer.round_ended(record, decision))

    def _tell_end(self) -> None:
        self._tell(lambda observer: observer.round_ended(self.precopy.records[-1], None))

    def _tell(self, news: Callable[[Observer], None]) -> None:
        # An observer that raises must not decide over the snapshot.
        with suppress(Exception):
            if self._observer is not None:
                news(self._observer)
