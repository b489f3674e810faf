"""The layout of a snapshot directory, and the index of its memory.

::

    DIR/state           frames (see state/frame.py): HELLO CONFIG SECTION… MEMORY_INDEX… END
    DIR/memory.raw      guest RAM, sparse: the slots one after the other, page n of a slot 4096 × n bytes into it
    DIR/memory.frames   or, compressed: PAGES frames in the order in which they were written, the later page wins

Payloads in ``state``, all msgpack maps::

    HELLO         format (int), kvmigrate (str), created_ms (int, since 1970 UTC)
    CONFIG        description (map): what an equal, empty machine is built from
    SECTION       name, version, body: see state/section.py
    MEMORY_INDEX  the first: file (str), compression (none | zstd), size_bytes (int, of the file), nr_frames (int, in
                  the file; 0 for memory.raw), digest (int), nr_hashed (int), slots ([[id, base_gfn, nr_pages], …])
    MEMORY_INDEX  the others: slot (int, position in slots), first_chunk (int), hashes (bytes, 8 a chunk, little endian)
    END           nr_frames (int): the frames before this one

A chunk is 64 pages of a slot; the last one of a slot may have fewer. Its hash is XXH3-64 over 64 page hashes of 8 bytes
each, little endian, those of the pages that it lacks taken for 0. The hash of a page is XXH3-64 of its 4096 bytes, 0
for a page of zeros, and 1 where XXH3-64 itself gives 0. A chunk whose pages are all zero has the hash 0: so the hashes
also say where the data lies, and there is no second list that could disagree with them. Every chunk of every slot has
its hash, in order and once.

Rules for readers: the frame's header, HELLO and its ``format`` can be read for ever. A greater ``format`` is refused;
an unknown frame is refused when it is mandatory, else skipped. END is the last byte of the file.
"""

from __future__ import annotations

import itertools
import sys
from array import array
from collections.abc import Iterator, Mapping, Sequence

from ..config import MAX_MEMORY_BYTES, PAGE_BYTES
from ..errors import BadField, BadVersion
from ..record import dataclass
from ..state.section import Fields, Value

FORMAT = 1
STATE_FILE = "state"
RAW_FILE = "memory.raw"
FRAMES_FILE = "memory.frames"
FILES = (STATE_FILE, RAW_FILE, FRAMES_FILE)
CHUNK_PAGES = 64
HASHES_PER_FRAME = 1 << 17
"""Chunk hashes in one MEMORY_INDEX frame: 1 MiB, which is what a decoder takes as one value. They cover 32 GiB."""
MAX_SLOTS = 32
MAX_EXTENTS = 16384
"""Mappings that a restore may take; the kernel allows a process 65530 (vm.max_map_count)."""
_MAX_FRAMES = 1 << 32
_MAX_CREATED_MS = 253_402_300_799_999
"""The end of the year 9999, the last that a calendar here can show."""
_COMPRESSIONS = {RAW_FILE: "none", FRAMES_FILE: "zstd"}

assert sys.byteorder == "little", "the chunk hashes are handled as native words, and KVM on x86 is little endian"


@dataclass(frozen=True, slots=True)
class Hello:
    """The first frame: the format's version, the writer's version, when (milliseconds since 1970 UTC)."""

    format: int
    kvmigrate: str
    created_ms: int

    def to_value(self) -> dict[str, Value]:
        return {"format": self.format, "kvmigrate": self.kvmigrate, "created_ms": self.created_ms}

    @classmethod
    def from_value(cls, value: Value) -> Hello:
        """Raises :class:`BadVersion` for a later format, whatever else is in it, and :class:`BadField`."""
        fields = Fields(value, "HELLO")
        version = fields.integer("format", 1, 0xFFFF)
        if version > FORMAT:
            raise BadVersion(f"the snapshot has format {version}, this kvmigrate reads up to {FORMAT}: update it")
        hello = cls(version, fields.text("kvmigrate", 64), fields.integer("created_ms", 0, _MAX_CREATED_MS))
        fields.done()
        return hello


