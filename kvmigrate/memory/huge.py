"""Huge pages of 2 MiB that a host has set aside: how many are left (Documentation/admin-guide/mm/hugetlbpage.rst)."""

from __future__ import annotations

from pathlib import Path

from ..errors import ConfigError

HUGE_BYTES = 2 << 20
POOL = Path("/sys/kernel/mm/hugepages/hugepages-2048kB")


def require(size_bytes: int, *, held_bytes: int = 0) -> None:
    """Raise :class:`ConfigError` unless this host can give ``size_bytes`` of huge pages, whole ones, of which
    ``held_bytes`` are in use for the guest already."""
    if size_bytes % HUGE_BYTES:
        raise ConfigError(f"{size_bytes} bytes of memory cannot be of huge pages: take a multiple of 2M")
    if why := _shortage(size_bytes, held_bytes):
        raise ConfigError(f"{size_bytes >> 20} MiB of guest memory: {why}")


def free_bytes() -> int:
    """What a new guest can have, with what the kernel may add to the pool (``nr_overcommit_hugepages``)."""
    free, promised = _count("free_hugepages"), _count("resv_hugepages")
    more = _count("nr_overcommit_hugepages") - _count("surplus_hugepages")
    return (max(free - promised, 0) + max(more, 0)) * HUGE_BYTES


def _shortage(size_bytes: int, held_bytes: int) -> str:
    """Why there are too few, and what to do; empty when there are enough."""
    if not POOL.is_dir():
        return "this host has no huge pages of 2 MiB: take another memory back-end"
    free = free_bytes() + held_bytes
    if size_bytes <= free:
        return ""
    wanted = _count("nr_hugepages") + (size_bytes - free) // HUGE_BYTES
    pages = f"{size_bytes // HUGE_BYTES} huge pages of 2 MiB are needed, {free // HUGE_BYTES} are free"
    return f"{pages}: sudo sysctl vm.nr_hugepages={wanted}"


def _count(name: str) -> int:
    try:
        return int((POOL / name).read_text())
    except OSError:
        return 0
