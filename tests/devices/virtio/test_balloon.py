"""A balloon: what the guest gives up or reports free is empty here at once, and marked, so that a move tells of it."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvmigrate.config import PAGE_BYTES, MemoryBackend
from kvmigrate.devices.virtio import registers as reg
from kvmigrate.devices.virtio.balloon import F_PAGE_REPORTING, VirtioBalloon
from kvmigrate.errors import BadField
from kvmigrate.memory.region import GuestMemory
from tests.backends import ANONYMOUS, HUGETLBFS, memory_of

from .queues import MEMORY_BYTES, WRITE, QueuesDriver, clean, is_dirty, wait_for

INFLATE, DEFLATE, REPORT = range(3)
HUGE_BYTES = 2 << 20
AREA = 2 << 20
"""A huge page of its own."""


@pytest.fixture(params=MemoryBackend)
def driver(request: pytest.FixtureRequest) -> Iterator[QueuesDriver]:
    with memory_of(request.param, MEMORY_BYTES) as memory:
        balloon = VirtioBalloon(memory)
        driver = QueuesDriver(memory, balloon, F_PAGE_REPORTING)
        driver.set_up()
        memory.write(AREA, b"\xab" * HUGE_BYTES)
        clean(memory)
        yield driver
        balloon.close()


def balloon_of(driver: QueuesDriver) -> VirtioBalloon:
    assert isinstance(driver.device, VirtioBalloon)
    return driver.device


def request(driver: QueuesDriver, queue: int, *pages: int) -> None:
    """Give the device the numbers of ``pages``, and wait until it is through."""
    numbers = struct.pack(f"<{len(pages)}I", *pages)
    at = 0x80000
    driver.memory.write(at, numbers)
    driver.rings[queue].put((at, len(numbers), 0))
    driver.kick(queue)
    driver.rings[queue].wait_used()


def report(driver: QueuesDriver, *ranges: tuple[int, int]) -> None:
    driver.rings[REPORT].put(*((gpa, size_bytes, WRITE) for gpa, size_bytes in ranges))
    driver.kick(REPORT)
    driver.rings[REPORT].wait_used()


def keeps(memory: GuestMemory) -> bool:
    """Whether pages that are given up stay here, as huge pages do: they were set aside for the guest."""
    return memory.backend is HUGETLBFS


def resident(memory: GuestMemory, gpa: int) -> bool:
    gfn = gpa // PAGE_BYTES
    return bool(memory.resident_bitmap(0)[gfn // 8] >> gfn % 8 & 1)


def test_pages_that_are_given_up_are_empty_and_marked(driver: QueuesDriver) -> None:
    first = AREA // PAGE_BYTES
    request(driver, INFLATE, first + 3, first + 7)
    for page in range(10):
        gpa, gone = AREA + page * PAGE_BYTES, page in (3, 7)
        assert resident(driver.memory, gpa) is (keeps(driver.memory) or not gone)
        assert is_dirty(driver.memory, gpa) is gone
        assert driver.memory.read(gpa, 8) == (bytes(8) if gone else b"\xab" * 8)
    assert balloon_of(driver).statistics() == {"inflated": 2, "reported": 0}


def test_a_page_that_comes_back_can_be_used_again(driver: QueuesDriver) -> None:
    request(driver, INFLATE, AREA // PAGE_BYTES)
    request(driver, DEFLATE, AREA // PAGE_BYTES)
    driver.memory.write(AREA, b"back")
    assert driver.memory.read(AREA, 4) == b"back"


def test_memory_that_is_reported_free_is_neither_kept_nor_sent(driver: QueuesDriver) -> None:
    pages = range(AREA, AREA + HUGE_BYTES, PAGE_BYTES)
    assert all(resident(driver.memory, gpa) for gpa in pages)
    report(driver, (AREA, HUGE_BYTES // 2), (AREA + HUGE_BYTES // 2, HUGE_BYTES // 2))
    assert {resident(driver.memory, gpa) for gpa in pages} == {keeps(driver.memory)}
    assert all(is_dirty(driver.memory, gpa) for gpa in pages)
    assert driver.memory.read(AREA, HUGE_BYTES) == bytes(HUGE_BYTES)
    assert balloon_of(driver).statistics()["reported"] == HUGE_BYTES // PAGE_BYTES


def test_only_whole_pages_of_what_is_reported_are_dropped(driver: QueuesDriver) -> None:
    report(driver, (AREA + 100, 2 * PAGE_BYTES))
    assert driver.memory.read(AREA, PAGE_BYTES) == b"\xab" * PAGE_BYTES
    assert driver.memory.read(AREA + PAGE_BYTES, PAGE_BYTES) == bytes(PAGE_BYTES)
    assert driver.memory.read(AREA + 2 * PAGE_BYTES, PAGE_BYTES) == b"\xab" * PAGE_BYTES


def test_pages_that_nobody_touched_are_given_up_without_being_touched(driver: QueuesDriver) -> None:
    at = AREA + HUGE_BYTES
    request(driver, INFLATE, at // PAGE_BYTES + 3)
    report(driver, (at + 64 * PAGE_BYTES, HUGE_BYTES))
    assert not any(resident(driver.memory, gpa) for gpa in range(at, at + 2 * HUGE_BYTES, PAGE_BYTES))


@pytest.mark.parametrize("driver", [ANONYMOUS], indirect=True)
def test_memory_that_came_from_a_snapshot_is_dropped_too(driver: QueuesDriver, tmp_path: Path) -> None:
    path = tmp_path / "memory"
    path.write_bytes(b"\xcd" * (16 * PAGE_BYTES))
    with path.open("rb") as file:
        driver.memory.map_file(AREA // PAGE_BYTES, 16, file.fileno(), 0)
    request(driver, INFLATE, AREA // PAGE_BYTES + 2)
    report(driver, (AREA + 4 * PAGE_BYTES, 8 * PAGE_BYTES))
    dropped = {2, *range(4, 12)}
    for page in range(16):
        gpa = AREA + page * PAGE_BYTES
        assert driver.memory.read(gpa, 1) == (b"\0" if page in dropped else b"\xcd")


@pytest.mark.parametrize("numbers", [(1 << 31,), (MEMORY_BYTES // PAGE_BYTES,), (0, 0xFFFFFFFF)])
def test_a_page_that_is_no_memory_breaks_the_device(driver: QueuesDriver, numbers: tuple[int, ...]) -> None:
    driver.memory.write(0x80000, struct.pack(f"<{len(numbers)}I", *numbers))
    driver.rings[INFLATE].put((0x80000, 4 * len(numbers), 0))
    driver.kick(INFLATE)
    wait_for(driver.broken, "the device is broken")


@pytest.mark.parametrize("size_bytes", [3, (4 << 20) + 4])
def test_a_request_of_no_likely_size_breaks_the_device(driver: QueuesDriver, size_bytes: int) -> None:
    driver.rings[INFLATE].put((AREA, size_bytes, 0))
    driver.kick(INFLATE)
    wait_for(driver.broken, "the device is broken")


def test_the_target_is_in_the_configuration_and_the_driver_tells_how_far_it_is(driver: QueuesDriver) -> None:
    balloon = balloon_of(driver)
    balloon.set_target(1 << 40)
    assert driver.get(reg.CONFIG) == MEMORY_BYTES // PAGE_BYTES
    assert driver.get(reg.INTERRUPT_STATUS) & 2
    driver.set(reg.CONFIG + 4, 77)
    assert (driver.get(reg.CONFIG + 4), balloon.actual_pages) == (77, 77)
    driver.set(reg.CONFIG, 5)
    assert driver.get(reg.CONFIG) == MEMORY_BYTES // PAGE_BYTES, "the target is the host's"


def test_both_numbers_move_along_and_are_checked(driver: QueuesDriver) -> None:
    balloon = balloon_of(driver)
    balloon.set_target(100)
    driver.set(reg.CONFIG + 4, 77)
    balloon.pause()
    body = balloon.save()
    with GuestMemory(MEMORY_BYTES) as memory:
        other = VirtioBalloon(memory)
        other.load(body)
        assert (other.target_pages, other.actual_pages) == (100, 77)
        with pytest.raises(BadField):
            other.load(body | {"target_pages": MEMORY_BYTES // PAGE_BYTES + 1})
        assert other.save() == body
        other.close()
