"""A virtio driver of a few lines: registers through the transport, rings written as a guest's CPU would.

It writes guest memory behind the VMM's back, so that nothing it does marks a page dirty.
"""

from __future__ import annotations

import os
import select
import struct
from collections.abc import Sequence
from typing import Any

from kvmigrate._core import ffi
from kvmigrate.config import PAGE_BYTES
from kvmigrate.devices.virtio import registers as reg
from kvmigrate.devices.virtio.transport import VirtioDevice
from kvmigrate.memory.dirty import DirtyLog, LogMode
from kvmigrate.memory.region import GuestMemory

from ..conftest import wait_until

DESC_GPA, AVAIL_GPA, USED_GPA, TABLE_GPA, DATA_GPA = 0x10000, 0x11000, 0x12000, 0x13000, 0x20000
NEXT, WRITE, INDIRECT = 1, 2, 4
WAIT_S = 10.0
Buffer = tuple[int, int, int]
"""gpa, length, flags (WRITE or 0)."""
Pages = set[int]
"""Page frames. Inside of the driver ``set`` writes a register."""


def guest_bytes(memory: GuestMemory, gpa: int, size: int) -> Any:
    """Guest memory as a guest sees it: a view to read and to write."""
    for at, slot in enumerate(memory.slots):
        offset = gpa - slot.base_gfn * PAGE_BYTES
        if 0 <= offset < slot.nr_pages * PAGE_BYTES:
            return ffi.buffer(memory.handle.slot[at].hva + offset, size)
    raise AssertionError(f"{gpa:#x} is not RAM")


def dirty_pages(memory: GuestMemory) -> Pages:
    """The page frames that a sync finds written by the VMM since the last one."""
    found: Pages = set()
    for at, slot in enumerate(memory.slots):
        pending = memory.handle.slot[at].pending
        found |= {slot.base_gfn + n for n in range(slot.nr_pages) if pending[n // 64] >> n % 64 & 1}
        for word in range((slot.nr_pages + 63) // 64):
            pending[word] = 0
    return found


class Driver:
    """Drives queue 0 of ``device``; ``size`` entries."""

    def __init__(self, memory: GuestMemory, device: VirtioDevice, size: int = 16) -> None:
        self.memory, self.device, self.size = memory, device, size
        self.log = DirtyLog(memory, LogMode.GET)
        self.avail_idx = self.used_seen = self.next_desc = 0

    def start(self, features: int = reg.F_VERSION_1) -> Driver:
        """Negotiate, set the queue up, DRIVER_OK, and let the device run."""
        self.negotiate(features)
        self.set_up_queue()
        self.set(reg.STATUS, 15)
        self.device.resume()
        return self

    def get(self, offset: int) -> int:
        return self.device.read(offset, 4)

    def set(self, offset: int, value: int) -> None:
        self.device.write(offset, 4, value)

    def negotiate(self, features: int) -> None:
        self.set(reg.STATUS, 3)
        for half in (0, 1):
            self.set(reg.DRIVER_FEATURES_SEL, half)
            self.set(reg.DRIVER_FEATURES, features >> 32 * half & 0xFFFFFFFF)
        self.set(reg.STATUS, 11)

    def set_up_queue(self, desc: int = DESC_GPA, avail: int = AVAIL_GPA, used: int = USED_GPA) -> None:
        self.set(reg.QUEUE_SEL, 0)
        self.set(reg.QUEUE_NUM, self.size)
        for first, gpa in ((0x80, desc), (0x90, avail), (0xA0, used)):
            self.set(first, gpa & 0xFFFFFFFF)
            self.set(first + 4, gpa >> 32)
        self.set(reg.QUEUE_READY, 1)

    def put(self, gpa: int, data: bytes) -> None:
        guest_bytes(self.memory, gpa, len(data))[:] = data

    def take(self, gpa: int, size: int) -> bytes:
        return bytes(guest_bytes(self.memory, gpa, size))

    def write_desc(self, table: int, at: int, buffer: Buffer, next_at: int | None) -> None:
        gpa, length, flags = buffer
        link = NEXT if next_at is not None else 0
        self.put(table + 16 * at, struct.pack("<QIHH", gpa, length, flags | link, next_at or 0))

    def write_chain(self, buffers: Sequence[Buffer], table: int = DESC_GPA, first: int = 0) -> int:
        """Descriptors for ``buffers`` from ``first`` on; returns the head."""
        for at, buffer in enumerate(buffers):
            last = at == len(buffers) - 1
            self.write_desc(table, first + at, buffer, None if last else first + at + 1)
        return first

    def expose(self, head: int) -> None:
        """Put ``head`` into the available ring, without a kick."""
        self.put(AVAIL_GPA + 4 + 2 * (self.avail_idx % self.size), struct.pack("<H", head))
        self.avail_idx = self.avail_idx + 1 & 0xFFFF
        self.put(AVAIL_GPA + 2, struct.pack("<H", self.avail_idx))

    def kick(self) -> None:
        self.set(reg.QUEUE_NOTIFY, 0)

    def send(self, buffers: Sequence[Buffer], *, indirect: bool = False) -> int:
        """Expose one request and kick; returns its head."""
        if indirect:
            self.write_chain(buffers, TABLE_GPA)
            head = self.write_chain([(TABLE_GPA, 16 * len(buffers), INDIRECT)])
        else:
            head = self.write_chain(buffers)
        self.expose(head)
        self.kick()
        return head

    @property
    def used_idx(self) -> int:
        return int.from_bytes(self.take(USED_GPA + 2, 2), "little")

    def interrupted(self, timeout_s: float = WAIT_S) -> bool:
        """Wait for an interrupt and take it off its eventfd."""
        fd = self.device.handle.irq_fd
        if not select.select([fd], [], [], timeout_s)[0]:
            return False
        os.read(fd, 8)
        return True

    def wait_used(self) -> tuple[int, int]:
        """The id and the length of the next used element, once it is there."""
        wait_until(lambda: self.used_idx != self.used_seen, "the device uses the buffer")
        at = USED_GPA + 4 + 8 * (self.used_seen % self.size)
        self.used_seen = self.used_seen + 1 & 0xFFFF
        found = struct.unpack("<II", self.take(at, 8))
        return found[0], found[1]

    def synced(self) -> Pages:
        """Sync the dirty log; the pages that it found."""
        self.log.sync()
        return dirty_pages(self.memory)


def block_header(kind: int, sector: int) -> bytes:
    return struct.pack("<IIQ", kind, 0, sector)
