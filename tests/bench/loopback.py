"""Groups of live migrations over the loopback: an idle guest, an empty one, kinds of data, hot sets, growth."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from .goals import Goal, Group, Plan
from .lineage import Variant
from .moves import OURS, OVER, PREPARED, TOUCHED, moves
from .qemu import QemuVariant
from .sizes import HALF_ZERO, RESERVE_MIB, TEXT, filled, untouched, writing

HOT_SETS_MIB = (16, 64, 256)
GOAL_SETS_MIB = (64, 256)
SPEEDS_MIB_S = (100, 500, 1000)
GROWTH_GIB = (1, 2, 4, 8)
HOT_TIMEOUT_S = 8.0
"""QEMU's way through the data takes one to two seconds: who is not done by then will not be."""


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
        *PREPARED,
        *OVER,
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
    variants: list[Variant] = [QemuVariant(4, 1), QemuVariant(0, 1), *TOUCHED]
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


@contextmanager
def text(_: Path) -> Iterator[Group]:
    """1 GiB of data that shrinks like a text."""
    variants: list[Variant] = [QemuVariant(0), QemuVariant(4), QemuVariant(4, zstd=True), *TOUCHED]
    with moves("Idle guest with 1 GiB of text-like data, loopback", filled(1024, TEXT), variants) as group:
        yield group


@contextmanager
def zeros(_: Path) -> Iterator[Group]:
    """1 GiB of which every second page was written with zeros."""
    variants: list[Variant] = [QemuVariant(0), QemuVariant(4), *TOUCHED]
    title = "Idle guest with 1 GiB of which half the pages are zero, loopback"
    with moves(title, filled(1024, HALF_ZERO), variants, once=True) as group:
        yield group


def hot(hot_mib: int, speed: int) -> Plan:
    """A hot set that is rewritten at so many MiB/s, 0 for full speed."""
    if not speed:
        return Plan(f"hot-{hot_mib}", 7, partial(_hot, hot_mib))
    return Plan(f"hot-{hot_mib}-{speed}", 1, partial(_hot_at, hot_mib, speed))


def hot_at_speeds() -> Iterator[Plan]:
    """Every hot set at every speed."""
    for hot_mib in HOT_SETS_MIB:
        for speed in SPEEDS_MIB_S:
            yield hot(hot_mib, speed)


@contextmanager
def _hot(hot_mib: int, _: Path) -> Iterator[Group]:
    title = f"Guest with 1 GiB of which {hot_mib} MiB are rewritten at full speed, loopback"
    variants: list[Variant] = [
        QemuVariant(0),
        QemuVariant(0, xbzrle=True),
        QemuVariant(4),
        QemuVariant(4, 1),
        *TOUCHED,
        OVER[-1],
    ]
    goals = [
        Goal(f"hot {hot_mib} MiB: blackout p50", "blackout ms", 3, "p50", None),
        Goal(f"hot {hot_mib} MiB: blackout p50, ratio", "blackout ms", 0.5),
    ]
    asked = goals if hot_mib in GOAL_SETS_MIB else []
    with moves(title, writing(hot_mib, 0), variants, asked, timeout_s=HOT_TIMEOUT_S) as group:
        yield group


@contextmanager
def _hot_at(hot_mib: int, speed: int, _: Path) -> Iterator[Group]:
    title = f"Guest with 1 GiB of which {hot_mib} MiB are rewritten at {speed} MiB/s, loopback"
    variants: list[Variant] = [QemuVariant(4)]
    variants += [QemuVariant(4, 1)] if speed < SPEEDS_MIB_S[-1] else []
    with moves(title, writing(hot_mib, speed), [*variants, *TOUCHED], timeout_s=HOT_TIMEOUT_S) as group:
        yield group


def growth_plans() -> Iterator[Plan]:
    """The same guest with more and more data."""
    for gib in GROWTH_GIB:
        yield Plan(f"growth-{gib}", 1, partial(_growth, gib))


@contextmanager
def _growth(gib: int, _: Path) -> Iterator[Group]:
    title = f"Growth: idle guest with {gib} GiB of incompressible data, loopback"
    # Guests that are kept for the next turn would need three times the memory.
    with moves(title, filled(gib * 1024 + RESERVE_MIB), PREPARED, once=True) as group:
        yield group
