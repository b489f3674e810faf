"""Pages that leave from where they lie, without a copy (``MSG_ZEROCOPY``): where it can be, and what came of it.

What that means for a guest that goes on writing, and why no round waits for the kernel's reports, stands in
csrc/zerocopy.c.
"""

from __future__ import annotations

import errno
import resource
from pathlib import Path

from .._core import lib
from ..config import MAX_MEMORY_BYTES, PAGE_BYTES, Address, MigrationParameters
from ..errors import ConfigError, UnsupportedError, check
from ..record import dataclass
from ..state.section import Value

CAP_IPC_LOCK = 14
"""Who has it may lock any amount of memory: capabilities(7)."""


@dataclass(frozen=True, slots=True)
class References:
    """The sends of a move: those that went by reference, those of them that the kernel copied all the same (as on a
    loopback or veth), and those that went as a copy because too many were under way or no more memory may be locked."""

    sends: int
    copied: int
    refused: int

    def to_value(self) -> dict[str, Value]:
        """For JSON."""
        return {"sends": self.sends, "copied": self.copied, "refused": self.refused}


def require_possible(address: Address, parameters: MigrationParameters) -> None:
    """Raise :class:`ConfigError` where that is asked for and no page could go by reference, before anything is sent."""
    if not parameters.zero_copy:
        return
    if address.path:
        raise ConfigError(f"{address}: a UNIX socket always copies: leave out --zerocopy, or go by tcp:")
    if parameters.compression.level is not None:
        what = f"pages that --compress {parameters.compression} has packed cannot go without a copy"
        raise ConfigError(f"{what}: leave out --zerocopy, or take --compress none or auto")
    connections = parameters.connections_for(MAX_MEMORY_BYTES // PAGE_BYTES)
    limit, needed = lockable_bytes(), connections * lib.KMIG_CHUNK_PAGES * PAGE_BYTES
    if limit is not None and limit < needed:
        what = f"--zerocopy locks at least {needed >> 10} KiB of memory at a time, of which this user may {limit >> 10}"
        raise ConfigError(f"{what}: raise `ulimit -l` for the VM's process, or leave out --zerocopy")


def enable(fd: int) -> None:
    """Let a socket send by reference. Raises :class:`UnsupportedError`."""
    rc = lib.kmig_zerocopy_enable(fd)
    if rc in (-errno.ENOPROTOOPT, -errno.EOPNOTSUPP):
        raise UnsupportedError("MSG_ZEROCOPY for this connection", "it needs Linux 4.14 and TCP: leave out --zerocopy")
    check(rc, "SO_ZEROCOPY")


def lockable_bytes() -> int | None:
    """How much memory this process may lock; None for any amount. The kernel counts what all processes of the user have
    locked, so that it may be less."""
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return None if soft == resource.RLIM_INFINITY or _may_lock_all() else soft


def _may_lock_all() -> bool:
    for line in Path("/proc/thread-self/status").read_text().splitlines():
        if line.startswith("CapEff:"):
            return bool(int(line.split()[1], 16) >> CAP_IPC_LOCK & 1)
    return False
