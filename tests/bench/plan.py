"""What is measured: groups of rows that run in turn, the figure that counts, and the goal it is held to."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from kvmigrate import guests

from .qemu import QemuVariant
from .runs import our_move, our_restore, our_save, qemu_move, qemu_restore, qemu_save
from .samples import Series
from .vm import Guest

MEMORY_MIB = 1024
FILL_MIB = 992
"""All of RAM but what the guest and its page tables need."""


@dataclass(frozen=True)
class Group:
    """Rows that are compared: the last one is kvmigrate's, all others are QEMU's."""

    name: str
    title: str
    figure: str
    rows: list[Series]
    at_most: float
    absolute: bool = False
    """Whether the goal is a value of kvmigrate's own figure; if not, it is a ratio to QEMU's best row."""

    def goal(self) -> str:
        """The goal in words."""
        return f"at most {self.at_most:g}" + ("" if self.absolute else " × QEMU's best row")


def filled() -> Guest:
    """1 GiB, nearly all of it incompressible; one heartbeat per millisecond, asleep in between."""
    return Guest(guests.path("idle"), MEMORY_MIB, f"fill={FILL_MIB} beat=1")


def untouched() -> Guest:
    """1 GiB of which next to nothing was ever written."""
    return Guest(guests.path("idle"), MEMORY_MIB, "beat=1")


def groups(files: Path) -> list[Group]:
    """All groups; saved states go into ``files``, a directory on tmpfs."""
    return [_full(), _empty(), _blackout(), _save(files), _restore(files)]


def _moves(guest: Guest, variants: list[QemuVariant]) -> list[Series]:
    rows = [Series(str(variant), partial(qemu_move, guest, variant)) for variant in variants]
    return [*rows, Series("kvmigrate", lambda: our_move(guest))]


def _full() -> Group:
    variants = [
        QemuVariant(channels, limit, prealloc)
        for channels in (0, 2, 4)
        for limit in (None, 1)
        for prealloc in (False, True)
    ]
    title = "Live migration of an idle guest with 992 MiB of incompressible data, over loopback TCP"
    return Group("full", title, "total_ms", _moves(filled(), variants), 0.6)


def _empty() -> Group:
    variants = [QemuVariant(0, None), QemuVariant(0, 1), QemuVariant(0, 1, True), QemuVariant(2, 1)]
    title = "Live migration of a guest of 1 GiB that has touched almost nothing"
    return Group("empty", title, "total_ms", _moves(untouched(), variants), 0.25)


def _blackout() -> Group:
    title = "Blackout, seen from outside, of the idle guest with 992 MiB"
    return Group("blackout", title, "blackout_ms", _moves(filled(), [QemuVariant(0, 1, True)]), 5, absolute=True)


def _save(files: Path) -> Group:
    guest = filled()
    rows = [
        Series("QEMU, migrate to exec:cat > FILE", lambda: qemu_save(guest, "exec", files / "exec")),
        Series("QEMU, migrate to fd:FILE", lambda: qemu_save(guest, "fd", files / "fd")),
        Series("kvmigrate snapshot", lambda: our_save(guest, files / "snapshot")),
    ]
    return Group("save", "Snapshot of the same guest to tmpfs, while it runs", "total_ms", rows, 0.6)


def _restore(files: Path) -> Group:
    guest = filled()
    rows = [
        Series("QEMU, -incoming exec:cat FILE", lambda: qemu_restore(guest, "exec:cat " + str(files / "exec"))),
        Series("kvmigrate restore", lambda: our_restore(guest, files / "snapshot")),
    ]
    title = "Restore of that snapshot: from the start of the process to the first heartbeat"
    return Group("restore", title, "first_heartbeat_ms", rows, 0.25)
