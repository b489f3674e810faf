"""The pre-copy loop: rounds of dirty pages into a sink while the guest runs, then one last round while it is paused.

A sink is where pages go. Migration's is a socket, the snapshot's a file::

    class FileSink:                                     # what a user of this module writes
        def write_round(self, memory: GuestMemory, round_: Round) -> None:
            check_round(lib.kmig_file_save_round(memory.handle, round_.handle, self._fd), "memory.raw")

        def end_round(self, record: RoundRecord) -> None:
            pass

    precopy = PreCopy(machine.memory, machine.dirty_log, FileSink(...), limits, abort_fd=-1, timeout_ms=10_000)
    precopy.run()                # logging on, rounds until the decision is SWITCH; raises NotConverged
    machine.pause(reason)
    sections = machine.save()    # may write guest memory, so the last sync comes after it
    precopy.last_round()
    precopy.stop()               # logging off: after the guest runs again, for it takes time; also after any error

``precopy.progress`` may be read by any thread at any time.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from typing import Any, Protocol

from .._core import ffi, lib
from ..errors import Cancelled, NotConverged, check
from ..memory.dirty import DirtyLog
from ..memory.region import GuestMemory
from .converge import Action, Decision, Limits, Stats, decide
from .ledger import RoundRecord
from .progress import Progress


def check_round(rc: int, what: str) -> int:
    """``check`` for a round: a readable ``abort_fd`` is :class:`Cancelled`, not a host's error."""
    if rc == -errno.ECANCELED:
        raise Cancelled("cancelled while pages were being copied")
    return check(rc, what)


