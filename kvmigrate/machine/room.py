"""Whether this host has the memory that a guest will need."""

from __future__ import annotations

import re
from pathlib import Path

from ..state.fidelity import Fidelity


def available_bytes() -> int:
    """What this host can give, its swap counted (MemAvailable, Documentation/filesystems/proc.rst)."""
    text = Path("/proc/meminfo").read_text()
    found = (re.search(rf"^{name}:\s+(\d+) kB$", text, re.MULTILINE) for name in ("MemAvailable", "SwapFree"))
    return sum(int(match[1]) << 10 for match in found if match)


def judge_room(fidelity: Fidelity, needed_bytes: int, touched_bytes: int) -> None:
    """Refuse ``memory`` when a guest with so much of it in use, of which ``touched_bytes`` are taken here for it
    already, has no room."""
    available = available_bytes() + touched_bytes
    if needed_bytes > available:
        why = "the guest's memory in use is more than what is free here, with the swap"
        fidelity.refused("memory", f"{needed_bytes >> 20} MiB", f"{available >> 20} MiB", why)
