"""The dirty log of a real KVM, in both modes: a guest writes, and no write is lost on the way to a copy."""

from __future__ import annotations

import errno
import os
import random
import socket
import struct
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from kvmigrate._core import ffi, lib
from kvmigrate.config import PAGE_BYTES
from kvmigrate.errors import HostError
from kvmigrate.memory.dirty import DirtyLog, LogMode
from kvmigrate.memory.region import GuestMemory
from tests.backends import ANONYMOUS, HUGETLBFS, MEMFD, memory_of

from .guest import OWN_GFNS, RANDOM_WRITER, SWEEP, Guest, assemble
from .tools import contents, copied_gfns, new_incoming, new_round, stream_round

MIB, GIB = 1 << 20, 1 << 30
SMALL_BYTES = 64 * MIB + 3 * PAGE_BYTES
LARGE_BYTES = 7 * GIB // 2 + 3 * PAGE_BYTES
FIRST_FREE_GFN = 0x400
NR_WINDOW = 512

pytestmark = pytest.mark.skipif(os.environ.get("KVMIGRATE_NO_KVM") == "1", reason="KVMIGRATE_NO_KVM is set")


def window_of(memory: GuestMemory) -> list[int]:
    """Pages at both ends of every slot, around multiples of 64 and of a round's windows, and scattered ones."""
    chosen = set[int]()
    for slot in memory.slots:
        first, end = max(slot.base_gfn, FIRST_FREE_GFN), slot.base_gfn + slot.nr_pages
        around = [first, first + 64, end - 64, end - 3, *range(slot.base_gfn + 8192, end, 8192)]
        chosen |= {gfn + by for gfn in around for by in (-1, 0, 1) if first <= gfn + by < end}
        chosen |= {end - 1, *range(slot.base_gfn + 8192 - 60, slot.base_gfn + min(8192, slot.nr_pages))}
    free = [range(max(s.base_gfn, FIRST_FREE_GFN), s.base_gfn + s.nr_pages) for s in memory.slots]
    source = random.Random(0)
    # Scattered, but in 24 places: every huge page that is touched takes 2 MiB of the host.
    places = [(gfns, source.choice(gfns)) for gfns in free for _ in range(24 // len(free))]
    while len(chosen) < NR_WINDOW:
        gfns, start = source.choice(places)
        chosen.add(min(start + source.randrange(200), gfns[-1]))
    return sorted(chosen)


def outside_own(gfns: list[int]) -> list[int]:
    """``gfns`` without the guest's code and page tables: KVM may log a page when it first maps it for a read."""
    return [gfn for gfn in gfns if gfn not in OWN_GFNS]


@pytest.fixture(params=list(LogMode), ids=lambda mode: mode.name)
def mode(request: pytest.FixtureRequest) -> LogMode:
    return LogMode(request.param)


@pytest.fixture(
    params=[(SMALL_BYTES, ANONYMOUS), (LARGE_BYTES, ANONYMOUS), (LARGE_BYTES, MEMFD), (66 * MIB, HUGETLBFS)],
    ids=["64MiB+3pages", "3.5GiB+3pages", "3.5GiB+3pages-memfd", "66MiB-hugetlbfs"],
)
def memory(request: pytest.FixtureRequest) -> Iterator[GuestMemory]:
    size_bytes, backend = request.param
    with memory_of(backend, size_bytes) as memory:
        yield memory


@pytest.fixture
def sweeper(memory: GuestMemory, tmp_path: Path) -> Iterator[Guest]:
    with Guest(memory, assemble(SWEEP, tmp_path), window_of(memory)) as guest:
        yield guest


def test_exactly_the_pages_that_the_guest_wrote_come_next(sweeper: Guest, mode: LogMode) -> None:
    memory = sweeper.memory
    log = DirtyLog(memory, mode)
    log.start()
    copied_gfns(memory, first=True)
    sweeper.sweep(7)
    assert log.sync() >= NR_WINDOW
    assert outside_own(copied_gfns(memory, first=False)) == sweeper.window
    assert log.sync() == 0 and copied_gfns(memory, first=False) == []
    sweeper.sweep(8)
    memory.write(FIRST_FREE_GFN * PAGE_BYTES + 5 * PAGE_BYTES, b"host")
    log.sync()
    assert outside_own(copied_gfns(memory, first=False)) == sorted([*sweeper.window, FIRST_FREE_GFN + 5])


def test_pages_that_were_never_touched_never_become_pending(sweeper: Guest, mode: LogMode) -> None:
    log = DirtyLog(sweeper.memory, mode)
    log.start()
    round_, chunk = new_round(first=True), ffi.new("struct kmig_chunk *")
    lib.kmig_round_begin(sweeper.memory.handle, round_)
    while lib.kmig_round_next(sweeper.memory.handle, round_, chunk, ffi.NULL) > 0:
        pass
    assert round_.pages_done == sweeper.memory.resident_pages() < sweeper.memory.size_bytes // PAGE_BYTES // 4
    assert log.sync() == 0


def test_what_was_not_cleared_stays_pending_after_a_round_that_broke_off(sweeper: Guest, mode: LogMode) -> None:
    memory = sweeper.memory
    log = DirtyLog(memory, mode)
    log.start()
    copied_gfns(memory, first=True)
    sweeper.sweep(1)
    assert log.sync() >= NR_WINDOW
    round_, chunk = new_round(), ffi.new("struct kmig_chunk *")
    lib.kmig_round_begin(memory.handle, round_)
    assert lib.kmig_round_next(memory.handle, round_, chunk, ffi.NULL) == 1
    lib.kmig_round_put_back(memory.handle, round_, chunk)
    assert log.sync() >= NR_WINDOW
    assert outside_own(copied_gfns(memory, first=False)) == sweeper.window


def test_stopping_turns_the_kernels_log_off_and_it_can_start_again(sweeper: Guest, mode: LogMode) -> None:
    memory = sweeper.memory
    log = DirtyLog(memory, mode)
    log.start()
    with pytest.raises(HostError):
        log.start()
    log.stop()
    assert not log.active
    fetch = struct.pack("<IIQ", 0, 0, int(ffi.cast("uintptr_t", memory.handle.slot[0].log)))
    assert lib.kmig_ioctl(sweeper.vm.fd, lib.KVM_GET_DIRTY_LOG, ffi.from_buffer(fetch)) == -errno.ENOENT
    sweeper.sweep(3)
    log.start()
    assert set(sweeper.window) <= set(copied_gfns(memory, first=True))
    sweeper.sweep(4)
    assert log.sync() >= NR_WINDOW
    log.stop()


def test_the_modes_can_follow_each_other_on_one_vm(sweeper: Guest) -> None:
    for number, mode in enumerate([LogMode.CLEAR, LogMode.GET, LogMode.CLEAR], start=1):
        log = DirtyLog(sweeper.memory, mode)
        log.start()
        copied_gfns(sweeper.memory, first=True)
        sweeper.sweep(number)
        assert log.sync() >= NR_WINDOW
        log.stop()


class Copy:
    """The other side: receives into a memory of its own, in a thread."""

    def __init__(self, size_bytes: int) -> None:
        self.memory = GuestMemory(size_bytes)
        self.sock, self._theirs = socket.socketpair()
        self._thread = threading.Thread(target=self._receive)
        self.rc = 0

    def _receive(self) -> None:
        self.rc = lib.kmig_stream_recv_pages(self.memory.handle, new_incoming(), self._theirs.fileno())

    def __enter__(self) -> Copy:
        self._thread.start()
        return self

    def finish(self) -> None:
        """Everything was sent: wait until all of it has arrived."""
        self.sock.close()
        self._thread.join()
        assert self.rc == -errno.ECONNRESET

    def __exit__(self, *_: object) -> None:
        self.sock.close()
        self._thread.join()
        self._theirs.close()
        self.memory.close()


def copy_while_it_runs(guest: Guest, mode: LogMode, copy: Copy, nr_rounds: int, writes_between: int) -> list[int]:
    """Pre-copy as a migration does it; returns how many pages each later round found."""
    memory, found = guest.memory, []
    log, sequence = DirtyLog(memory, mode), ffi.new("uint32_t *")
    log.start()
    for number in range(nr_rounds):
        if number == nr_rounds - 1:
            guest.pause()
        if number:
            found.append(log.sync())
        round_ = new_round(first=number == 0)
        assert stream_round(memory.handle, round_, copy.sock.fileno(), sequence) == 0
        # At once after the last round but one: what a wrong order lost there must not be written again.
        if number < nr_rounds - 2:
            guest.wait_for_writes(writes_between)
    log.stop()
    copy.finish()
    return found


@pytest.mark.parametrize(
    ("idle_turns", "writes_between"), [(0, 5 * NR_WINDOW), (100_000, NR_WINDOW // 4)], ids=["fast", "slow"]
)
def test_no_write_is_lost_while_rounds_run(
    memory: GuestMemory, mode: LogMode, tmp_path: Path, idle_turns: int, writes_between: int
) -> None:
    """The guest writes rising numbers to random pages and notes each in a ledger in other pages, never pausing until
    the last round. The copy must equal the original page by page, and each of its pages hold what its ledger says.
    A slow guest seldom writes a page twice, which would make up for a write that was lost."""
    code = assemble(RANDOM_WRITER, tmp_path)
    with Guest(memory, code, window_of(memory), idle_turns=idle_turns) as guest, Copy(memory.size_bytes) as copy:
        guest.resume()
        found = copy_while_it_runs(guest, mode, copy, 8, writes_between)
        written = guest.sequence
        assert min(found[:-1]) > writes_between // 10, "the guest must have been busy all along"
        assert contents(memory) == contents(copy.memory)
        assert (memory.digest, memory.nr_hashed) == (copy.memory.digest, copy.memory.nr_hashed)
        ledger = guest.ledger(copy.memory)
        # The pause may fall between the counting of a number and its note in the ledger.
        assert max(ledger.values()) in (written - 1, written)
        assert pages_out_of_step(copy.memory, ledger, written) == []


def pages_out_of_step(memory: GuestMemory, ledger: dict[int, int], written: int) -> Sequence[int]:
    """The pages whose number is not the ledger's, but for the one write that was noted and not yet made."""
    numbers = {gfn: struct.unpack("<Q", memory.read(gfn * PAGE_BYTES, 8))[0] for gfn in ledger}
    return [gfn for gfn, number in numbers.items() if number != ledger[gfn] and ledger[gfn] != written]


def test_the_window_holds_the_last_page_of_every_slot() -> None:
    with GuestMemory(LARGE_BYTES) as memory:
        ends = {slot.base_gfn + slot.nr_pages - 1 for slot in memory.slots}
        assert len(ends) == 2 and ends <= set(window_of(memory))
