"""Groups of live migrations: which guest moves over which link, in which set-ups."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

from .goals import Goal, Group
from .lineage import Lineage, Variant
from .link import Loopback
from .ours import OurVariant
from .samples import Series
from .scratch import scratch
from .vm import Guest

TIMEOUT_S = 30.0
MOVE_FIGURES = ["total ms", "blackout ms"]
OURS = [OurVariant()]
"""kvmigrate's rows; a way to move that must be asked for is one more."""
TOUCHED = [OurVariant("prefault", prefault=True)]
"""With a destination that was told the guest's size beforehand, as QEMU's rows with prealloc are."""
PREPARED = [*OURS, *TOUCHED]
OVER = [OurVariant(f"prefault, {n} connection{'s' * (n > 1)}", {"multifd-channels": n}, prefault=True) for n in (1, 4)]
"""The same over another number of connections than by default."""


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