@dataclass(frozen=True, slots=True)
class IndexSlot:
    """One memory slot as the index tells it; ``nr_pages`` pages from ``base_gfn`` on."""

    id: int
    base_gfn: int
    nr_pages: int

    @property
    def nr_chunks(self) -> int:
        return -(-self.nr_pages // CHUNK_PAGES)


@dataclass(frozen=True, slots=True)
class MemoryIndex:
    """What ``state`` says of the memory file. ``digest`` and ``nr_hashed`` are those of csrc/api/memory.h."""

    file: str
    size_bytes: int
    nr_frames: int
    digest: int
    nr_hashed: int
    slots: tuple[IndexSlot, ...]

    @property
    def compression(self) -> str:
        return _COMPRESSIONS[self.file]

    @property
    def nr_pages(self) -> int:
        return sum(slot.nr_pages for slot in self.slots)

    def to_value(self) -> dict[str, Value]:
        """The payload of the first MEMORY_INDEX frame."""
        return {
            "file": self.file,
            "compression": self.compression,
            "size_bytes": self.size_bytes,
            "nr_frames": self.nr_frames,
            "digest": self.digest,
            "nr_hashed": self.nr_hashed,
            "slots": [[slot.id, slot.base_gfn, slot.nr_pages] for slot in self.slots],
        }

    @classmethod
    def from_value(cls, value: Value) -> MemoryIndex:
        """Decode and check each field, and the fields against each other. Raises :class:`BadField`."""
        fields = Fields(value, "MEMORY_INDEX")
        file = fields.text("file", 64)
        if _COMPRESSIONS.get(file) != fields.text("compression", 16):
            raise BadField(f"MEMORY_INDEX: {file!r} is not a memory file that goes with its compression")
        index = cls(
            file=file,
            size_bytes=fields.integer("size_bytes"),
            nr_frames=fields.integer("nr_frames", 0, _MAX_FRAMES),
            digest=fields.integer("digest"),
            nr_hashed=fields.integer("nr_hashed"),
            slots=decode_slots(fields.sequence("slots", MAX_SLOTS), "MEMORY_INDEX"),
        )
        fields.done()
        index._check()
        return index

    def _check(self) -> None:
        if self.nr_hashed > self.nr_pages:
            raise BadField(f"MEMORY_INDEX: {self.nr_hashed} pages hold data, but the slots have {self.nr_pages}")
        if self.file == RAW_FILE and (self.size_bytes != self.nr_pages * PAGE_BYTES or self.nr_frames):
            raise BadField(f"MEMORY_INDEX: {self.size_bytes} bytes cannot be {self.nr_pages} pages of {RAW_FILE}")


def decode_slots(value: Sequence[Value], where: str) -> tuple[IndexSlot, ...]:
    """Decode ``[[id, base_gfn, nr_pages], …]``: at least one, rising, none over another, 1 TiB in all.

    Raises :class:`BadField`, naming ``where``.
    """
    slots: list[IndexSlot] = []
    end_gfn = 0
    for row in value:
        if type(row) is not list or len(row) != 3 or any(type(number) is not int for number in row):
            raise BadField(f"{where}: slot {len(slots)} is {row!r}, expected [id, base_gfn, nr_pages]")
        slot = IndexSlot(*row)
        too_big = not 0 < slot.nr_pages <= MAX_MEMORY_BYTES // PAGE_BYTES
        if too_big or slot.base_gfn < end_gfn or not 0 <= slot.id < 1 << 16:
            raise BadField(f"{where}: slot {len(slots)} is {row!r}: not rising, or over another, or no size for a slot")
        end_gfn = slot.base_gfn + slot.nr_pages
        slots.append(slot)
    if not slots or len({slot.id for slot in slots}) != len(slots) or end_gfn > 1 << 40:
        raise BadField(f"{where}: the slots {list(value)!r} cannot be: none, an id twice, or too high")
    if sum(slot.nr_pages for slot in slots) * PAGE_BYTES > MAX_MEMORY_BYTES:
        raise BadField(f"{where}: the slots are over {MAX_MEMORY_BYTES} bytes in all")
    return tuple(slots)


class ChunkHashes:
    """The chunk hashes of every slot. Filled in order; complete when each chunk has its hash."""

    def __init__(self, slots: Sequence[IndexSlot]) -> None:
        self._slots = slots
        self.of_slot: list[array[int]] = [array("Q") for _ in slots]

    @property
    def complete(self) -> bool:
        return all(len(h) == slot.nr_chunks for h, slot in zip(self.of_slot, self._slots, strict=True))

    def payloads(self) -> Iterator[Mapping[str, Value]]:
        """The payloads of the MEMORY_INDEX frames after the first."""
        for position, hashes in enumerate(self.of_slot):
            for first in range(0, len(hashes), HASHES_PER_FRAME):
                part = hashes[first : first + HASHES_PER_FRAME].tobytes()
                yield {"slot": position, "first_chunk": first, "hashes": part}

    def add(self, value: Value) -> None:
        """Take a decoded payload in. Raises :class:`BadField` unless it continues where the one before ended."""
        fields = Fields(value, "MEMORY_INDEX")
        position = fields.integer("slot", 0, len(self._slots) - 1)
        first = fields.integer("first_chunk")
        data = fields.blob("hashes", HASHES_PER_FRAME * 8)
        fields.done()
        have, slot = self.of_slot[position], self._slots[position]
        behind = all(len(h) == s.nr_chunks for h, s in zip(self.of_slot[:position], self._slots, strict=False))
        if not behind or first != len(have) or not data or len(data) % 8 or first + len(data) // 8 > slot.nr_chunks:
            raise BadField(
                f"MEMORY_INDEX: {len(data)} bytes of hashes for chunk {first} on of slot {position} do not follow "
                f"the {len(have)} before them or exceed its {slot.nr_chunks} chunks"
            )
        have.frombytes(data)


def extents(hashes: Sequence[int], nr_pages: int, max_extents: int = MAX_EXTENTS) -> list[tuple[int, int]]:
    """Where a slot holds data: ``(first page, number of pages)``, rising, whole chunks but at the slot's end.

    Gaps are closed, smallest first, until there are at most ``max_extents``.
    """
    found: list[tuple[int, int]] = []
    at = 0
    for has_data, group in itertools.groupby(hashes, bool):
        length = sum(1 for _ in group)
        if has_data:
            found.append((at, at + length))
        at += length
    merged = _close_gaps(found, max_extents)
    return [(a * CHUNK_PAGES, min(b * CHUNK_PAGES, nr_pages) - a * CHUNK_PAGES) for a, b in merged]


def _close_gaps(runs: list[tuple[int, int]], at_most: int) -> list[tuple[int, int]]:
    """Join the runs ``(begin, end)`` over their smallest gaps until ``at_most`` are left."""
    excess = len(runs) - at_most
    if excess <= 0:
        return runs
    by_gap = sorted(range(1, len(runs)), key=lambda n: runs[n][0] - runs[n - 1][1])
    closed = set(by_gap[:excess])
    joined: list[tuple[int, int]] = []
    for n, (begin, end) in enumerate(runs):
        joined.append((joined.pop()[0] if n in closed else begin, end))
    return joined
