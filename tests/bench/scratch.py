"""Places for files that are gone afterwards."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

TMPFS = Path("/dev/shm")


@contextmanager
def scratch(parent: Path | None = None) -> Iterator[Path]:
    """A directory with a short path (UNIX sockets want that)."""
    directory = Path(tempfile.mkdtemp(prefix="kvmigrate-bench-", dir=parent))
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def allocated_mib(path: Path) -> float:
    """What a file, or all files of a directory, take of the file system."""
    files = [path] if path.is_file() else [one for one in path.rglob("*") if one.is_file()]
    return sum(one.stat().st_blocks * 512 for one in files) / (1 << 20)
