"""The checker's own look at guest RAM in a snapshot: every page hashed anew and compared with the index."""

from __future__ import annotations

import os
import struct
from array import array
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import xxhash
import zstandard

from .verify_frames import PAGES, Bytes, Frame, Tell, walk

PAGE = 4096
CHUNK_PAGES = 64
CHUNK = CHUNK_PAGES * PAGE
ZERO_PAGE = bytes(PAGE)
ZERO_CHUNK = bytes(CHUNK)
FRAME_PAGES = 256
MAX_FRAME_BYTES = 16 + (16 + PAGE) * FRAME_PAGES
WORD = (1 << 64) - 1


@dataclass(frozen=True)
class Slot:
    """One memory slot: ``nr_pages`` pages from ``base_gfn`` on."""

    id: int
    base_gfn: int
    nr_pages: int

    @property
    def row(self) -> list[int]:
        return [self.id, self.base_gfn, self.nr_pages]

    @property
    def nr_chunks(self) -> int:
        return -(-self.nr_pages // CHUNK_PAGES)

    @classmethod
    def of(cls, row: Any) -> Slot:
        """Raises :class:`ValueError` unless ``row`` is [id, base_gfn, nr_pages] of something that can be."""
        if type(row) is not list or len(row) != 3 or any(type(n) is not int or n < 0 for n in row):
            raise ValueError(f"slot {row!r} is not [id, base_gfn, nr_pages]")
        slot = cls(*row)
        if not slot.nr_pages or slot.base_gfn + slot.nr_pages > 1 << 40 or slot.nr_pages > 1 << 28:
            raise ValueError(f"slot {row!r} has no size that a slot can have")
        return slot


@dataclass
class Index:
    """The index as its frames told it."""

    file: str
    size_bytes: int
    nr_frames: int
    digest: int
    nr_hashed: int
    slots: list[Slot]
    hashes: list[array[int]] = field(default_factory=list)

    @classmethod
    def of(cls, value: Any) -> Index:
        """The first MEMORY_INDEX frame. Raises :class:`ValueError`."""
        numbers = ("size_bytes", "nr_frames", "digest", "nr_hashed")
        if type(value) is not dict or value.keys() != {"file", "compression", "slots", *numbers}:
            raise ValueError("its fields are not those of an index")
        if any(type(value[key]) is not int or value[key] < 0 for key in numbers) or type(value["slots"]) is not list:
            raise ValueError("a field is of another type, or negative")
        if (value["file"], value["compression"]) not in (("memory.raw", "none"), ("memory.frames", "zstd")):
            raise ValueError(f"file {value['file']!r} with compression {value['compression']!r}")
        slots = [Slot.of(row) for row in value["slots"]]
        if not 1 <= len(slots) <= 32 or any(a.base_gfn + a.nr_pages > b.base_gfn for a, b in pairwise(slots)):
            raise ValueError("the slots are none, too many, not rising, or one lies over another")
        nr_pages = sum(slot.nr_pages for slot in slots)
        if value["file"] == "memory.raw" and (value["size_bytes"] != nr_pages * PAGE or value["nr_frames"]):
            raise ValueError(f"{value['size_bytes']} bytes are not {nr_pages} pages")
        if value["nr_hashed"] > nr_pages:
            raise ValueError(f"{value['nr_hashed']} pages with data of {nr_pages}")
        plain = {key: value[key] for key in ("file", *numbers)}
        return cls(**plain, slots=slots, hashes=[array("Q") for _ in slots])

    def add(self, value: Any) -> None:
        """One of the MEMORY_INDEX frames after it. Raises :class:`ValueError`."""
        if type(value) is not dict or value.keys() != {"slot", "first_chunk", "hashes"}:
            raise ValueError("its fields are not those of chunk hashes")
        position, first, data = value["slot"], value["first_chunk"], value["hashes"]
        if type(position) is not int or not 0 <= position < len(self.slots) or type(data) is not bytes or len(data) % 8:
            raise ValueError(f"chunk hashes for slot {position!r} cannot be")
        have = self.hashes[position]
        if first != len(have) or not data or len(have) + len(data) // 8 > self.slots[position].nr_chunks:
            raise ValueError(f"chunk hashes of slot {position} from {first!r} on, after {len(have)}")
        have.frombytes(data)

    @property
    def complete(self) -> bool:
        return all(len(h) == slot.nr_chunks for h, slot in zip(self.hashes, self.slots, strict=True))


def page_hash(page: memoryview | bytes) -> int:
    """XXH3-64 of a page, 0 for zeros and for nothing else."""
    return 0 if page == ZERO_PAGE else xxhash.xxh3_64_intdigest(page) or 1


def digest_term(gfn: int, page: int) -> int:
    """What a page whose hash is ``page`` adds to the digest: csrc/hash.h."""
    x = page ^ ((gfn + 1) * 0x9E3779B97F4A7C15 & WORD)
    x = (x ^ x >> 33) * 0xFF51AFD7ED558CCD & WORD
    x = (x ^ x >> 33) * 0xC4CEB9FE1A85EC53 & WORD
    return x ^ x >> 33


@dataclass
class _Sums:
    """The digest and the number of pages with data, as found."""

    digest: int = 0
    nr_pages: int = 0

    def add(self, gfn: int, page: int) -> None:
        if page:
            self.digest += digest_term(gfn, page)
            self.nr_pages += 1

    def compare(self, index: Index, tell: Tell) -> None:
        if self.nr_pages != index.nr_hashed:
            tell(0, f"{self.nr_pages} pages hold data, the index says {index.nr_hashed}")
        if self.digest & WORD != index.digest:
            tell(0, "the digest over all pages is not the one of the index")


def _chunks(index: Index) -> Iterator[tuple[int, int, int, int, int | None]]:
    """Every chunk: (file page, first gfn, pages, slot, hash; None where the index lacks it)."""
    before = 0
    for position, slot in enumerate(index.slots):
        hashes = index.hashes[position]
        for chunk in range(slot.nr_chunks):
            first = chunk * CHUNK_PAGES
            nr_pages = min(CHUNK_PAGES, slot.nr_pages - first)
            wanted = hashes[chunk] if chunk < len(hashes) else None
            yield before + first, slot.base_gfn + first, nr_pages, position, wanted
        before += slot.nr_pages


def chunk_hash(pages: list[int]) -> int:
    """XXH3-64 over 64 page hashes, 0 when all are 0."""
    return xxhash.xxh3_64_intdigest(struct.pack("<64Q", *pages, *[0] * (CHUNK_PAGES - len(pages)))) if any(pages) else 0


def data_ranges(fd: int, size: int) -> list[tuple[int, int]]:
    """Where the file is no hole: rising ``(begin, end)`` in bytes; all of it where the file system cannot tell."""
    found: list[tuple[int, int]] = []
    at = 0
    while at < size:
        try:
            begin = os.lseek(fd, at, os.SEEK_DATA)
        except OSError:
            break
        at = os.lseek(fd, begin, os.SEEK_HOLE)
        found.append((begin, at))
    return found


class _Holes:
    """Whether a range lies in a hole."""

    def __init__(self, fd: int, size: int) -> None:
        self._ranges = data_ranges(fd, size)
        self._begins = [begin for begin, _ in self._ranges]

    def has_data(self, begin: int, end: int) -> bool:
        before = bisect_right(self._begins, end - 1) - 1
        return before >= 0 and self._ranges[before][1] > begin


def check_raw(data: Bytes, index: Index, tell: Tell) -> int:
    """Every page of ``memory.raw``; returns how many hold data."""
    holes = _Holes(data.fd, len(data))
    sums = _Sums()
    for file_page, gfn, nr_pages, position, wanted in _chunks(index):
        begin, end = file_page * PAGE, (file_page + nr_pages) * PAGE
        where = f"slot {position}, gfn {gfn:#x}, {nr_pages} pages"
        if end > len(data):
            if wanted:
                tell(begin, f"a chunk with data ({where}) lies past the end of the file")
            continue
        if not holes.has_data(begin, end):
            if wanted:
                tell(begin, f"a chunk with data ({where}) is a hole in the file")
            continue
        try:
            pages = page_hashes(data[begin:end])
        except OSError as error:
            tell(begin, f"a chunk ({where}) cannot be read: {error.strerror or error}")
            continue
        for n, page in enumerate(pages):
            sums.add(gfn + n, page)
        if wanted is not None and chunk_hash(pages) != wanted:
            tell(begin, f"a chunk ({where}) does not have its hash")
    sums.compare(index, tell)
    return sums.nr_pages


def page_hashes(data: bytes) -> list[int]:
    """The hash of each page of ``data``."""
    if data == ZERO_CHUNK[: len(data)]:
        return [0] * (len(data) // PAGE)
    view = memoryview(data)
    return [page_hash(view[at : at + PAGE]) for at in range(0, len(data), PAGE)]


def check_frames(data: Bytes, index: Index, tell: Tell) -> int:
    """Every frame of ``memory.frames``, and what they make of memory; returns how many pages hold data."""
    ram = _Ram(index)
    nr_frames = 0
    for frame in walk(data, tell):
        nr_frames += 1
        if frame.kind != PAGES:
            tell(frame.offset, f"{frame.name} does not belong here")
            continue
        if frame.payload_bytes > MAX_FRAME_BYTES:
            tell(frame.offset, f"{frame.name} has {frame.payload_bytes} bytes, over the limit of {MAX_FRAME_BYTES}")
            continue
        try:
            ram.take(memoryview(data[frame.payload_at : frame.payload_at + frame.payload_bytes]), frame)
        except (ValueError, struct.error, zstandard.ZstdError, OSError) as error:
            tell(frame.offset, f"{frame.name}: {error}")
    if nr_frames != index.nr_frames:
        tell(len(data), f"there are {nr_frames} frames, the index says {index.nr_frames}")
    return ram.compare(tell)


class _Ram:
    """The page hashes that the frames make, page by page of the slots."""

    def __init__(self, index: Index) -> None:
        self._index = index
        # Only what frames name: how many pages there might be is a hostile number.
        self._hashes: dict[int, int] = {}
        self._zstd = zstandard.ZstdDecompressor(max_window_size=8 << 20)

    def take(self, body: memoryview, frame: Frame) -> None:
        """One PAGES frame. Raises :class:`ValueError` or a zstd error."""
        nr_runs, flags, data_bytes = struct.unpack_from("<IIQ", body)
        table_bytes = 16 + 16 * nr_runs
        if nr_runs > FRAME_PAGES or flags > 1 or len(body) != table_bytes + data_bytes:
            raise ValueError(f"{nr_runs} runs, flags {flags}, {data_bytes} bytes of data disagree with its length")
        if xxhash.xxh3_64_intdigest(body[:table_bytes]) != frame.checksum:
            raise ValueError("its page table does not have its checksum")
        runs = list(struct.iter_unpack("<QII", body[16:table_bytes]))
        places = [self._place(gfn, nr_pages) for gfn, nr_pages, _ in runs]
        nr_data = sum(nr_pages for _, nr_pages, kind in runs if kind == 0)
        if sum(nr_pages for _, nr_pages, _ in runs) > FRAME_PAGES or any(kind > 1 for *_, kind in runs):
            raise ValueError("its page table names too many pages, or a kind that is not known")
        if any(a[0] + a[1] > b[0] for a, b in pairwise(runs)):
            raise ValueError("its page table does not rise")
        pages = self._pages(body[table_bytes:], flags, nr_data * PAGE)
        self._put(runs, places, pages)

    def _pages(self, data: memoryview, flags: int, size: int) -> bytes | memoryview:
        if flags:
            if zstandard.frame_content_size(data) != size:
                raise ValueError(f"its data does not unpack to {size} bytes")
            data = memoryview(self._zstd.decompress(data, max_output_size=size, allow_extra_data=False))
        if len(data) != size:
            raise ValueError(f"{len(data)} bytes of data for {size // PAGE} pages")
        return data

    def _place(self, gfn: int, nr_pages: int) -> int:
        """Where the run's pages lie among all pages of the slots."""
        before = 0
        for slot in self._index.slots:
            if slot.base_gfn <= gfn and 0 < nr_pages <= slot.base_gfn + slot.nr_pages - gfn:
                return before + gfn - slot.base_gfn
            before += slot.nr_pages
        raise ValueError(f"{nr_pages} pages from gfn {gfn:#x} on are not in one slot")

    def _put(self, runs: list[Any], places: list[int], pages: bytes | memoryview) -> None:
        at = 0
        for (_, nr_pages, kind), place in zip(runs, places, strict=True):
            for n in range(nr_pages):
                self._hashes[place + n] = 0 if kind else page_hash(pages[at : at + PAGE])
                at += 0 if kind else PAGE

    def compare(self, tell: Tell) -> int:
        """Every chunk against the index; returns how many pages hold data."""
        sums = _Sums()
        for place, gfn, nr_pages, position, wanted in _chunks(self._index):
            pages = [self._hashes.get(page, 0) for page in range(place, place + nr_pages)]
            for n, page in enumerate(pages):
                sums.add(gfn + n, page)
            if wanted is not None and chunk_hash(pages) != wanted:
                where = f"slot {position}, gfn {gfn:#x}, {nr_pages} pages"
                tell(0, f"what the frames make of a chunk ({where}) does not have its hash")
        sums.compare(self._index, tell)
        return sums.nr_pages