class Round:
    """The cursor and the counters of one round: ``handle`` is its ``struct kmig_round *``, which the sink hands to C.

    C counts in the struct while the round runs; other threads may read the counters meanwhile.
    A sink that works on the pages outside of the C core's sending (a compressor) adds that time to ``work_ns``.
    One that has several connections takes a :meth:`part` for each further one; the counters are those of all parts.
    """

    def __init__(
        self, number: int, *, abort_fd: int, timeout_ms: float, bandwidth_bytes_s: int, last: bool = False
    ) -> None:
        self.number = number
        self.last = last
        self.work_ns = 0
        self._ways: dict[str, tuple[str, int]] = {}
        self._parts = [self]
        self.bandwidth_bytes_s = self._cap_bytes_s = bandwidth_bytes_s
        self.handle: Any = ffi.new("struct kmig_round *")
        self.handle.abort_fd = abort_fd
        self.handle.timeout_ms = max(1, int(timeout_ms))
        self.handle.bandwidth = bandwidth_bytes_s
        self.handle.first = 1 if number == 0 else 0

    def part(self, memory: GuestMemory, of: int) -> Round:
        """One more part of this round, which has begun: for one of ``of`` connections, each in a thread of its own,
        which share the bandwidth."""
        share_bytes_s = -(-self._cap_bytes_s // of)
        self.bandwidth_bytes_s = self.handle.bandwidth = share_bytes_s
        one = Round(
            self.number,
            abort_fd=self.handle.abort_fd,
            timeout_ms=self.handle.timeout_ms,
            bandwidth_bytes_s=share_bytes_s,
            last=self.last,
        )
        one.handle.delta = self.handle.delta
        lib.kmig_round_join(memory.handle, one.handle)
        self._parts.append(one)
        return one

    def total(self, counter: str) -> int:
        """What all parts have counted so far, by a counter's name in ``struct kmig_round``."""
        return sum(getattr(part.handle, counter) for part in self._parts)

    def went_as(self, codec: str, why: str, nr_pages: int) -> None:
        """A part of it, of ``nr_pages``, went as ``codec`` says, for the reason ``why``."""
        before = self._ways[codec][1] if codec in self._ways else 0
        self._ways[codec] = (why, before + nr_pages)

    def _way(self) -> tuple[str, str]:
        """The codec of most of its pages and the reason, and what went another way."""
        for part in self._parts[1:]:
            for codec, (why, nr_pages) in part._ways.items():
                self.went_as(codec, why, nr_pages)
        if not self._ways:
            return "", ""
        codec, (why, _) = max(self._ways.items(), key=lambda way: way[1][1])
        others = [f"{n:,} pages {name} ({reason})" for name, (reason, n) in self._ways.items() if name != codec and n]
        if self.total("pages_delta"):
            codec += "+delta"
            others.append(f"{self.total('pages_delta'):,} pages as changes")
        return codec, "; ".join([why, *others])

    def record(self, pages_dirty: int, time_ns: int) -> RoundRecord:
        """The counters as they stand, put down."""
        # The parts run beside each other: their times are averages, so that what is sent over them is a rate.
        busy_ns = self.total("busy_ns") // len(self._parts)
        work_ns = sum(part.work_ns for part in self._parts) // len(self._parts)
        # Under a cap the pacer's sleeps lie between time and busy time; what remains is work only without one.
        work_ns = work_ns or (0 if self.bandwidth_bytes_s else max(time_ns - busy_ns, 0))
        codec, codec_why = self._way()
        return RoundRecord(
            round=self.number,
            pages_dirty=pages_dirty,
            pages_zero=self.total("pages_zero"),
            pages_cleared=self.total("pages_cleared"),
            pages_sent=self.total("pages_sent"),
            pages_delta=self.total("pages_delta"),
            bytes_sent=self.total("bytes_sent"),
            time_ms=time_ns / 1e6,
            busy_ms=busy_ns / 1e6,
            work_ms=work_ns / 1e6,
            last=self.last,
            codec=codec,
            codec_why=codec_why,
            connections=len(self._parts),
        )


class PageSink(Protocol):
    """Where the pages of a round go."""

    def write_round(self, memory: GuestMemory, round_: Round) -> None:
        """Deliver everything that is pending, by ``kmig_round_begin`` and ``kmig_round_next`` or a C function that does
        both, counting in ``round_.handle``. Whatever was not delivered when it raises stays pending."""
        ...

    def end_round(self, record: RoundRecord) -> None:
        """A round is over. Not called for the last one, which runs in the blackout."""
        ...


class PreCopy:
    """One run of rounds over ``memory`` into ``sink``; used once.

    ``observe`` is called after each round with its record, from the calling thread; ``abort_fd`` is an eventfd that
    cancels when readable (-1: none); ``timeout_ms`` bounds how long the sink may take nothing.
    """

    def __init__(
        self,
        memory: GuestMemory,
        dirty_log: DirtyLog,
        sink: PageSink,
        limits: Limits,
        *,
        abort_fd: int = -1,
        timeout_ms: float = 10_000.0,
        observe: Callable[[RoundRecord, Decision], None] | None = None,
    ) -> None:
        self._memory = memory
        self._dirty_log = dirty_log
        self._sink: PageSink | None = sink
        self._limits = limits
        self._abort_fd = abort_fd
        self._timeout_ms = timeout_ms
        self._observe = observe
        self.records: list[RoundRecord] = []
        self.decision: Decision | None = None
        self.progress = Progress(memory.size_bytes)

    def run(self) -> Decision:
        """Log on, then rounds until it is time to pause; returns the SWITCH decision.

        Raises :class:`NotConverged` with the reason when the rounds are used up, :class:`Cancelled`, and what the
        sink raises. The log stays on: call :meth:`stop` whatever happens.
        """
        # Logging must be on before the first page is read, or a write between both is in no round.
        self._dirty_log.start()
        self.progress.begin(self._memory.resident_pages())
        pages_left = 0
        while True:
            record = self._write(len(self.records), pages_left)
            self._open_sink().end_round(record)
            pages_left = self._dirty_log.sync()
            decision = self._decide(pages_left)
            if self._observe is not None:
                self._observe(record, decision)
            if decision.action is Action.GIVE_UP:
                raise NotConverged(decision.why)
            if decision.action is Action.SWITCH:
                return decision

    def last_round(self) -> RoundRecord:
        """Sync and send what is left, without a cap. The guest must be paused and its state saved already, since
        saving may write guest memory."""
        return self._write(len(self.records), self._dirty_log.sync(), last=True)

    def copy_paused(self) -> RoundRecord:
        """The whole of a guest that is paused and stays so, in one round and without a log."""
        self.progress.begin(self._memory.resident_pages())
        return self._write(0, 0, last=True)

    def _open_sink(self) -> PageSink:
        assert self._sink is not None, "no round after stop"
        return self._sink

    def stop(self) -> None:
        """Logging off, and what is pending forgotten; the sink, which may hold much, is let go. Idempotent."""
        self._sink = None
        if self._dirty_log.active:
            self._dirty_log.stop()

    def _decide(self, pages_left: int) -> Decision:
        knees = self.decision.knees if self.decision is not None else 0
        decision = decide(Stats(tuple(self.records), pages_left, self._limits, knees))
        self.decision = decision
        self.progress.decided(pages_left, decision)
        return decision

    def _write(self, number: int, pages_dirty: int, last: bool = False) -> RoundRecord:
        round_ = Round(
            number,
            abort_fd=self._abort_fd,
            timeout_ms=self._timeout_ms,
            bandwidth_bytes_s=0 if last else self._limits.bandwidth_bytes_s,
            last=last,
        )
        self.progress.enter(round_.total, number)
        begin = time.monotonic_ns()
        self._open_sink().write_round(self._memory, round_)
        # What round 0 looked at is known only after it: it finds the resident pages window by window.
        record = round_.record(pages_dirty or round_.total("pages_done"), time.monotonic_ns() - begin)
        self.records.append(record)
        self.progress.leave(record)
        return record
