"""The registers of virtio-mmio, interrupts, and a device's state on its way to another device."""

from __future__ import annotations

import resource
import struct
from collections.abc import Callable
from typing import Any

import pytest

from kvmigrate.devices.virtio import registers as reg
from kvmigrate.devices.virtio.rng import VirtioRng
from kvmigrate.errors import BadField
from kvmigrate.memory.region import GuestMemory

from ..conftest import wait_until
from .conftest import DISK_BYTES, READ_GPA, STATUS_GPA, Disk
from .driver import AVAIL_GPA, DATA_GPA, USED_GPA, WRITE, Driver, block_header

EVENT_IDX = reg.F_VERSION_1 | reg.F_EVENT_IDX


def test_the_device_says_what_it_is(new_disk: Callable[..., Disk]) -> None:
    driver = new_disk().driver
    assert [driver.get(at) for at in (0, 4, 8)] == [0x74726976, 2, 2]
    assert driver.get(0x34) == 256
    assert driver.get(0x100) | driver.get(0x104) << 32 == DISK_BYTES // 512
    assert driver.device.read(0x100, 1) == DISK_BYTES // 512 & 0xFF
    driver.set(reg.QUEUE_SEL, 1)
    assert driver.get(0x34) == 0


@pytest.mark.parametrize("features", [0, reg.F_EVENT_IDX, reg.F_VERSION_1 | 1 << 35, reg.F_VERSION_1 | 1 << 12])
def test_features_that_were_not_offered_are_not_accepted(new_disk: Callable[..., Disk], features: int) -> None:
    driver = new_disk().driver
    driver.negotiate(features)
    assert driver.get(reg.STATUS) == 3
    driver.set(reg.STATUS, 15)
    assert not driver.get(reg.STATUS) & reg.DRIVER_OK


def test_nothing_is_served_before_driver_ok(new_disk: Callable[..., Disk]) -> None:
    disk = new_disk()
    disk.device.resume()
    disk.driver.negotiate(reg.F_VERSION_1)
    disk.driver.set_up_queue()
    disk.driver.put(DATA_GPA, block_header(0, 0))
    disk.driver.send([(DATA_GPA, 16, 0), (READ_GPA, 513, WRITE)])
    assert not disk.driver.interrupted(0.05)
    assert disk.driver.used_idx == 0
    disk.driver.set(reg.STATUS, 15)
    assert disk.driver.wait_used() == (0, 513)


def test_an_interrupt_is_there_until_it_is_acknowledged(disk: Disk) -> None:
    assert disk.request(0, 0, into=512) == 0
    assert disk.driver.interrupted()
    assert disk.driver.get(reg.INTERRUPT_STATUS) == 1
    disk.driver.set(reg.INTERRUPT_ACK, 1)
    assert disk.driver.get(reg.INTERRUPT_STATUS) == 0


def test_a_driver_that_wants_no_interrupt_gets_none(disk: Disk) -> None:
    disk.driver.put(AVAIL_GPA, struct.pack("<H", 1))
    assert disk.request(0, 0, into=512) == 0
    assert not disk.driver.interrupted(0.05)


def test_the_event_index_says_when_to_interrupt(new_disk: Callable[..., Disk]) -> None:
    disk = new_disk()
    disk.driver.start(EVENT_IDX)
    interrupts = []
    # "Interrupt me when used element 2 is there": the first one of a device always comes, since it knows nothing yet.
    disk.driver.put(AVAIL_GPA + 4 + 2 * 16, struct.pack("<H", 2))
    for _ in range(4):
        assert disk.request(0, 0, into=512) == 0
        interrupts.append(disk.driver.interrupted(0.05))
    assert interrupts == [True, False, True, False]


def test_the_device_asks_for_the_next_kick(new_disk: Callable[..., Disk]) -> None:
    disk = new_disk()
    disk.driver.start(EVENT_IDX)
    for _ in range(3):
        assert disk.request(0, 0, into=512) == 0
    disk.device.pause()
    assert struct.unpack("<H", disk.driver.take(USED_GPA + 4 + 8 * 16, 2)) == (3,)


def test_a_paused_device_serves_nothing_and_loses_nothing(disk: Disk) -> None:
    disk.device.pause()
    disk.driver.put(DATA_GPA, block_header(0, 0))
    disk.driver.send([(DATA_GPA, 16, 0), (READ_GPA, 513, WRITE)])
    assert not disk.driver.interrupted(0.05)
    assert disk.driver.used_idx == 0
    disk.device.resume()
    assert disk.driver.wait_used() == (0, 513)


def move(disk: Disk, to: Disk) -> None:
    """Save here, load there, with memory as it is."""
    disk.device.pause()
    to.memory.write(0, disk.memory.read(0, 1 << 20))
    to.device.load(disk.device.save())
    assert to.device.save() == disk.device.save()
    to.driver.avail_idx, to.driver.used_seen = disk.driver.avail_idx, disk.driver.used_seen


