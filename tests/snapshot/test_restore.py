"""A restored guest runs from the file without reading it, never writes to it, and can be saved and moved again."""

from __future__ import annotations

import hashlib
import json
import os
from array import array
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmigrate.config import PAGE_BYTES, MemoryBackend, SnapshotParameters
from kvmigrate.errors import SnapshotError
from kvmigrate.snapshot.format import CHUNK_PAGES, HASHES_PER_FRAME, ChunkHashes, IndexSlot, extents
from kvmigrate.snapshot.inspect import inspect
from kvmigrate.snapshot.load import restore
from kvmigrate.snapshot.save import take
from kvmigrate.snapshot.verify import verify
from kvmigrate.state import section
from tests.backends import SHARED, room_for
from tests.fake_machine import MIB
from tests.snapshot.tools import RAW, ZSTD, build, guest, page, restored


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def mappings_of(path: Path) -> int:
    return sum(line.endswith(f" {path}") for line in Path("/proc/self/maps").read_text().splitlines())


def sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_restore_maps_memory_without_reading_it(tmp_path: Path) -> None:
    with guest(64 * MIB) as machine:
        machine.fill(8192)
        take(machine, tmp_path / "s", RAW)
    before = resident_bytes()
    with restored(tmp_path / "s") as copy:
        assert resident_bytes() - before < 4 * MIB
        assert mappings_of(tmp_path / "s" / "memory.raw") == 1
        assert copy.machine.memory.resident_pages() >= 8192
        assert set(copy.timings) == {"read", "build", "memory", "load", "total"}


def test_holes_stay_anonymous(tmp_path: Path) -> None:
    with guest(64 * MIB) as machine:
        for first in (0, 5000, 16320):
            machine.fill(64, seed=first, first=first)
        take(machine, tmp_path / "s", RAW)
    with restored(tmp_path / "s") as copy:
        # 5000 is no multiple of 64: its pages lie in two chunks.
        assert mappings_of(tmp_path / "s" / "memory.raw") == 3
        assert copy.machine.memory.resident_pages() == 64 + 128 + 64


def test_writes_of_the_restored_guest_stay_in_its_process(tmp_path: Path) -> None:
    with guest() as machine:
        machine.fill(300)
        take(machine, tmp_path / "s", RAW)
    before = sha(tmp_path / "s" / "memory.raw")
    with restored(tmp_path / "s") as first, restored(tmp_path / "s") as second:
        first.machine.memory.write(page(10), b"mine" * 5000)
        assert second.machine.memory.read(page(10), 4) != b"mine"
    assert sha(tmp_path / "s" / "memory.raw") == before


def test_removed_directory_does_not_hurt_the_running_guest(tmp_path: Path) -> None:
    with guest() as machine:
        machine.fill(300)
        take(machine, tmp_path / "s", RAW)
        with restored(tmp_path / "s") as copy:
            for path in (tmp_path / "s").iterdir():
                path.unlink()
            (tmp_path / "s").rmdir()
            assert copy.machine.memory.hash_all() == machine.memory.hash_all()


@pytest.mark.parametrize("parameters", [RAW, ZSTD], ids=["raw", "zstd"])
def test_snapshot_of_a_restored_guest_holds_what_it_never_touched(tmp_path: Path, parameters: object) -> None:
    with guest() as machine:
        machine.fill(300)
        machine.fill(5, seed=3, first=1000)
        take(machine, tmp_path / "1", RAW)
        with restored(tmp_path / "1") as copy:
            copy.machine.resume()
            copy.machine.memory.write(page(1001), bytes(PAGE_BYTES))
            copy.machine.memory.write(page(1500), b"new")
            take(copy.machine, tmp_path / "2", parameters)  # type: ignore[arg-type]
            wanted = copy.machine.memory.hash_all()
        with restored(tmp_path / "2") as again:
            assert again.machine.memory.hash_all() == wanted
        assert verify(tmp_path / "2").ok
        assert wanted != machine.memory.hash_all()


def test_unchanged_guest_gives_the_same_memory_file_again(tmp_path: Path) -> None:
    with guest() as machine:
        machine.fill(300)
        take(machine, tmp_path / "1", RAW)
        with restored(tmp_path / "1") as copy:
            copy.machine.resume()
            take(copy.machine, tmp_path / "2", RAW)
    assert sha(tmp_path / "1" / "memory.raw") == sha(tmp_path / "2" / "memory.raw")


@pytest.mark.parametrize("backend", SHARED)
@pytest.mark.parametrize("parameters", [RAW, ZSTD], ids=["raw", "zstd"])
def test_memory_that_is_shared_or_huge_takes_all_in(
    tmp_path: Path, backend: MemoryBackend, parameters: SnapshotParameters
) -> None:
    with guest() as machine:
        for first in (0, 700, 1990):
            machine.fill(58, seed=first, first=first)
        take(machine, tmp_path / "s", parameters)
        with room_for(backend, 8 * MIB), restored(tmp_path / "s", backend) as copy:
            assert mappings_of(tmp_path / "s" / "memory.raw") == 0
            (tmp_path / "s" / "state").unlink()
            memory = copy.machine.memory
            assert (memory.backend, memory.hash_all()) == (backend, machine.memory.hash_all())


