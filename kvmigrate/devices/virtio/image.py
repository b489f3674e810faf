"""The image behind a block device: a raw file or a block device of the host, and the lock that keeps other VMs away.

The lock is apart from the file being open, since it changes hands while both ends of a migration have the file open. It
is an open-file-description lock (fcntl(2)), which ends with this process however that ends, and works over NFS.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
from pathlib import Path

from ...errors import ConfigError, HostError

SECTOR_BYTES = 512


class DiskImage:
    """An open image, not locked yet. Made by :func:`open_disk`."""

    def __init__(self, name: str, path: Path, read_only: bool, fd: int) -> None:
        self.name = name
        self.path = path
        self.read_only = read_only
        self.fd = fd
        self.is_file = stat.S_ISREG(os.fstat(fd).st_mode)
        self.size_bytes = os.lseek(fd, 0, os.SEEK_END)

    def lock(self) -> None:
        """Take the image for this VM: alone, or beside other readers when it is read-only. Idempotent.

        Raises :class:`ConfigError` when another VM has it.
        """
        try:
            self._set_lock(fcntl.F_RDLCK if self.read_only else fcntl.F_WRLCK)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise HostError(f"disk {self.name}: locking {self.path}", error.errno or 0) from error
            what = f"disk {self.name}: {self.path} is in use by another VM"
            raise ConfigError(f"{what}: stop that one, or open the disk with ,ro in both") from error
        # What this host has cached of a block device may be older than what another one has written since.
        os.posix_fadvise(self.fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def flush(self) -> None:
        """Bring what was written to the storage, where other hosts see it. Raises :class:`HostError`."""
        if self.read_only or self.fd < 0:
            return
        try:
            os.fdatasync(self.fd)
        except OSError as error:
            raise HostError(f"disk {self.name}: writing {self.path} back", error.errno or 0) from error

    def unlock(self) -> None:
        """Let another VM take it; nothing may be written from now on. Idempotent. Raises :class:`HostError`, with the
        lock still held, when the storage did not take all that was written."""
        if self.fd >= 0:
            # Before the lock goes: only what lies on the storage is seen by the host that takes it over.
            self.flush()
            self._set_lock(fcntl.F_UNLCK)

    def _set_lock(self, kind: int) -> None:
        # struct flock: type, whence, start, length (0 is to the end, however far that moves), pid (0 for this kind).
        fcntl.fcntl(self.fd, fcntl.F_OFD_SETLK, struct.pack("hhqqi4x", kind, os.SEEK_SET, 0, 0, 0))

    def close(self) -> None:
        """Idempotent; gives the lock back too."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def open_disk(name: str, path: Path, read_only: bool = False) -> DiskImage:
    """Open the image ``path`` for the disk ``name``. Raises :class:`HostError` or :class:`ConfigError`, naming both."""
    try:
        # Not blocking: the path may be a pipe, which nobody writes.
        fd = os.open(path, (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        hint = "open it read-only with ,ro" if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM) else ""
        raise HostError(f"disk {name}: {path}", error.errno or 0, hint) from error
    try:
        mode = os.fstat(fd).st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISBLK(mode):
            raise ConfigError(f"disk {name}: {path} is neither a file nor a block device")
        image = DiskImage(name, path, read_only, fd)
        if not image.size_bytes or image.size_bytes % SECTOR_BYTES:
            raise ConfigError(
                f"disk {name}: {path} has {image.size_bytes} bytes: a raw image has a multiple of {SECTOR_BYTES}, not 0"
            )
    except BaseException:
        os.close(fd)
        raise
    return image
