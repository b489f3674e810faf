"""A driver that breaks the rules has its device marked broken; nothing outside of its memory is touched, and a reset
brings the device back."""

from __future__ import annotations

import struct
from collections.abc import Callable

import pytest

from kvmigrate.devices.virtio import registers as reg
from kvmigrate.memory.layout import HOLE_END, HOLE_START

from ..conftest import wait_until
from .conftest import READ_GPA, STATUS_GPA, Disk
from .driver import AVAIL_GPA, DATA_GPA, INDIRECT, NEXT, TABLE_GPA, WRITE, Buffer, block_header

MEMORY_BYTES = 1 << 20
ALL = reg.F_VERSION_1 | reg.F_INDIRECT_DESC
HEADER: Buffer = (DATA_GPA, 16, 0)
STATUS: Buffer = (STATUS_GPA, 1, WRITE)

CHAINS: dict[str, list[Buffer]] = {
    "a buffer outside of RAM": [HEADER, (MEMORY_BYTES, 512, WRITE), STATUS],
    "a buffer over the end of RAM": [HEADER, (MEMORY_BYTES - 256, 512, WRITE), STATUS],
    "an address that wraps around": [HEADER, (2**64 - 256, 512, WRITE), STATUS],
    "the largest length": [HEADER, (READ_GPA, 0xFFFFFFFF, WRITE), STATUS],
    "an empty buffer": [HEADER, (READ_GPA, 0, WRITE), STATUS],
    "a buffer to read behind one to write": [HEADER, STATUS, (READ_GPA, 512, 0)],
    "nothing to write": [HEADER, (READ_GPA, 512, 0)],
    "nothing to read": [STATUS],
    "a short header": [(DATA_GPA, 15, 0), STATUS],
    "an indirect table outside of RAM": [(MEMORY_BYTES, 32, INDIRECT)],
    "an indirect table over the end of RAM": [(MEMORY_BYTES - 16, 32, INDIRECT)],
    "an indirect table of no size": [(TABLE_GPA, 0, INDIRECT)],
    "an indirect table of an odd size": [(TABLE_GPA, 40, INDIRECT)],
    "an indirect table with a next": [(TABLE_GPA, 32, INDIRECT), STATUS],
}


def start(disk: Disk, features: int = ALL) -> None:
    disk.driver.start(features)
    disk.driver.put(DATA_GPA, block_header(0, 0))
    # What an indirect table at TABLE_GPA holds is a good request, so that only its descriptor can be at fault.
    disk.driver.write_chain([HEADER, (READ_GPA, 512, WRITE), STATUS], TABLE_GPA)


def require_broken_then_reset(disk: Disk) -> None:
    wait_until(lambda: bool(disk.driver.get(reg.STATUS) & reg.NEEDS_RESET), "the device is broken")
    assert disk.driver.interrupted()
    assert disk.driver.get(reg.INTERRUPT_STATUS) & 2
    assert disk.driver.used_idx == 0
    # Still there, still deaf, until the reset.
    disk.driver.kick()
    disk.driver.set(reg.STATUS, 0)
    assert disk.driver.get(reg.STATUS) == 0
    assert disk.driver.get(reg.INTERRUPT_STATUS) == 0
    disk.driver.put(AVAIL_GPA, bytes(64))
    disk.driver.avail_idx = 0
    disk.driver.start()
    assert disk.request(0, 0, into=512) == 0


@pytest.mark.parametrize("name", CHAINS)
def test_a_chain_that_cannot_be_breaks_the_device(new_disk: Callable[..., Disk], name: str) -> None:
    disk = new_disk()
    start(disk)
    disk.driver.send(CHAINS[name])
    require_broken_then_reset(disk)


def test_a_loop_breaks_the_device(new_disk: Callable[..., Disk]) -> None:
    disk = new_disk()
    start(disk)
    disk.driver.write_desc(0x10000, 0, HEADER, 1)
    disk.driver.write_desc(0x10000, 1, HEADER, 0)
    disk.driver.expose(0)
    disk.driver.kick()
    require_broken_then_reset(disk)