def test_damage_is_found_when_all_is_taken_in(tmp_path: Path) -> None:
    with guest() as machine:
        machine.fill(300)
        take(machine, tmp_path / "s", RAW)
    with (tmp_path / "s" / "memory.raw").open("r+b") as file:
        file.seek(page(130) + 5)
        byte = file.read(1)[0]
        file.seek(page(130) + 5)
        file.write(bytes([byte ^ 1]))
    with pytest.raises(SnapshotError, match=r"memory\.raw: what it makes of chunk 2 of slot 0 is not what was saved"):
        restore(tmp_path / "s", partial(build, backend=MemoryBackend.MEMFD))


def chunks(*runs: tuple[int, int], nr_chunks: int) -> array[int]:
    """Hashes of ``nr_chunks`` chunks with data in the runs ``(first, number)``."""
    found = array("Q", bytes(8 * nr_chunks))
    for first, number in runs:
        found[first : first + number] = array("Q", [7] * number)
    return found


def test_extents_join_neighbours_and_end_with_the_slot() -> None:
    hashes = chunks((0, 2), (5, 1), (9, 1), nr_chunks=10)
    assert extents(hashes, 9 * 64 + 3) == [(0, 128), (320, 64), (576, 3)]
    assert extents(chunks(nr_chunks=10), 640) == []


def test_extents_close_the_smallest_gaps_when_there_are_too_many() -> None:
    hashes = chunks((0, 1), (3, 1), (5, 1), (20, 1), nr_chunks=21)
    assert extents(hashes, 21 * 64, max_extents=3) == [(0, 64), (192, 192), (1280, 64)]
    assert extents(hashes, 21 * 64, max_extents=2) == [(0, 384), (1280, 64)]
    assert extents(hashes, 21 * 64, max_extents=1) == [(0, 1344)]


@given(st.lists(st.booleans(), min_size=1, max_size=80), st.integers(1, 64), st.integers(1, 12))
@settings(max_examples=200, deadline=None)
def test_extents_cover_all_data_in_order_within_the_slot(data: list[bool], last_pages: int, most: int) -> None:
    nr_pages = (len(data) - 1) * CHUNK_PAGES + last_pages
    found = extents(array("Q", map(int, data)), nr_pages, most)
    assert len(found) <= most
    assert all(a + n < b for (a, n), (b, _) in pairwise(found))
    assert all(first % CHUNK_PAGES == 0 and n > 0 and first + n <= nr_pages for first, n in found)
    covered = {at // CHUNK_PAGES for first, n in found for at in range(first, first + n, CHUNK_PAGES)}
    assert {n for n, full in enumerate(data) if full} <= covered
    if sum(a != b for a, b in pairwise([False, *data, False])) // 2 <= most:
        assert {n for n, full in enumerate(data) if full} == covered


def test_index_of_a_guest_of_1_tib_fits_its_frames() -> None:
    slots = (IndexSlot(0, 0, 3 << 18), IndexSlot(1, 1 << 20, (1 << 28) - (3 << 18)))
    hashes = ChunkHashes(slots)
    for words, slot in zip(hashes.of_slot, slots, strict=True):
        words.frombytes(bytes(8 * (slot.nr_chunks - 1)) + b"lastlast")
    payloads = [section.pack(value) for value in hashes.payloads()]
    assert max(map(len, payloads)) < HASHES_PER_FRAME * 8 + 64
    again = ChunkHashes(slots)
    for payload in payloads:
        again.add(section.unpack(payload, "test"))
    assert again.complete and again.of_slot == hashes.of_slot


@pytest.mark.parametrize("parameters", [RAW, ZSTD], ids=["raw", "zstd"])
def test_inspect_shows_state_and_ranges_as_json(tmp_path: Path, parameters: object) -> None:
    with guest() as machine:
        machine.fill(64)
        machine.fill(1, seed=2, first=1000)
        machine.state = {
            "vcpu0": {"regs": {"rip": 0x7C00}, "msrs": {"IA32_EFER": 0x500}, "xsave": b"\x01\xff"},
            "vm": {"clock": 5},
            "serial0": {"lcr": 3},
        }
        take(machine, tmp_path / "s", parameters)  # type: ignore[arg-type]
        shown = json.loads(json.dumps(inspect(tmp_path / "s")))
        uuid = machine.uuid
    regs = {"regs": {"rip": 0x7C00}, "msrs": {"IA32_EFER": 0x500}, "xsave": "01ff"}
    assert shown["vcpus"] == {"vcpu0": {"version": 1, "body": regs}}
    assert shown["vm"]["body"] == {"clock": 5}
    assert shown["devices"] == {"serial0": {"version": 1, "body": {"lcr": 3}}}
    assert shown["description"]["uuid"] == uuid and shown["format"] == 1 and shown["created"].startswith("20")
    memory = shown["memory"]
    assert memory["data_bytes"] == 65 * PAGE_BYTES and memory["guest_bytes"] == 8 * MIB
    ranges = memory["slots"][0]["ranges"]
    assert [(found["gpa"], found["size_bytes"]) for found in ranges] == [(0, page(64)), (page(960), page(64))]
    assert [found["file_offset"] for found in ranges] == ([0, page(960)] if parameters is RAW else [None, None])
