"""How large the guests are: as the goals say, or a sixteenth of that to try the bench itself."""

from __future__ import annotations

from kvmigrate import guests

from .vm import Guest

RESERVE_MIB = 32
"""What the guest and its page tables need of RAM."""
SMALL = 16
INCOMPRESSIBLE, TEXT, HALF_ZERO = range(3)
"""Kinds of data that the guests know."""

_divisor = 1


def make_small() -> None:
    """Divide all sizes from now on: the figures then say nothing."""
    global _divisor  # noqa: PLW0603
    _divisor = SMALL


def scaled(mib: int) -> int:
    """So many MiB, or a part of them."""
    return mib // _divisor


def filled(data_mib: int, kind: int = INCOMPRESSIBLE) -> Guest:
    """A sleeping guest whose RAM is that size, nearly all of it written, and one heartbeat per millisecond."""
    memory = max(scaled(data_mib), 2 * RESERVE_MIB)
    data = memory - RESERVE_MIB
    return Guest(guests.path("idle"), memory, f"fill={data} kind={kind} beat=1", data)


def writing(hot_mib: int, speed: int) -> Guest:
    """1 GiB of incompressible data, of which ``hot_mib`` are rewritten at ``speed`` MiB/s, 0 for full speed."""
    memory, hot = scaled(1024), scaled(hot_mib)
    fill = memory - RESERVE_MIB - hot
    return Guest(guests.path("writer"), memory, f"fill={fill} hot={hot} speed={speed} beat=1", fill + hot)


def untouched(memory_mib: int) -> Guest:
    """The sleeping guest, which has written next to nothing."""
    return Guest(guests.path("idle"), scaled(memory_mib), "beat=1")
