"""What the dirty log costs in a round without writes, for more and more memory that is mapped but mostly empty."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from kvmigrate._core import ffi, lib
from kvmigrate.errors import check
from kvmigrate.kvm.system import System
from kvmigrate.memory.dirty import DirtyLog, LogMode
from kvmigrate.memory.region import GuestMemory

from .goals import Goal, Group
from .samples import Sample, Series, quantile

SIZES_GIB = (1, 8, 64, 512)
TOUCHED_MIB = 256
ROUNDS = 9
KVM_GET_DIRTY_LOG = 0x4010AE42
"""_IOW(KVMIO, 0x42, struct kvm_dirty_log), linux/kvm.h; the structure is a slot's number and the bitmap's address."""
FIGURE = "ms per clean round"


def clean_round(gib: int, mode: LogMode) -> Sample:
    """Log, take everything once, then rounds that find nothing; the median of some."""
    with System.open() as system, system.create_vm() as vm, GuestMemory(gib << 30) as memory:
        for at in range(TOUCHED_MIB):
            memory.write(at << 20, b"x")
        memory.attach(vm.fd)
        log = DirtyLog(memory, mode)
        began = time.monotonic()
        log.start()
        started_ms = (time.monotonic() - began) * 1e3
        first_ms = take_round(memory, first=True)
        times = []
        for _ in range(ROUNDS):
            began = time.monotonic()
            pages = log.sync()
            take_round(memory, first=False)
            times.append((time.monotonic() - began) * 1e3)
        if pages:
            raise RuntimeError(f"{pages} pages are dirty that nobody wrote")
        kernel_ms = fetch_ms(vm.fd, memory)
        began = time.monotonic()
        log.stop()
        stopped_ms = (time.monotonic() - began) * 1e3
    figures = {FIGURE: quantile(times[1:], 0.5), "of it in KVM_GET_DIRTY_LOG": kernel_ms}
    figures |= {"ms of the first round": first_ms, "ms to start logging": started_ms, "ms to stop logging": stopped_ms}
    return Sample(figures)


def take_round(memory: GuestMemory, *, first: bool) -> float:
    """One round that goes nowhere, in milliseconds."""
    round_, chunk = ffi.new("struct kmig_round *"), ffi.new("struct kmig_chunk *")
    round_.abort_fd, round_.first = -1, first
    began = time.monotonic()
    lib.kmig_round_begin(memory.handle, round_)
    while check(lib.kmig_round_next(memory.handle, round_, chunk, ffi.NULL), "a round"):
        continue
    return (time.monotonic() - began) * 1e3


def fetch_ms(vm_fd: int, memory: GuestMemory) -> float:
    """What the kernel alone takes to tell that nothing was written: nobody who asks it can be faster."""
    bitmaps = [ffi.new("uint8_t[]", slot.nr_pages // 8 + 8) for slot in memory.slots]
    calls = [
        ffi.new("uint64_t[2]", [slot.id, int(ffi.cast("uintptr_t", bitmap))])
        for slot, bitmap in zip(memory.slots, bitmaps, strict=True)
    ]
    times = []
    for _ in range(ROUNDS):
        began = time.monotonic()
        for call in calls:
            check(lib.kmig_ioctl(vm_fd, KVM_GET_DIRTY_LOG, call), "KVM_GET_DIRTY_LOG")
        times.append((time.monotonic() - began) * 1e3)
    return quantile(times[1:], 0.5)


@contextmanager
def slots(_: Path) -> Iterator[Group]:
    """Rows by size, for both ways to fetch the log."""
    rows = [
        Series(f"{gib} GiB, {mode.name}", partial(clean_round, gib, mode), ours=True)
        for gib in SIZES_GIB
        for mode in LogMode
    ]
    goals = [Goal("dirty log of a clean 512 GiB: per round", FIGURE, 1, "p50", None, f"{SIZES_GIB[-1]} GiB")]
    title = "Dirty log: a round in which nothing was written, by size of guest RAM, 256 pages of it touched"
    yield Group(title, rows, [FIGURE], goals)
