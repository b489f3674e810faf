"""Groups of live migrations: which guest moves over which link, in which set-ups."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

from kvmigrate import guests

from .goals import Goal, Group
from .lineage import Lineage, Variant
from .link import Loopback
from .ours import OurVariant
from .qemu import QemuVariant
from .samples import Series
from .scratch import scratch
from .vm import Guest

RESERVE_MIB = 32
"""What the guest and its page tables need of RAM."""
TIMEOUT_S = 30.0
MOVE_FIGURES = ["total ms", "blackout ms"]
OURS = [OurVariant()]
"""kvmigrate's rows; a way to move that must be asked for is one more."""


def filled(memory_mib: int, more: str = "") -> Guest:
    """A sleeping guest with data in nearly all of its memory, and one heartbeat per millisecond."""
    return Guest(guests.path("idle"), memory_mib, f"fill={memory_mib - RESERVE_MIB} beat=1 {more}".strip())


def untouched(memory_mib: int) -> Guest:
    """The same guest, which has written next to nothing."""
    return Guest(guests.path("idle"), memory_mib, "beat=1")


@contextmanager
def moves(
    title: str,
    guest: Guest,
    variants: Sequence[Variant],
    goals: Sequence[Goal] = (),
    *,
    link: Loopback | None = None,
    once: bool = False,
    timeout_s: float = TIMEOUT_S,
    figures: Sequence[str] = tuple(MOVE_FIGURES),
    most_runs: int | None = None,
) -> Iterator[Group]:
    """The group, while its guests exist."""
    with scratch() as directory, ExitStack() as stack:
        lineages: dict[str, Lineage] = {}
        rows = []
        for variant in variants:
            key = variant.key
            if key not in lineages:
                place = directory / key.replace(" ", "-")
                lineages[key] = Lineage(place, guest, link or Loopback(), once=once)
                stack.callback(lineages[key].close)
            run = partial(lineages[key].move, variant, timeout_s)
            rows.append(Series(str(variant), run, isinstance(variant, OurVariant), most_runs))
        yield Group(title, rows, list(figures), list(goals))


@contextmanager
def idle(_: Path) -> Iterator[Group]:
    """1 GiB that does not shrink, in a guest that sleeps."""
    variants: list[Variant] = [
        QemuVariant(0, prealloc=False),
        QemuVariant(4, prealloc=False),
        QemuVariant(0),
        QemuVariant(0, 1),
        QemuVariant(2, 1),
        QemuVariant(4),
        QemuVariant(4, 1),
        QemuVariant(4, memfd=True),
        QemuVariant(4, zstd=True),
        *OURS,
    ]
    goals = [
        Goal("1 GiB incompressible idle: total", "total ms", 0.35),
        Goal("peak memory beyond guest RAM, source", "source beyond guest MiB", 64, "max", None),
        Goal("peak memory beyond guest RAM, destination", "destination beyond guest MiB", 64, "max", None),
    ]
    with moves("Idle guest with 1 GiB of incompressible data, loopback", filled(1024), variants, goals) as group:
        yield group


@contextmanager
def blackout(_: Path) -> Iterator[Group]:
    """The same guest, moved often enough for a distribution."""
    variants: list[Variant] = [QemuVariant(4, 1), QemuVariant(0, 1), *OURS]
    goals = [
        Goal("idle: blackout p50", "blackout ms", 2, "p50", None),
        Goal("idle: blackout p99", "blackout ms", 5, "p99", None),
    ]
    title = "Blackout of the idle guest with 1 GiB of incompressible data, loopback"
    with moves(title, filled(1024), variants, goals, figures=["blackout ms"]) as group:
        yield group


@contextmanager
def empty(_: Path) -> Iterator[Group]:
    """4 GiB of which next to nothing was ever written."""
    variants: list[Variant] = [
        *(QemuVariant(channels, limit, prealloc=False) for channels in (0, 2, 4) for limit in (300, 1)),
        *OURS,
    ]
    goals = [Goal("untouched 4 GiB: total", "total ms", 0.10)]
    title = "Guest of 4 GiB that has touched almost nothing, loopback"
    with moves(title, untouched(4096), variants, goals, once=True) as group:
        yield group
