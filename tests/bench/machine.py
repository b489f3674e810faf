"""The facts of the machine on which the figures were made."""

from __future__ import annotations

import os
import platform
import re
from importlib.metadata import version
from pathlib import Path

from .qemu import CPU, qemu_version


def facts() -> dict[str, str]:
    """What a reader must know of the machine to judge the figures."""
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    huge = Path("/sys/kernel/mm/transparent_hugepage")
    return {
        "kvmigrate": version("kvmigrate"),
        "QEMU": f"{qemu_version()}, `-accel kvm -cpu {CPU}`",
        "kernel": f"{platform.release()}, {', '.join(sorted(one.name for one in Path('/sys/module').glob('kvm*')))}",
        "processors": f"{os.cpu_count()} × {cpu[1] if cpu else 'unknown'}",
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') >> 20} MiB",
        "huge pages": f"anonymous {_chosen(huge / 'enabled')}, shared {_chosen(huge / 'shmem_enabled')}",
    }


def _chosen(path: Path) -> str:
    match = re.search(r"\[(\w+)\]", path.read_text()) if path.exists() else None
    return match[1] if match else "unknown"


def load() -> str:
    """The load now, which a quiet machine has near nothing of."""
    return " ".join(f"{one:.2f}" for one in os.getloadavg())
