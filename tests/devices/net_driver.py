"""The driver's side of a network device, on guest memory that no guest runs in, with a socket in the tap's place.

It keeps a ring's rules only as far as a test wants it to: addresses, lengths and flags are written as they are given.
"""

from __future__ import annotations

import socket
import struct
import time
from dataclasses import dataclass, field

from kvmigrate._core import ffi, lib
from kvmigrate.memory.region import GuestMemory

NEXT, WRITE, INDIRECT = 1, 2, 4
SIZE = 64
RX, TX, CTRL = range(3)
NO_HEADER = bytes(12)
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
        (index,) = struct.unpack("<H", self.memory.read(self.used + 2, 2))
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


def wait_for(condition: object, what: str) -> None:
    """Wait for what the device's thread is about to do."""
    end = time.monotonic() + WAIT_S
    while not condition():  # type: ignore[operator]
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
