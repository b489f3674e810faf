"""The block device does to its image what the driver asks, and says so when it cannot."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable

import pytest

from kvmigrate.devices.virtio import registers as reg
from kvmigrate.devices.virtio.block import F_DISCARD, F_RO
from kvmigrate.devices.virtio.image import open_disk
from kvmigrate.errors import HostError
from tests.devices.conftest import wait_until

from .conftest import DISK_BYTES, READ_GPA, SMALL_BYTES, STATUS_GPA, Disk, SmallMount
from .driver import DATA_GPA, WRITE, block_header

IN, OUT, FLUSH, GET_ID, DISCARD, ZEROES = 0, 1, 4, 8, 11, 13
OK, IOERR, UNSUPP = 0, 1, 2
NR_SECTORS = DISK_BYTES // 512
BOTH = reg.F_VERSION_1 | reg.F_INDIRECT_DESC


def test_a_read_brings_the_images_bytes(disk: Disk) -> None:
    assert disk.request(IN, 7, into=4096) == OK
    assert disk.driver.take(READ_GPA, 4096) == disk.path.read_bytes()[7 * 512 :][:4096]


def test_a_write_changes_only_its_sectors(disk: Disk) -> None:
    before = disk.path.read_bytes()
    assert disk.request(OUT, 3, b"x" * 1024) == OK
    assert disk.path.read_bytes() == before[:1536] + b"x" * 1024 + before[2560:]
    assert disk.request(FLUSH, 0) == OK


def test_an_indirect_request_is_served(new_disk: Callable[..., Disk]) -> None:
    disk = new_disk()
    disk.driver.start(BOTH)
    assert disk.request(IN, NR_SECTORS - 1, into=512, indirect=True) == OK
    assert disk.driver.take(READ_GPA, 512) == disk.path.read_bytes()[-512:]


def test_a_header_cut_into_pieces_is_read_whole(disk: Disk) -> None:
    disk.driver.put(DATA_GPA, block_header(IN, 2))
    pieces = [(DATA_GPA, 3, 0), (DATA_GPA + 3, 13, 0), (READ_GPA, 100, WRITE), (READ_GPA + 100, 413, WRITE)]
    disk.driver.send(pieces)
    assert disk.driver.wait_used() == (0, 513)
    assert disk.driver.take(READ_GPA, 513) == disk.path.read_bytes()[1024:1536] + b"\0"


@pytest.mark.parametrize(
    ("sector", "size"), [(NR_SECTORS, 512), (NR_SECTORS - 1, 1024), (2**64 - 1, 512), (2**55, 512), (0, 100)]
)
def test_what_is_not_on_the_disk_is_an_error(disk: Disk, sector: int, size: int) -> None:
    assert disk.request(IN, sector, into=size) == IOERR
    assert disk.request(OUT, sector, b"x" * size) == IOERR
    assert disk.path.stat().st_size == DISK_BYTES


def test_a_read_only_disk_takes_no_write(new_disk: Callable[..., Disk]) -> None:
    disk = new_disk(read_only=True)
    disk.driver.start()
    assert disk.device.offered & (F_RO | F_DISCARD) == F_RO
    assert disk.request(OUT, 0, b"x" * 512) == IOERR
    assert disk.request(IN, 0, into=512) == OK


def test_an_unknown_request_is_unsupported(disk: Disk) -> None:
    assert disk.request(99, 0) == UNSUPP


def test_the_disks_name_is_its_id(disk: Disk) -> None:
    assert disk.request(GET_ID, 0, into=20) == OK
    assert disk.driver.take(READ_GPA, 20) == b"root".ljust(20, b"\0")
    assert disk.request(GET_ID, 0, into=5) == IOERR


def test_discarded_sectors_read_as_zeros_and_take_no_room(disk: Disk) -> None:
    room = disk.path.stat().st_blocks
    assert disk.request(DISCARD, 0, struct.pack("<QII", 8, 1024, 0)) == OK
    assert disk.path.read_bytes()[8 * 512 :][: 1024 * 512] == bytes(1024 * 512)
    assert disk.path.stat().st_blocks < room
    assert disk.path.stat().st_size == DISK_BYTES


@pytest.mark.parametrize("unmap", [0, 1])
def test_zeros_are_written(disk: Disk, unmap: int) -> None:
    before = disk.path.read_bytes()
    assert disk.request(ZEROES, 0, struct.pack("<QII", 1, 3, unmap)) == OK
    assert disk.path.read_bytes() == before[:512] + bytes(3 * 512) + before[4 * 512 :]


@pytest.mark.parametrize(
    ("segment", "status"),
    [((NR_SECTORS, 1, 0), IOERR), ((2**64 - 1, 2, 0), IOERR), ((0, 0xFFFFFFFF, 0), IOERR), ((0, 1, 1), UNSUPP)],
)
def test_a_discard_that_cannot_be_is_refused(disk: Disk, segment: tuple[int, int, int], status: int) -> None:
    assert disk.request(DISCARD, 0, struct.pack("<QII", *segment)) == status
    assert disk.request(DISCARD, 0, b"short") == IOERR


def test_a_full_file_system_fails_the_writes_that_need_room_and_is_told_of_once(
    new_disk: Callable[..., Disk], small_mount: SmallMount, capfd: pytest.CaptureFixture[str]
) -> None:
    path = small_mount.path / "root.img"
    with path.open("wb") as image:
        image.truncate(DISK_BYTES)
    disk = new_disk(path)
    disk.driver.start()
    size = 16 << 10
    answers = [disk.request(OUT, at // 512, b"x" * size) for at in range(0, DISK_BYTES, size)]
    fitting = answers.index(IOERR)
    assert 0 < fitting <= SMALL_BYTES // size
    assert answers == [OK] * fitting + [IOERR] * (len(answers) - fitting)
    wait_until(lambda: bool(disk.device.told), "the host is told")
    assert disk.request(OUT, 0, b"y" * size) == OK, "what has room already is written"
    assert disk.request(IN, 0, into=512) == OK
    assert disk.driver.take(READ_GPA, 512) == b"y" * 512
    told = capfd.readouterr().err.splitlines()
    assert told == [f"kvmigrate: disk root: {path}: No space left on device: the guest got an I/O error"]


def test_a_disk_on_a_read_only_file_system_is_refused_with_what_to_do(small_mount: SmallMount) -> None:
    path = small_mount.path / "root.img"
    path.write_bytes(bytes(512))
    assert small_mount.run("mount -o remount,ro /mnt && echo done") == "done"
    with pytest.raises(HostError, match=f"disk root: {path}: Read-only file system.*,ro"):
        open_disk("root", path)
    open_disk("root", path, read_only=True).close()


def test_a_file_that_shrank_is_an_error_and_does_not_grow_again(disk: Disk, capfd: pytest.CaptureFixture[str]) -> None:
    os.truncate(disk.path, 4096)
    assert disk.request(IN, 64, into=512) == IOERR
    assert disk.request(OUT, 64, b"x" * 512) == IOERR
    assert disk.request(DISCARD, 0, struct.pack("<QII", 64, 1, 0)) == IOERR
    assert disk.path.stat().st_size == 4096
    assert disk.request(IN, 0, into=4096) == OK, "what is left of it can be read"
    wait_until(lambda: bool(disk.device.told), "the host is told")
    [told] = capfd.readouterr().err.splitlines()
    assert told.startswith(f"kvmigrate: disk root: {disk.path}: is shorter than when the guest found it")


def test_a_guest_that_asks_for_what_is_not_there_is_not_the_hosts_affair(
    disk: Disk, capfd: pytest.CaptureFixture[str]
) -> None:
    assert disk.request(IN, NR_SECTORS, into=512) == IOERR
    assert disk.request(IN, 0, into=512) == OK
    assert capfd.readouterr().err == ""


def test_every_page_that_the_device_wrote_is_in_the_next_sync(disk: Disk) -> None:
    disk.driver.log.start()
    disk.driver.synced()
    assert disk.request(IN, 0, into=3 * 4096 - 512, at=READ_GPA + 256) == OK
    ring = 0x12000
    assert disk.driver.synced() == {ring >> 12, STATUS_GPA >> 12, *range(READ_GPA >> 12, (READ_GPA >> 12) + 3)}
    disk.driver.log.stop()


def test_a_full_batch_of_requests_is_served_in_order(disk: Disk) -> None:
    for at in range(5):
        disk.driver.put(DATA_GPA + 32 * at, block_header(IN, at))
        disk.driver.write_chain([(DATA_GPA + 32 * at, 16, 0), (READ_GPA + 1024 * at, 513, WRITE)], first=2 * at)
        disk.driver.expose(2 * at)
    disk.driver.kick()
    assert [disk.driver.wait_used()[0] for _ in range(5)] == [0, 2, 4, 6, 8]
    content = disk.path.read_bytes()
    for at in range(5):
        assert disk.driver.take(READ_GPA + 1024 * at, 512) == content[512 * at : 512 * at + 512]
