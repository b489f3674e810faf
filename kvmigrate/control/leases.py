"""Who on this host runs from which snapshot: the lock on the snapshot, and NAME.lease to say whose it is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..snapshot.lease import Lease, Taken, take_lease
from . import runtime


@contextmanager
def leased(directory: Path, claim: runtime.Claim) -> Iterator[None]:
    """Hold the snapshot ``directory`` for the VM of ``claim``. Raises :class:`Taken`, naming who holds it.

    NAME.lease is written first and then looked for under other names: where the file system has no locks, of two that
    come at once each sees the other's, and at most one goes on."""
    try:
        lease = take_lease(directory)
    except Taken as taken:
        raise Taken(directory, taken.key, _holder(taken.key, claim.name)) from None
    try:
        _record(lease, directory, claim)
        yield
    finally:
        claim.lease_path.unlink(missing_ok=True)
        lease.release()


def _record(lease: Lease, directory: Path, claim: runtime.Claim) -> None:
    claim.lease_path.write_text(lease.key + "\n")
    if not lease.locked and (holder := _holder(lease.key, claim.name)):
        raise Taken(directory, lease.key, holder)


def _holder(key: str, but: str) -> str:
    """The running VM that holds ``key``, in words; nothing when none of this user does."""
    for name in runtime.running_names():
        if name != but and runtime.lease_of(name) == key:
            return f"as VM {name} (process {runtime.owner_pid(name)})"
    return ""
