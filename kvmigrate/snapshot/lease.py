"""The lock that a guest holds on the snapshot it was restored from, for as long as its process lives.

It lies on the snapshot's own file ``state`` and not beside it or in a runtime directory: on shared storage it is then
seen by every host that mounts it (NFS and the cluster file systems carry flock(2) over), and nothing is written into a
directory that is never written again. The kernel drops it with the process, however that ends.
"""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

from ..errors import SnapshotError
from .format import STATE_FILE

_READ_ONLY = frozenset({errno.EROFS, errno.EACCES, errno.EPERM})
# EBADF: a lock that excludes others needs a writable descriptor on NFS (flock(2)), which read-only media do not give.
_NO_LOCKS = frozenset({errno.EBADF, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL})


class Lease:
    """``key`` names the snapshot on this host; ``locked`` is False where the file system has no locks."""

    def __init__(self, fd: int, locked: bool) -> None:
        found = os.fstat(fd)
        self.key = f"{found.st_dev}:{found.st_ino}"
        self.locked = locked
        self._fd = fd

    def release(self) -> None:
        """Give the snapshot back. Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class Taken(SnapshotError):
    """Somebody holds the snapshot that has this ``key``."""

    def __init__(self, directory: Path, key: str, holder: str = "") -> None:
        self.key = key
        who = holder or "by a process of another host or user"
        super().__init__(f"{directory} is restored already {who}: end it, or restore with --clone")


def take_lease(directory: Path) -> Lease:
    """Hold the snapshot ``directory``. Raises :class:`Taken`, or :class:`SnapshotError` for what is no snapshot."""
    fd = _open(directory / STATE_FILE)
    try:
        return Lease(fd, _lock(fd))
    except BlockingIOError:
        key = Lease(fd, False).key
        os.close(fd)
        raise Taken(directory, key) from None
    except OSError as error:
        os.close(fd)
        raise SnapshotError(f"cannot lock {directory / STATE_FILE}: {error.strerror}: copy it elsewhere") from error


def _lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return False
    return True


def _open(path: Path) -> int:
    """Writable where that is allowed, as NFS needs it; nothing is ever written by it."""
    # O_NONBLOCK: opening a FIFO that somebody put there must not block. What is there is checked by who reads it.
    flags = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        try:
            return os.open(path, os.O_RDWR | flags)
        except OSError as error:
            if error.errno not in _READ_ONLY:
                raise
            return os.open(path, os.O_RDONLY | flags)
    except OSError as error:
        raise SnapshotError(f"cannot read {path}: {error.strerror}: is it a whole snapshot?") from error
