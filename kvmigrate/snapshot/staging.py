"""A directory that appears whole or not at all.

Everything is written into ``NAME.tmp-XXXXXXXX`` beside the target, flushed, and then renamed: the name never points at
half a snapshot. What a killed process left behind is removed by the next snapshot to the same name.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
from pathlib import Path
from types import TracebackType

from ..errors import HostError, SnapshotError
from .format import FILES

_MENDS = {
    errno.ENOSPC: "free some space there, or choose another place",
    errno.EDQUOT: "free some of your quota there, or choose another place",
    errno.EFBIG: "neither the file system nor `ulimit -f` may limit files below the size of guest RAM",
    errno.EROFS: "it is mounted read-only: choose another place",
    errno.EACCES: "choose a place that you may write to",
    errno.EPERM: "choose a place that you may write to",
    errno.ENOENT: "create the directory above it first",
    errno.ENOTDIR: "something above it is not a directory: choose another place",
    errno.EIO: "the disk failed: choose another place",
}


def cannot_write(path: Path, error: OSError | HostError) -> SnapshotError:
    """The error for a ``path`` that could not be written, with what to do about it."""
    number = error.errno or errno.EIO
    mend = _MENDS.get(number, "choose another place")
    return SnapshotError(f"cannot write {path}: {os.strerror(number)}: {mend}; the guest goes on as before")


def _taken(target: Path) -> SnapshotError:
    return SnapshotError(f"{target} exists: remove it or choose another name")


class Staging:
    """The directory in the making. A context: what was not published when it ends is removed."""

    def __init__(self, target: Path) -> None:
        """Make the directory beside ``target``. Raises :class:`SnapshotError` when it cannot be, or is there."""
        self.target = target.absolute()
        if os.path.lexists(self.target):
            raise _taken(target)
        self._files: dict[str, int] = {}
        self._published = False
        self._name = f"{self.target.name}.tmp-{secrets.token_hex(4)}"
        try:
            self._parent_fd = os.open(self.target.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise cannot_write(self.target, error) from error
        try:
            _remove_stale(self._parent_fd, self.target.name)
            self._fd = _make_locked(self._parent_fd, self._name)
        except OSError as error:
            os.close(self._parent_fd)
            raise cannot_write(self.target, error) from error

    def __enter__(self) -> Staging:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        try:
            if not self._published:
                _remove(self._parent_fd, self._name, self._fd)
        except OSError as failed:
            left = self.target.parent / self._name
            raise SnapshotError(f"{error}; and {left} could not be removed: remove it by hand") from failed
        finally:
            for fd in (*self._files.values(), self._fd, self._parent_fd):
                os.close(fd)

    def path(self, name: str) -> Path:
        """What an error should call the file ``name``: its place in the target."""
        return self.target / name

    def create(self, name: str) -> int:
        """A new empty file ``name``; returns its descriptor, which the staging closes."""
        try:
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            self._files[name] = os.open(name, flags, 0o600, dir_fd=self._fd)
        except OSError as error:
            raise cannot_write(self.path(name), error) from error
        return self._files[name]

    def fd(self, name: str) -> int:
        """The descriptor of a file that :meth:`create` made."""
        return self._files[name]

    def publish(self) -> None:
        """Flush every file and the directory, rename it to the target, and flush the directory above.

        Raises :class:`SnapshotError`; the target does not exist then.
        """
        for name, fd in self._files.items():
            self._sync(fd, self.path(name))
        self._sync(self._fd, self.target)
        if os.path.lexists(self.target):
            raise _taken(self.target)
        try:
            # Without RENAME_NOREPLACE an empty directory that appeared meanwhile would be replaced, which harms nobody;
            # anything else makes the rename fail.
            self._rename(self._name, self.target.name)
            # The rename itself is only on disk when the directory above is.
            os.fsync(self._parent_fd)
        except OSError as error:
            self._take_back()
            raise cannot_write(self.target, error) from error
        self._published = True

    def _rename(self, old: str, new: str) -> None:
        os.rename(old, new, src_dir_fd=self._parent_fd, dst_dir_fd=self._parent_fd)

    def _take_back(self) -> None:
        """After a failed rename, or one that may not be durable: the target is no snapshot then."""
        try:
            at_target = os.stat(self.target.name, dir_fd=self._parent_fd, follow_symlinks=False)
            if os.path.samestat(at_target, os.fstat(self._fd)):
                self._rename(self.target.name, self._name)
        except FileNotFoundError:
            pass

    def _sync(self, fd: int, path: Path) -> None:
        try:
            os.fsync(fd)
        except OSError as error:
            raise cannot_write(path, error) from error


def _make_locked(parent_fd: int, name: str) -> int:
    """Make the directory ``name``, open and lock it."""
    os.mkdir(name, 0o700, dir_fd=parent_fd)
    try:
        return _open_locked(parent_fd, name)
    except OSError:
        os.rmdir(name, dir_fd=parent_fd)
        raise


def _open_locked(parent_fd: int, name: str) -> int:
    """Open the directory ``name`` and lock it: a lock that is held says that its writer lives."""
    fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent_fd)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(fd)
        raise
    return fd


def _remove(parent_fd: int, name: str, fd: int) -> None:
    """Remove the staging directory ``name`` (open as ``fd``) and the files that a snapshot has, no others."""
    for file in FILES:
        try:
            os.unlink(file, dir_fd=fd)
        except FileNotFoundError:
            pass
    os.rmdir(name, dir_fd=parent_fd)


def _remove_stale(parent_fd: int, target_name: str) -> None:
    """Remove what dead processes left of snapshots to ``target_name``. One that cannot be removed is left alone."""
    prefix = f"{target_name}.tmp-"
    for name in os.listdir(parent_fd):
        if not name.startswith(prefix) or len(name) != len(prefix) + 8:
            continue
        try:
            fd = _open_locked(parent_fd, name)
        except OSError:
            continue
        try:
            _remove(parent_fd, name, fd)
        except OSError:
            pass
        finally:
            os.close(fd)
