"""A writer of initramfs archives (cpio "newc", see the kernel's Documentation/driver-api/early-userspace)."""

from __future__ import annotations

import stat
from pathlib import Path, PurePosixPath
from typing import BinaryIO


class Archive:
    """Files by their absolute path inside; parents are made when needed, and what comes twice is taken once."""

    def __init__(self, out: BinaryIO) -> None:
        self._out = out
        self._names: set[str] = set()

    def add(self, path: Path, name: str | None = None) -> None:
        """The file, link or directory ``path``, under ``name`` or under its own path."""
        inside = name or str(path)
        status = path.lstat()
        if stat.S_ISLNK(status.st_mode):
            self._entry(inside, status.st_mode, str(path.readlink()).encode(), int(status.st_mtime))
        elif stat.S_ISDIR(status.st_mode):
            self._entry(inside, status.st_mode, b"", int(status.st_mtime))
        else:
            self._entry(inside, status.st_mode, path.read_bytes(), int(status.st_mtime))

    def add_resolved(self, path: Path) -> None:
        """``path`` and every link on the way to the file that it names, so that the path works inside too."""
        for parent in reversed(path.parents):
            if parent.is_symlink():
                self.add(parent)
        if any(parent.is_symlink() for parent in path.parents):
            self.add_resolved(path.parent.resolve() / path.name)
            return
        self.add(path)
        if path.is_symlink():
            self.add_resolved(path.parent / path.readlink())

    def add_bytes(self, name: str, content: bytes, mode: int = 0o644) -> None:
        """A regular file with ``content``."""
        self._entry(name, stat.S_IFREG | mode, content, 0)

    def add_directory(self, name: str) -> None:
        self._entry(name, stat.S_IFDIR | 0o755, b"", 0)

    def add_link(self, name: str, target: str) -> None:
        self._entry(name, stat.S_IFLNK | 0o777, target.encode(), 0)

    def close(self) -> None:
        """Write the end mark. The file stays open."""
        self._write("TRAILER!!!", 0, b"", 0)

    def _entry(self, name: str, mode: int, content: bytes, mtime: int) -> None:
        inside = str(PurePosixPath(name)).lstrip("/")
        if inside in self._names or not inside:
            return
        parent = str(PurePosixPath(inside).parent)
        if parent not in (".", *self._names):
            self.add_directory(parent)
        self._names.add(inside)
        self._write(inside, mode, content, mtime)

    def _write(self, name: str, mode: int, content: bytes, mtime: int) -> None:
        numbers = (len(self._names), mode, 0, 0, 1, mtime, len(content), 0, 0, 0, 0, len(name.encode()) + 1, 0)
        header = b"070701" + b"".join(b"%08x" % number for number in numbers) + name.encode() + b"\0"
        for part in (header, content):
            self._out.write(part + b"\0" * (-len(part) % 4))
