"""What stands before the tests of devices: a disk of 1 MiB with its driver, guest memory, a console with its user."""

from __future__ import annotations

import random
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvmigrate.devices.virtio.block import VirtioBlock
from kvmigrate.devices.virtio.image import DiskImage, open_disk
from kvmigrate.memory.region import GuestMemory

from .driver import DATA_GPA, WRITE, Buffer, Driver, block_header
from .port import Pipes, Port, console_at
from .queues import MEMORY_BYTES

DISK_BYTES = 1 << 20
SMALL_BYTES = 256 << 10
"""What the small file system takes of a disk."""
STATUS_GPA = DATA_GPA + 0x8000
READ_GPA = DATA_GPA + 0x10000


class Disk:
    """One disk: its image's path, its device and its driver."""

    def __init__(self, path: Path, read_only: bool = False, memory_bytes: int = 1 << 20) -> None:
        self.path = path
        self.memory = GuestMemory(memory_bytes)
        self.image: DiskImage = open_disk("root", path, read_only)
        self.device = VirtioBlock(self.memory, self.image)
        self.driver = Driver(self.memory, self.device)

    def request(
        self,
        kind: int,
        sector: int,
        data: bytes = b"",
        into: int = 0,
        *,
        at: int = READ_GPA,
        indirect: bool = False,
    ) -> int:
        """One request with ``data`` for the device, or with room for ``into`` bytes at ``at``; returns its status."""
        self.driver.put(DATA_GPA, block_header(kind, sector) + data)
        self.driver.put(STATUS_GPA, b"\xff")
        buffers: list[Buffer] = [(DATA_GPA, 16, 0)]
        buffers += [(DATA_GPA + 16, len(data), 0)] if data else []
        buffers += [(at, into, WRITE)] if into else []
        self.driver.send([*buffers, (STATUS_GPA, 1, WRITE)], indirect=indirect)
        self.driver.wait_used()
        return self.driver.take(STATUS_GPA, 1)[0]

    def close(self) -> None:
        self.device.close()
        self.image.close()
        self.memory.close()


@pytest.fixture
def image_path(tmp_path: Path) -> Path:
    path = tmp_path / "root.img"
    path.write_bytes(random.Random(1).randbytes(DISK_BYTES))
    return path


@pytest.fixture
def new_disk(image_path: Path) -> Iterator[Callable[..., Disk]]:
    disks: list[Disk] = []

    def make(path: Path = image_path, **options: object) -> Disk:
        disks.append(Disk(path, **options))  # type: ignore[arg-type]
        return disks[-1]

    yield make
    for disk in disks:
        disk.close()


@pytest.fixture
def disk(new_disk: Callable[..., Disk]) -> Disk:
    made = new_disk()
    made.driver.start()
    return made


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    with GuestMemory(MEMORY_BYTES) as memory:
        yield memory


@pytest.fixture
def pipes() -> Iterator[Pipes]:
    pipes = Pipes()
    yield pipes
    pipes.close()


@pytest.fixture
def port(memory: GuestMemory, pipes: Pipes) -> Iterator[Port]:
    with console_at(memory, pipes) as port:
        yield port


class SmallMount:
    """A file system of SMALL_BYTES in a mount namespace of its own, where ``run`` executes a command of the shell."""

    def __init__(self) -> None:
        command = ["unshare", "--map-root-user", "--mount", "sh"]
        self._shell = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        mounted = self.run(f"mount -t tmpfs -o size={SMALL_BYTES} small /mnt 2>/dev/null && echo yes || echo no")
        self.path = Path(f"/proc/{self._shell.pid}/root", "mnt")
        self.is_there = mounted == "yes"

    def run(self, command: str) -> str:
        """The one line that ``command`` writes; empty when there is no shell."""
        assert self._shell.stdin is not None and self._shell.stdout is not None
        try:
            self._shell.stdin.write(f"{command}\n")
            self._shell.stdin.flush()
        except BrokenPipeError:
            return ""
        return self._shell.stdout.readline().strip()

    def close(self) -> None:
        self._shell.kill()
        self._shell.communicate()


@pytest.fixture
def small_mount() -> Iterator[SmallMount]:
    if shutil.which("unshare") is None:
        pytest.skip("there is no unshare(1)")
    made = SmallMount()
    try:
        if not made.is_there:
            pytest.skip("this process may not mount a file system of its own")
        yield made
    finally:
        made.close()
