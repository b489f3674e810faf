"""Memory that is there: so that a run is not about where the host's memory comes from.

In a virtual machine with free page reporting, memory that was free for two seconds goes back to the hypervisor, and
touching it again takes ten times as long as touching what was freed just now. Which of both a run meets is chance.
"""

from __future__ import annotations

import mmap

MADV_POPULATE_WRITE = 23
"""Not in Python's mmap; Linux 5.14."""


def warm(mib: int) -> None:
    """Touch so much memory and free it again. Raises OSError."""
    if mib:
        with mmap.mmap(-1, mib << 20) as memory:
            memory.madvise(mmap.MADV_HUGEPAGE)
            memory.madvise(MADV_POPULATE_WRITE)
