"""The dirty log: which pages were written since they were last copied, by the guest or by the VMM."""

from __future__ import annotations

import errno
from enum import Enum

from .._core import lib
from ..errors import UnsupportedError, check
from .region import GuestMemory


class LogMode(Enum):
    """How KVM's log is fetched and cleared."""

    GET = 1
    """KVM_GET_DIRTY_LOG clears all of it when it is fetched."""
    CLEAR = 2
    """KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2: it is cleared piece by piece, each just before it is copied."""


class DirtyLog:
    """The log over ``memory``. Off until :meth:`start`; used by one thread at a time.

    Without a VM (:meth:`GuestMemory.attach` not called) it holds the VMM's own writes only.
    """

    def __init__(self, memory: GuestMemory, mode: LogMode) -> None:
        self._memory = memory
        self.mode = mode

    @property
    def active(self) -> bool:
        return not self._memory.closed and self._memory.handle.log_mode != lib.KMIG_LOG_OFF

    def start(self) -> None:
        """Log from now on. The first round takes every resident page; :meth:`sync` is for the rounds after it.

        Raises :class:`UnsupportedError` when the kernel has no manual clearing and the mode is CLEAR, else
        :class:`HostError` (EBUSY when it is on already).
        """
        rc = lib.kmig_dirty_start(self._memory.handle, _C_MODE[self.mode])
        if rc == -errno.EOPNOTSUPP:
            raise UnsupportedError("KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2", "use the log mode GET")
        check(rc, "starting the dirty log (KVM_SET_USER_MEMORY_REGION)")

    def stop(self) -> None:
        """Log no more and forget what was logged. Idempotent. Raises :class:`HostError`."""
        check(lib.kmig_dirty_stop(self._memory.handle), "stopping the dirty log (KVM_SET_USER_MEMORY_REGION)")

    def sync(self) -> int:
        """Make what was logged pending, with what is still pending from before; returns how many pages that is, or
        somewhat more: where nothing was in use before, the page map tells of whole huge pages.

        Raises :class:`HostError`.
        """
        return check(lib.kmig_dirty_sync(self._memory.handle), "KVM_GET_DIRTY_LOG")


_C_MODE = {LogMode.GET: lib.KMIG_LOG_GET, LogMode.CLEAR: lib.KMIG_LOG_CLEAR}