def test_a_device_goes_on_elsewhere_in_the_middle_of_its_work(new_disk: Callable[..., Disk]) -> None:
    disk, other = new_disk(), new_disk()
    disk.driver.start(EVENT_IDX)
    for _ in range(20):
        assert disk.request(0, 0, into=512) == 0
    disk.device.pause()
    # Exposed to the paused source, whose kick does not move: the destination looks by itself.
    disk.driver.put(DATA_GPA, block_header(0, 5))
    disk.driver.send([(DATA_GPA, 16, 0), (READ_GPA, 512, WRITE), (STATUS_GPA, 1, WRITE)])
    move(disk, other)
    other.device.resume()
    assert other.driver.wait_used() == (0, 513)
    assert other.driver.take(READ_GPA, 512) == disk.path.read_bytes()[5 * 512 :][:512]
    assert disk.driver.used_idx == 20
    assert other.request(0, 0, into=512) == 0


def test_an_interrupt_that_was_not_taken_comes_again_elsewhere(new_disk: Callable[..., Disk]) -> None:
    disk, other = new_disk(), new_disk()
    disk.driver.start()
    assert disk.request(0, 0, into=512) == 0
    move(disk, other)
    other.device.resume()
    assert other.driver.interrupted()
    assert other.driver.get(reg.INTERRUPT_STATUS) == 1


def in_use(disk: Disk) -> dict[str, Any]:
    disk.driver.start()
    disk.device.pause()
    return disk.device.save()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("status", 64),
        ("status", 16),
        ("status", 256),
        ("status", 7),
        ("driver_features", 0),
        ("driver_features", reg.F_VERSION_1 | 1 << 40),
        ("isr", 4),
        ("broken", 0),
        ("nr_sectors", 1),
        ("read_only", True),
        ("queues", []),
        ("queues", [{}]),
        ("more", 1),
    ],
)
def test_a_field_that_cannot_be_is_refused_and_changes_nothing(
    new_disk: Callable[..., Disk], field: str, value: Any
) -> None:
    good = in_use(new_disk())
    other = new_disk()
    before = other.device.save()
    with pytest.raises(BadField):
        other.device.load(good | {field: value})
    assert other.device.save() == before


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("size", 0),
        ("size", 12),
        ("size", 512),
        ("ready", 2),
        ("desc", 1 << 40),
        ("desc", 0x10001),
        ("avail", (1 << 20) - 16),
        ("used", 2**64 - 4),
        ("last_avail", 17),
        ("used_idx", 1),
        ("more", 1),
    ],
)
def test_a_queue_that_cannot_be_is_refused_and_changes_nothing(
    new_disk: Callable[..., Disk], field: str, value: int
) -> None:
    good = in_use(new_disk())
    other = new_disk()
    before = other.device.save()
    with pytest.raises(BadField):
        other.device.load(good | {"queues": [good["queues"][0] | {field: value}]})
    assert other.device.save() == before


def test_registers_that_are_not_there_and_odd_accesses_do_nothing(disk: Disk) -> None:
    before = disk.device.save()
    for offset in range(0, 0x200):
        for size in (1, 2, 4):
            disk.device.read(offset, size)
            if offset not in (reg.STATUS, reg.QUEUE_READY, 0x14, 0x24, 0x30, reg.INTERRUPT_ACK):
                disk.device.write(offset, size, 0xFFFFFFFF)
    assert disk.device.save() == before


def test_the_entropy_device_fills_the_buffer_and_marks_its_pages() -> None:
    memory = GuestMemory(1 << 20)
    device = VirtioRng(memory)
    driver = Driver(memory, device).start()
    driver.log.start()
    driver.synced()
    driver.send([(READ_GPA, 6000, WRITE)])
    assert driver.wait_used() == (0, 6000)
    drawn = driver.take(READ_GPA, 6000)
    assert drawn.count(0) < 600
    assert driver.take(READ_GPA + 6000, 64) == bytes(64)
    assert driver.synced() == {USED_GPA >> 12, READ_GPA >> 12, (READ_GPA >> 12) + 1}
    driver.log.stop()
    device.close()
    memory.close()


def test_a_device_has_a_thread_from_its_first_driver_on(new_disk: Callable[..., Disk]) -> None:
    disk = new_disk()
    assert disk.device._thread is None
    disk.driver.start()
    thread = disk.device._thread
    assert thread is not None and thread.is_alive()
    disk.driver.set(reg.STATUS, 0)
    disk.driver.start()
    assert disk.device._thread is thread, "the next driver finds the same one"
    disk.device.close()
    assert not thread.is_alive()


def test_a_device_whose_thread_dies_is_broken_for_good_and_says_so(
    new_disk: Callable[..., Disk], capfd: pytest.CaptureFixture[str]
) -> None:
    disk = new_disk()
    disk.driver.start()
    assert disk.device._thread is not None
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    # poll(2) of more descriptors than a process may have is EINVAL.
    resource.setrlimit(resource.RLIMIT_NOFILE, (1, limits[1]))
    try:
        disk.driver.set(reg.QUEUE_NOTIFY, 0)
        wait_until(lambda: bool(disk.driver.get(reg.STATUS) & reg.NEEDS_RESET), "the device is broken")
        disk.device._thread.join(10)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert not disk.device._thread.is_alive()
    assert disk.driver.get(reg.INTERRUPT_STATUS) & 2, "the driver is told by a configuration interrupt"
    assert "root: Invalid argument: the device has stopped" in capfd.readouterr().err
    disk.driver.set(reg.STATUS, 0)
    assert disk.driver.get(reg.STATUS) == reg.NEEDS_RESET, "a reset does not mend it"
    disk.device.pause()
    assert disk.device.save()["broken"] is True