def test_a_loop_in_an_indirect_table_breaks_the_device(new_disk: Callable[..., Disk]) -> None:
    disk = new_disk()
    start(disk)
    disk.driver.write_desc(TABLE_GPA, 1, HEADER, 0)
    disk.driver.write_chain([(TABLE_GPA, 32, INDIRECT)])
    disk.driver.expose(0)
    disk.driver.kick()
    require_broken_then_reset(disk)


def test_an_indirect_table_in_another_breaks_the_device(new_disk: Callable[..., Disk]) -> None:
    disk = new_disk()
    start(disk)
    disk.driver.write_desc(TABLE_GPA, 1, (TABLE_GPA, 48, INDIRECT), None)
    disk.driver.write_chain([(TABLE_GPA, 48, INDIRECT)])
    disk.driver.expose(0)
    disk.driver.kick()
    require_broken_then_reset(disk)


def test_an_indirect_table_that_was_not_negotiated_breaks_the_device(new_disk: Callable[..., Disk]) -> None:
    disk = new_disk()
    start(disk, reg.F_VERSION_1)
    disk.driver.send([(TABLE_GPA, 48, INDIRECT)])
    require_broken_then_reset(disk)


@pytest.mark.parametrize("at", [16, 0xFFFF])
def test_a_descriptor_outside_of_the_table_breaks_the_device(new_disk: Callable[..., Disk], at: int) -> None:
    disk = new_disk()
    start(disk)
    disk.driver.put(0x10000, struct.pack("<QIHH", DATA_GPA, 16, NEXT, at))
    disk.driver.expose(0)
    disk.driver.kick()
    require_broken_then_reset(disk)


def test_a_head_outside_of_the_table_breaks_the_device(new_disk: Callable[..., Disk]) -> None:
    disk = new_disk()
    start(disk)
    disk.driver.expose(16)
    disk.driver.kick()
    require_broken_then_reset(disk)


def test_an_available_index_that_jumps_breaks_the_device(new_disk: Callable[..., Disk]) -> None:
    disk = new_disk()
    start(disk)
    disk.driver.write_chain([HEADER, STATUS])
    disk.driver.put(AVAIL_GPA + 2, struct.pack("<H", 17))
    disk.driver.kick()
    require_broken_then_reset(disk)


@pytest.mark.parametrize(
    "rings",
    [
        {"desc": MEMORY_BYTES - 128},
        {"avail": MEMORY_BYTES - 32},
        {"used": MEMORY_BYTES - 64},
        {"desc": 2**64 - 16},
        {"desc": 0x10008},
        {"avail": 0x11001},
        {"used": 0x12002},
    ],
)
def test_a_ring_that_cannot_be_never_gets_ready(new_disk: Callable[..., Disk], rings: dict[str, int]) -> None:
    disk = new_disk()
    disk.driver.negotiate(ALL)
    disk.driver.set_up_queue(**rings)
    assert disk.driver.get(reg.QUEUE_READY) == 0
    assert disk.driver.get(reg.STATUS) & reg.NEEDS_RESET


def test_a_buffer_over_the_hole_between_two_slots_breaks_the_device(new_disk: Callable[..., Disk]) -> None:
    disk = new_disk(memory_bytes=(3 << 30) + (1 << 20))
    start(disk)
    disk.driver.send([HEADER, (HOLE_START - 512, 1024, WRITE), STATUS])
    require_broken_then_reset(disk)


def test_a_buffer_above_the_hole_is_marked_in_its_slot(new_disk: Callable[..., Disk]) -> None:
    disk = new_disk(memory_bytes=(3 << 30) + (1 << 20))
    start(disk)
    disk.driver.log.start()
    disk.driver.synced()
    assert disk.request(0, 0, into=512, at=HOLE_END + 4096) == 0
    assert HOLE_END + 4096 >> 12 in disk.driver.synced()
    disk.driver.log.stop()
