"""The driver's side of a device with several queues: a network card with a socket in the tap's place, a balloon.

It keeps a ring's rules only as far as a test wants it to: addresses, lengths and flags are written as they are given.
"""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from kvmigrate.devices.virtio import registers as reg
from kvmigrate.devices.virtio.net import FEATURES, Net
from kvmigrate.devices.virtio.transport import VirtioDevice
from kvmigrate.memory.region import GuestMemory

NEXT, WRITE, INDIRECT = 1, 2, 4
SIZE = 64
RING_BYTES = 0x3000
RX, TX, CTRL = range(3)
NO_HEADER = bytes(12)
MAC = bytes.fromhex("525400123456")
BUFFERS = 0x100000
BUFFER_BYTES = 2048
MEMORY_BYTES = 8 << 20
WAIT_S = 10.0


@dataclass
class Ring:
    """One queue: descriptors that are handed out in turn, and how far both rings were filled and read."""

    memory: GuestMemory
    base: int
    size: int = SIZE
    next_desc: int = 0
    avail_idx: int = 0
    used_seen: int = 0
    desc: int = field(init=False)
    avail: int = field(init=False)
    used: int = field(init=False)

    def __post_init__(self) -> None:
        self.desc, self.avail, self.used = self.base, self.base + 0x1000, self.base + 0x2000

    def put(self, *buffers: tuple[int, int, int]) -> int:
        """Make a chain of (gpa, size, flags) available; its head."""
        head = self.next_desc
        for at, (gpa, size_bytes, flags) in enumerate(buffers):
            more = NEXT if at + 1 < len(buffers) else 0
            self.describe(self.next_desc, gpa, size_bytes, flags | more, (self.next_desc + 1) % self.size)
            self.next_desc = (self.next_desc + 1) % self.size
        self.offer(head)
        return head

    def describe(self, index: int, gpa: int, size_bytes: int, flags: int, following: int) -> None:
        self.memory.write(self.desc + 16 * index, struct.pack("<QIHH", gpa, size_bytes, flags, following))

    def offer(self, head: int) -> None:
        self.memory.write(self.avail + 4 + 2 * (self.avail_idx % self.size), struct.pack("<H", head))
        self.avail_idx += 1
        self.memory.write(self.avail + 2, struct.pack("<H", self.avail_idx & 0xFFFF))

    def nr_used(self) -> int:
        """How many buffers came back that :meth:`take_used` has not given yet."""
        index = int.from_bytes(self.memory.read(self.used + 2, 2), "little")
        return (index - self.used_seen) & 0xFFFF

    def wait_used(self, nr: int = 1) -> list[tuple[int, int]]:
        """The next ``nr`` entries of the used ring: (head, bytes written)."""
        wait_for(lambda: self.nr_used() >= nr, f"{nr} used buffers")
        found = []
        for _ in range(nr):
            at = self.used + 4 + 8 * (self.used_seen % self.size)
            found.append(struct.unpack("<II", self.memory.read(at, 8)))
            self.used_seen += 1
        return found


class QueuesDriver:
    """Drives ``device``, which is closed with it, with all its queues."""

    def __init__(self, memory: GuestMemory, device: VirtioDevice, features: int) -> None:
        self.memory, self.device = memory, device
        self.features = features | reg.F_VERSION_1
        self.rings = [Ring(memory, 0x10000 * (at + 1)) for at in range(device.nr_queues)]
        self.next_buffer = BUFFERS

    def set_up(self) -> None:
        """What a driver does when it finds a device (3.1.1)."""
        self.set(reg.STATUS, reg.ACKNOWLEDGE | reg.DRIVER)
        for word in range(2):
            self.set(reg.DRIVER_FEATURES_SEL, word)
            self.set(reg.DRIVER_FEATURES, self.features >> 32 * word & 0xFFFFFFFF)
        self.set(reg.STATUS, reg.ACKNOWLEDGE | reg.DRIVER | reg.FEATURES_OK)
        for at, ring in enumerate(self.rings):
            self.set(reg.QUEUE_SEL, at)
            self.set(reg.QUEUE_NUM, ring.size)
            for offset, (part, shift) in reg.QUEUE_ADDRESSES.items():
                self.set(offset, getattr(ring, part) >> shift & 0xFFFFFFFF)
            self.set(reg.QUEUE_READY, 1)
        self.set(reg.STATUS, reg.ACKNOWLEDGE | reg.DRIVER | reg.FEATURES_OK | reg.DRIVER_OK)
        self.device.resume()

    def set_up_anew(self) -> None:
        """What a driver does that comes after a reset, with rings in which nothing is left."""
        for ring in self.rings:
            self.memory.write(ring.base, bytes(RING_BYTES))
            ring.next_desc = ring.avail_idx = ring.used_seen = 0
        self.set_up()

    def set(self, offset: int, value: int) -> None:
        self.device.write(offset, 4, value)

    def get(self, offset: int) -> int:
        return self.device.read(offset, 4)

    def kick(self, queue: int) -> None:
        self.set(reg.QUEUE_NOTIFY, queue)

    def broken(self) -> bool:
        return bool(self.get(reg.STATUS) & reg.NEEDS_RESET)

    def buffer(self, size_bytes: int = BUFFER_BYTES) -> int:
        """Guest memory that no other buffer lies in, on pages of its own."""
        gpa = self.next_buffer
        self.next_buffer += (size_bytes + 4095) // 4096 * 4096
        return gpa


class Driver(QueuesDriver):
    """Drives a network card before the tap ``fd``."""

    def __init__(self, memory: GuestMemory, fd: int, features: int = FEATURES) -> None:
        self.net = Net("net-lan", memory, os.dup(fd), MAC)
        super().__init__(memory, self.net, features)

    def status(self) -> int:
        """Of the card, as its configuration space has it."""
        return self.net.read(reg.CONFIG + 6, 2)

    def send(self, *frames: bytes) -> None:
        """Queue frames, header and all, in one buffer each, then kick once."""
        for frame in frames:
            gpa = self.buffer(len(frame))
            self.memory.write(gpa, frame)
            self.rings[TX].put((gpa, len(frame), 0))
        self.kick(TX)

    def offer(self, nr: int, size_bytes: int = BUFFER_BYTES) -> list[int]:
        """Give the device ``nr`` buffers to receive into; where they are, in their order."""
        found = [self.buffer(size_bytes) for _ in range(nr)]
        for gpa in found:
            self.rings[RX].put((gpa, size_bytes, WRITE))
        self.kick(RX)
        return found


def wait_for(condition: Callable[[], bool], what: str) -> None:
    """Wait for what the device's thread is about to do."""
    end = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end, f"never: {what}"
        time.sleep(0.001)


def is_dirty(memory: GuestMemory, gpa: int) -> bool:
    """Whether the VMM has marked the page at ``gpa``."""
    gfn = gpa // 4096
    return bool(memory.handle.slot[0].host_dirty[gfn // 64] >> gfn % 64 & 1)


def clean(memory: GuestMemory) -> None:
    """Take all marks away."""
    for word in range(memory.slots[0].nr_pages // 64):
        memory.handle.slot[0].host_dirty[word] = 0


def packets() -> tuple[socket.socket, socket.socket]:
    """Two ends that keep packets apart, as a tap does: the device's, and the network's."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setblocking(False)
    theirs.settimeout(WAIT_S)
    return ours, theirs
