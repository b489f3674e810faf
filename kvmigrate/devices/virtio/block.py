"""The virtio block device (virtio 1.2, 5.2): an image as a disk of 512-byte sectors."""

from __future__ import annotations

import errno
import os
import struct
import sys
from contextlib import suppress

from ..._core import ffi, lib
from ...errors import BadField
from ...memory.region import GuestMemory
from ...state.section import Fields, Value
from .image import SECTOR_BYTES, DiskImage
from .transport import VirtioDevice

DEVICE_ID = 2
F_SEG_MAX, F_RO, F_BLK_SIZE, F_FLUSH, F_DISCARD, F_WRITE_ZEROES = 1 << 2, 1 << 5, 1 << 6, 1 << 9, 1 << 13, 1 << 14
# struct virtio_blk_config (5.2.4): capacity, size_max, seg_max, geometry, blk_size, topology, writeback, unused,
# num_queues, then of discards and of writes of zeros: the most sectors, the most segments, and the alignment or whether
# space is given back.
_CONFIG = struct.Struct("<QII4xI8xBxHIIIIIB3x")
MAX_DISCARD_SECTORS, MAX_ZERO_SECTORS, MAX_SEGMENTS = 4194304, 32768, 16
"""As csrc/virtio_blk.c has them."""
ID_BYTES = 20


class VirtioBlock(VirtioDevice):
    """A disk called ``image.name``. The caller locks, unlocks and closes the image.

    A file can discard, on a disk that may be written. A block device cannot: whether it is offered would depend on what
    each host's device can do, and a guest must find the same after it moved.
    """

    device_id = DEVICE_ID

    def __init__(self, memory: GuestMemory, image: DiskImage) -> None:
        self.image = image
        self._can_discard = image.is_file and not image.read_only
        self._disk = ffi.new(
            "struct kmig_virtio_blk *",
            {
                "fd": image.fd,
                "read_only": image.read_only,
                "can_discard": self._can_discard,
                "nr_sectors": image.size_bytes // SECTOR_BYTES,
                "id": image.name.encode()[:ID_BYTES],
            },
        )
        self.told: set[int] = set()
        """The errors of the image that the host was told of."""
        super().__init__(f"disk-{image.name}", memory)

    @property
    def features(self) -> int:
        features = F_SEG_MAX | F_BLK_SIZE | F_FLUSH | (F_RO if self.image.read_only else 0)
        return features | (F_DISCARD | F_WRITE_ZEROES if self._can_discard else 0)

    def config(self) -> bytes:
        """``struct virtio_blk_config``."""
        return _CONFIG.pack(
            self._disk.nr_sectors,
            0,
            self.queue_max - 2,  # Beside the header and the status.
            SECTOR_BYTES,
            0,
            1,
            MAX_DISCARD_SECTORS,
            MAX_SEGMENTS,
            1,
            MAX_ZERO_SECTORS,
            MAX_SEGMENTS,
            1,
        )

    def serve(self) -> None:
        while lib.kmig_virtio_blk_serve(self.handle, self._disk) > 0:
            self._tell(self._disk.host_error)

    def _tell(self, error: int) -> None:
        """Say why the guest's requests fail: each reason once, or a guest could fill the host's log."""
        if error in self.told:
            return
        why = "is shorter than when the guest found it" if error == errno.ENODATA else os.strerror(error)
        what = f"disk {self.image.name}: {self.image.path}: {why}: the guest got an I/O error"
        # Nobody may be left to read it, which is no reason for the disk to stop.
        with suppress(OSError, ValueError):
            print(f"kvmigrate: {what}", file=sys.stderr, flush=True)
        self.told.add(error)

    @property
    def nr_requests(self) -> int:
        """How many requests were served."""
        return int(self._disk.nr_requests)

    def own_state(self) -> dict[str, Value]:
        return {"nr_sectors": int(self._disk.nr_sectors), "read_only": self.image.read_only}

    def check_own_state(self, fields: Fields) -> None:
        """The guest knows its disk's size: another image is not the disk it knows."""
        nr_sectors, read_only = fields.integer("nr_sectors"), fields.boolean("read_only")
        if (nr_sectors, read_only) != (self._disk.nr_sectors, self.image.read_only):
            theirs, ours = _describe(nr_sectors, read_only), _describe(self._disk.nr_sectors, self.image.read_only)
            raise BadField(f"{self.name}: the guest has {theirs}, {self.image.path} is {ours}: give it the same image")


def _describe(nr_sectors: int, read_only: bool) -> str:
    return f"{nr_sectors * SECTOR_BYTES} bytes{' read-only' if read_only else ''}"
