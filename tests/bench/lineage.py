"""One guest that moves on from process to process: each run's destination is the next run's source.

Booting a guest and filling its memory takes longer than a move. So the rows of one system and one kind of memory share
a guest, which stands still while another one is measured. Where what a move leaves behind would not be what a fresh
guest is (memory that was never touched), a guest makes one move only.
"""

from __future__ import annotations

import itertools
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from .link import Loopback
from .samples import Sample
from .vm import KIB, Guest, Vm
from .warm import warm

READY_S = 60.0
SETTLE_S = 0.2
MIB = 1 << 20


class Variant(Protocol):
    """One system in one set-up: a row of a table."""

    @property
    def key(self) -> str: ...

    def boot(self, directory: Path, guest: Guest, prefix: Sequence[str]) -> Vm: ...

    def receive(self, directory: Path, guest: Guest, prefix: Sequence[str], uri: str) -> Vm: ...

    def prepare(self, vm: Vm) -> None: ...

    def details(self, source: Vm) -> Sample: ...


class Unfinished(RuntimeError):
    """A migration did not come to its end in the time that it had."""


class Lineage:
    """The guest, wherever it is now. ``directory`` holds the sockets of its processes."""

    def __init__(self, directory: Path, guest: Guest, link: Loopback, *, once: bool) -> None:
        self._directory = directory
        self._guest = guest
        self._link = link
        self._once = once
        self._numbers = itertools.count()
        self._vm: Vm | None = None
        self._side = 0

    def _place(self) -> Path:
        return self._directory / str(next(self._numbers))

    def source(self, variant: Variant) -> Vm:
        """The process that has the guest; it runs, and has for a moment."""
        if self._vm is None:
            warm(self._guest.data_mib)
            self._vm = variant.boot(self._place(), self._guest, self._link.prefix(self._side))
            self._vm.heartbeats.wait_first(READY_S)
        else:
            self._vm.run_on()
        time.sleep(SETTLE_S)
        return self._vm

    def move(self, variant: Variant, timeout_s: float) -> Sample:
        """Move the guest to a new process. After a failure the guest is gone, and the next run boots another one."""
        done = False
        destination: Vm | None = None
        try:
            source = self.source(variant)
            other = 1 - self._side
            uri = self._link.uri(other)
            destination = variant.receive(self._place(), self._guest, self._link.prefix(other), uri)
            variant.prepare(source)
            if destination.resident_guest_kib() < KIB * KIB // 16:
                warm(self._guest.data_mib)
            sample = measure_move(source, destination, uri, timeout_s).joined(variant.details(source))
            source.close()
            self._vm, self._side, done = destination, other, True
            if self._once:
                self.close()
            else:
                destination.hold()
            return sample
        finally:
            if not done:
                self.close()
                if destination is not None:
                    destination.close()

    def close(self) -> None:
        """End the guest."""
        if self._vm is not None:
            self._vm.close()
            self._vm = None
        shutil.rmtree(self._directory, ignore_errors=True)


def since_ms(start_ns: int, end_ns: int | None = None) -> float:
    """Milliseconds from ``start_ns`` until ``end_ns``, or until now."""
    return ((time.monotonic_ns() if end_ns is None else end_ns) - start_ns) / 1e6


def measure_move(source: Vm, destination: Vm, uri: str, timeout_s: float) -> Sample:
    """Start a migration that is set up, and time it. Raises Unfinished, QmpError or GuestDamaged."""
    source_kib = source.resident_guest_kib()
    source.reset_peak()
    source.qmp.events.clear()  # also of its own arrival
    started = time.monotonic_ns()
    source.qmp.execute("migrate", uri=uri)
    try:
        passes = source.qmp.wait_completed(timeout_s=timeout_s)
    except TimeoutError:
        raise Unfinished(f"not completed within {timeout_s:g} s") from None
    completed_ms = since_ms(started)
    first = destination.heartbeats.wait_first(READY_S)
    source_mib = source.peak_beyond_guest_mib(source_kib)
    info = source.qmp.execute("query-migrate")
    last = source.heartbeats.last_ns
    assert last is not None
    if first < last:
        raise RuntimeError("the guest was heard at the destination before its last heartbeat at the source")
    destination.heartbeats.wait_after(first, READY_S)
    for one in (source, destination):
        one.heartbeats.check()
    figures = {
        "total ms": max(completed_ms, since_ms(started, first)),
        "blackout ms": since_ms(last, first),
        "own downtime ms": float(info["downtime"]),
        "sent MiB": info["ram"]["transferred"] / MIB,
        "passes": float(info["ram"]["dirty-sync-count"]),
        "source beyond guest MiB": source_mib,
        "destination beyond guest MiB": destination.peak_beyond_guest_mib(destination.resident_guest_kib()),
    }
    return Sample(figures, passes=[since_ms(started, one) for one in passes])
