"""Groups of live migrations over links that are slower than the processor."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .goals import Goal, Group
from .lineage import Variant
from .link import shaped
from .moves import OURS, moves
from .ours import OurVariant
from .qemu import QemuVariant
from .sizes import INCOMPRESSIBLE, TEXT, filled

PATIENCE_S = 300.0
OUR_ZSTD = OurVariant("zstd", {"x_kvmigrate_compression": "zstd"})
LOSSLESS_MS = 400
"""A queue that holds all that a TCP connection ever has on its way here, so that nothing is dropped."""
SHORT_MS = 20


@contextmanager
def slow_text(_: Path) -> Iterator[Group]:
    """1 GiB that shrinks like a text over 100 Mbit/s."""
    variants: list[Variant] = [QemuVariant(4), QemuVariant(4, zstd=True), OUR_ZSTD]
    goals = [
        Goal("1 GiB compressible over 100 Mbit/s: total against raw", "total ms", 0.4, "p50", "multifd 4, prealloc"),
        Goal("1 GiB compressible over 100 Mbit/s: total against zstd", "total ms", 0.8, "p50", "zstd"),
    ]
    yield from _over(100, LOSSLESS_MS, variants, TEXT, goals)


@contextmanager
def gigabit(_: Path) -> Iterator[Group]:
    """1 GiB that does not shrink over 1 Gbit/s with a queue as short as a switch has."""
    yield from _over(1000, SHORT_MS, [QemuVariant(0), QemuVariant(4), *OURS], INCOMPRESSIBLE)


@contextmanager
def gigabit_lossless(_: Path) -> Iterator[Group]:
    """The same with a queue so long that nothing is lost."""
    yield from _over(1000, LOSSLESS_MS, [QemuVariant(0), QemuVariant(4), *OURS], INCOMPRESSIBLE)


@contextmanager
def gigabit_text(_: Path) -> Iterator[Group]:
    """1 GiB that shrinks like a text over 1 Gbit/s."""
    variants: list[Variant] = [QemuVariant(4, zstd=True), OUR_ZSTD, *OURS]
    yield from _over(1000, LOSSLESS_MS, variants, TEXT)


def _over(
    mbit_s: int, queue_ms: int, variants: list[Variant], kind: int, goals: list[Goal] | None = None
) -> Iterator[Group]:
    data = "text-like" if kind == TEXT else "incompressible"
    speed = f"{mbit_s // 1000} Gbit/s" if mbit_s >= 1000 else f"{mbit_s} Mbit/s"
    title = f"Idle guest with 1 GiB of {data} data, {speed}, queue of {queue_ms} ms"
    guest = filled(1024, kind)
    with (
        shaped(mbit_s, queue_ms) as link,
        moves(title, guest, variants, goals or [], link=link, timeout_s=PATIENCE_S) as group,
    ):
        yield group
        group.note = f"The link (veth, tbf) dropped {link.dropped()} packets in all runs of this group together."
