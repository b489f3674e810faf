"""A balloon (virtio 1.2, 5.5), with free page reporting (5.5.6.7): memory that the guest does without goes back to the
host, and a migration or a snapshot neither keeps nor sends it. The pages go by a thread in C (csrc/virtio_balloon.c).
"""

from __future__ import annotations

import struct

from ..._core import ffi, lib
from ...config import PAGE_BYTES
from ...memory.region import GuestMemory
from ...state.section import Fields, Value
from . import registers as reg
from .transport import VirtioDevice

# 5.5.3. Reporting without PAGE_POISON: a driver that wants its free pages to keep a pattern then does not report.
F_DEFLATE_ON_OOM, F_PAGE_REPORTING = 1 << 2, 1 << 5
_CONFIG = struct.Struct("<II")
_ACTUAL = reg.CONFIG + 4


class VirtioBalloon(VirtioDevice):
    """``target_pages`` is how many pages of 4096 bytes the driver should give up, ``actual_pages`` how many it says it
    has."""

    device_id = 5
    # Queues that do not exist are not counted: without those for statistics and hints, that for reports is the third.
    nr_queues: int = lib.KMIG_BALLOON_NR_QUEUES

    def __init__(self, memory: GuestMemory) -> None:
        self._max_pages = memory.size_bytes // PAGE_BYTES
        self.target_pages = self.actual_pages = 0
        self._balloon = ffi.new("struct kmig_virtio_balloon *")
        super().__init__("balloon", memory)

    @property
    def features(self) -> int:
        return F_DEFLATE_ON_OOM | F_PAGE_REPORTING

    def config(self) -> bytes:
        """``num_pages`` and ``actual``."""
        return _CONFIG.pack(self.target_pages, self.actual_pages)

    def serve(self) -> None:
        """See :meth:`VirtioDevice.serve`."""
        lib.kmig_virtio_balloon_serve(self.handle, self._balloon)

    @property
    def has_driver(self) -> bool:
        """Whether a driver has set the device up, and drives it as it should."""
        return bool(self._status & reg.DRIVER_OK) and not self.handle.broken

    def set_target(self, pages: int) -> None:
        """Ask the driver to give up so many pages in all, at most what the guest has."""
        with self._lock:
            self.target_pages = min(max(pages, 0), self._max_pages)
            self.config_changed()

    def write(self, offset: int, size: int, value: int) -> None:
        """As any device; and the driver tells how far it is."""
        if (offset, size) == (_ACTUAL, 4):
            with self._lock:
                self.actual_pages = value
        else:
            super().write(offset, size, value)

    def reset(self) -> None:
        """The target is the host's wish, and stays."""
        super().reset()
        self.actual_pages = 0

    def statistics(self) -> dict[str, int]:
        """Pages since the device was made: ``inflated`` and ``reported`` free; the same page counts each time."""
        return {"inflated": int(self._balloon.nr_inflated), "reported": int(self._balloon.nr_reported)}

    def own_state(self) -> dict[str, Value]:
        """Both numbers of the configuration."""
        return {"target_pages": self.target_pages, "actual_pages": self.actual_pages}

    def check_own_state(self, fields: Fields) -> None:
        """Raises ``BadField``."""
        fields.integer("target_pages", 0, self._max_pages)
        fields.integer("actual_pages", 0, 0xFFFFFFFF)

    def load(self, body: Value) -> None:
        """See :meth:`Device.load`."""
        super().load(body)
        self.target_pages, self.actual_pages = body["target_pages"], body["actual_pages"]
