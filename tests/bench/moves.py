"""Groups of live migrations: which guest moves over which link, in which set-ups."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

from kvmigrate import guests

from .goals import Goal, Group
from .lineage import Lineage, Variant
from .link import Loopback
from .ours import OurVariant
from .samples import Series
from .scratch import scratch
from .vm import Guest

RESERVE_MIB = 32
"""What the guest and its page tables need of RAM."""
TIMEOUT_S = 30.0
MOVE_FIGURES = ["total ms", "blackout ms"]
OURS = [OurVariant()]
"""kvmigrate's rows; a way to move that must be asked for is one more."""


INCOMPRESSIBLE, TEXT, HALF_ZERO = range(3)
"""Kinds of data that the guests know."""


def filled(memory_mib: int, kind: int = INCOMPRESSIBLE) -> Guest:
    """A sleeping guest with data in nearly all of its memory, and one heartbeat per millisecond."""
    return Guest(guests.path("idle"), memory_mib, f"fill={memory_mib - RESERVE_MIB} kind={kind} beat=1", memory_mib)


def writing(hot_mib: int, speed: int) -> Guest:
    """1 GiB of incompressible data, of which ``hot_mib`` are rewritten at ``speed`` MiB/s, 0 for full speed."""
    fill = 1024 - RESERVE_MIB - hot_mib
    return Guest(guests.path("writer"), 1024, f"fill={fill} hot={hot_mib} speed={speed} beat=1", 1024)


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
