"""The loop over a real memory and a real dirty log, with a sink that keeps the pages it is given."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator

import pytest

from kvmigrate._core import ffi, lib
from kvmigrate.config import PAGE_BYTES
from kvmigrate.errors import Cancelled, NotConverged
from kvmigrate.memory.region import GuestMemory
from kvmigrate.precopy.converge import Limits
from kvmigrate.precopy.ledger import RoundRecord
from kvmigrate.precopy.rounds import PreCopy, Round, check_round
from tests.fake_machine import MIB, FakeMachine

LIMITS = Limits(downtime_limit_ms=300.0, max_rounds=10)


class CopySink:
    """Keeps every page at its offset; ``during`` is called once in each round, in the middle of it."""

    def __init__(self, memory: GuestMemory) -> None:
        self.pages = bytearray(memory.size_bytes)
        self.ended: list[RoundRecord] = []
        self.during: Callable[[int], None] = lambda number: None

    def write_round(self, memory: GuestMemory, round_: Round) -> None:
        chunk = ffi.new("struct kmig_chunk *")
        lib.kmig_round_begin(memory.handle, round_.handle)
        while check_round(lib.kmig_round_next(memory.handle, round_.handle, chunk, ffi.NULL), "test"):
            for i in range(chunk.nr_runs):
                self._take(memory, chunk.run[i])
            round_.handle.bytes_sent += chunk.nr_data_pages * PAGE_BYTES
        self.during(round_.number)

    def _take(self, memory: GuestMemory, run: object) -> None:
        first, size = run.gfn * PAGE_BYTES, run.nr_pages * PAGE_BYTES  # type: ignore[attr-defined]
        zero = run.kind == lib.KMIG_RUN_ZERO  # type: ignore[attr-defined]
        self.pages[first : first + size] = bytes(size) if zero else memory.read(first, size)

    def end_round(self, record: RoundRecord) -> None:
        self.ended.append(record)


@pytest.fixture
def machine() -> Iterator[FakeMachine]:
    machine = FakeMachine(running=True)
    yield machine
    machine.close()


def precopy(machine: FakeMachine, sink: CopySink, limits: Limits = LIMITS, abort_fd: int = -1) -> PreCopy:
    return PreCopy(machine.memory, machine.dirty_log, sink, limits, abort_fd=abort_fd)


def contents(machine: FakeMachine) -> bytes:
    return machine.memory.read(0, machine.memory.size_bytes)


def test_rounds_and_the_last_one_copy_everything(machine: FakeMachine) -> None:
    machine.fill(600)
    sink = CopySink(machine.memory)
    sink.during = lambda number: None if number else machine.fill(3, seed=50, first=7)
    rounds = precopy(machine, sink)
    rounds.run()
    machine.write(99 * PAGE_BYTES, b"between the decision and the pause")
    last = rounds.last_round()
    assert hash(bytes(sink.pages)) == hash(contents(machine))
    assert last.last
    assert last.pages_sent == 4
    assert rounds.records[-1] is last


def test_zero_pages_are_counted_and_not_sent(machine: FakeMachine) -> None:
    machine.fill(10)
    machine.write(20 * PAGE_BYTES, bytes(5 * PAGE_BYTES))
    rounds = precopy(machine, CopySink(machine.memory))
    rounds.run()
    assert rounds.records[0].pages_sent == 10
    assert rounds.records[0].pages_zero >= 5


def test_page_that_became_zero_is_announced(machine: FakeMachine) -> None:
    machine.fill(10)
    sink = CopySink(machine.memory)
    rounds = precopy(machine, sink)
    rounds.run()
    machine.write(4 * PAGE_BYTES, bytes(PAGE_BYTES))
    assert rounds.last_round().pages_cleared == 1
    assert bytes(sink.pages) == contents(machine)


def test_writer_that_never_rests_is_given_up_after_the_rounds(machine: FakeMachine) -> None:
    machine.fill(2000)
    sink = CopySink(machine.memory)
    sink.during = lambda number: machine.fill(2000, seed=number)
    rounds = precopy(machine, sink, Limits(downtime_limit_ms=0.1, max_rounds=4))
    # 2000 pages at the bandwidth assumed for a sink that reports no busy time take 65 ms.
    with pytest.raises(NotConverged, match="needs a downtime limit of"):
        rounds.run()
    assert len(rounds.records) == 4
    rounds.stop()
    assert not machine.dirty_log.active


def test_end_round_is_called_for_each_round_but_the_last(machine: FakeMachine) -> None:
    sink = CopySink(machine.memory)
    rounds = precopy(machine, sink)
    rounds.run()
    rounds.last_round()
    assert [r.round for r in sink.ended] == [0]


def test_after_stop_the_same_machine_can_be_copied_again(machine: FakeMachine) -> None:
    machine.fill(50)
    first = precopy(machine, CopySink(machine.memory))
    first.run()
    first.stop()
    first.stop()
    sink = CopySink(machine.memory)
    second = precopy(machine, sink)
    second.run()
    second.last_round()
    assert second.records[0].pages_sent == 50, "the second run must not rely on what the first had sent"
    assert bytes(sink.pages) == contents(machine)


def test_cancel_is_an_error_of_its_own() -> None:
    with pytest.raises(Cancelled):
        check_round(-errno.ECANCELED, "test")


def test_progress_never_falls_and_ends_at_one(machine: FakeMachine) -> None:
    machine.fill(1500)
    sink = CopySink(machine.memory)
    sink.during = lambda number: machine.fill(900 >> number, seed=number)
    rounds = precopy(machine, sink)
    seen: list[float] = []
    over = threading.Event()

    def look() -> None:
        while not over.is_set():
            seen.append(rounds.progress.view().fraction)
            os.sched_yield()

    watcher = threading.Thread(target=look)
    watcher.start()
    rounds.run()
    rounds.last_round()
    over.set()
    watcher.join()
    assert seen == sorted(seen)
    assert rounds.progress.view().fraction < 1.0
    rounds.progress.finish()
    assert rounds.progress.view().fraction == 1.0


def test_progress_view_adds_up(machine: FakeMachine) -> None:
    machine.fill(300)
    rounds = precopy(machine, CopySink(machine.memory))
    rounds.run()
    rounds.last_round()
    view = rounds.progress.view()
    assert view.normal_pages == 300
    assert view.transferred_bytes == 300 * PAGE_BYTES
    assert view.total_bytes == 8 * MIB
    assert view.remaining_bytes == 0
    assert view.dirty_sync_count == 2
