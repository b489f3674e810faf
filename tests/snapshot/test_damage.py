"""Damage anywhere in a snapshot: the loader refuses what it reads, and the checker says what is wrong where."""

from __future__ import annotations

import errno
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from kvmigrate.config import PAGE_BYTES
from kvmigrate.errors import SnapshotError
from kvmigrate.snapshot.inspect import inspect
from kvmigrate.snapshot.load import restore
from kvmigrate.snapshot.save import take
from kvmigrate.snapshot.verify import Finding, verify
from kvmigrate.state import frame
from tests.snapshot.tools import RAW, ZSTD, Guest, build, guest, page

NR_PAGES = 1027


def make(directory: Path, compressed: bool) -> None:
    with guest(NR_PAGES * PAGE_BYTES) as machine:
        machine.fill(70)
        machine.write(page(70), b"compresses well " * 256 * 62)
        machine.fill(3, seed=2, first=NR_PAGES - 3)
        if compressed:
            machine.write(page(600), b"compresses, too " * 256 * 200)
        take(machine, directory, ZSTD if compressed else RAW)


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    parent = tmp_path_factory.mktemp("originals")
    make(parent / "raw", compressed=False)
    make(parent / "zstd", compressed=True)
    return parent


@pytest.fixture(params=["raw", "zstd"])
def snapshot(request: pytest.FixtureRequest, originals: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(originals / request.param, tmp_path / "s"))


@pytest.fixture
def raw(originals: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(originals / "raw", tmp_path / "raw"))


@pytest.fixture
def zstd(originals: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(originals / "zstd", tmp_path / "zstd"))


class Built:
    """A builder that remembers what it built."""

    def __init__(self) -> None:
        self.machines: list[Guest] = []

    def __call__(self, description: object) -> Guest:
        self.machines.append(build(description))  # type: ignore[arg-type]
        return self.machines[-1]


def assert_refused(directory: Path, file: str) -> str:
    """The loader refuses with one line that names the file, and leaves no machine open."""
    built = Built()
    with pytest.raises(SnapshotError) as raised:
        restore(directory, built)
    assert all(machine.closed for machine in built.machines)
    text = str(raised.value)
    assert "\n" not in text and str(directory / file) in text
    return text


def frame_starts(data: bytes) -> list[int]:
    starts, at = [], 0
    while at < len(data):
        starts.append(at)
        at += 32 + frame.decode_header(data[at : at + 32]).length
    return starts


def flip(path: Path, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(bit // 8)
        byte = file.read(1)[0]
        file.seek(bit // 8)
        file.write(bytes([byte ^ 1 << bit % 8]))


def hashes(directory: Path) -> list[bytes]:
    """Every page of what the loader makes of it."""
    machine = restore(directory, build).machine
    try:
        return machine.memory.hash_all()
    finally:
        machine.close()


def findings_in(directory: Path, file: str) -> list[Finding]:
    return [found for found in verify(directory).findings if found.file == file]


def test_every_truncation_of_state_is_refused_and_found(zstd: Path) -> None:
    path = zstd / "state"
    whole = path.read_bytes()
    starts = frame_starts(whole)
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        assert_refused(zstd, "state")
        found = findings_in(zstd, "state")
        assert found, f"cut to {length} bytes"
        # Where it was cut, or the frame that is cut.
        last_start = max((start for start in starts if start <= length), default=0)
        assert last_start <= found[0].offset <= length


def test_every_flipped_byte_of_state_is_refused_and_found_in_its_frame(zstd: Path) -> None:
    path = zstd / "state"
    whole = path.read_bytes()
    starts = [*frame_starts(whole), len(whole)]
    rng = random.Random(1)
    for at in range(len(whole)):
        bit = at * 8 + rng.randrange(8)
        flip(path, bit)
        assert_refused(zstd, "state")
        begin = max(start for start in starts if start <= at)
        end = min(start for start in starts if start > at)
        found = findings_in(zstd, "state")
        assert found and begin <= found[0].offset < end, (at, found)
        flip(path, bit)
    assert verify(zstd).ok


def test_flips_in_raw_pages_are_found_in_their_chunk(raw: Path) -> None:
    rng = random.Random(2)
    for number in (0, 1, 63, 64, 131, NR_PAGES - 3, NR_PAGES - 1):
        bit = page(number) * 8 + rng.randrange(PAGE_BYTES * 8)
        flip(raw / "memory.raw", bit)
        chunk_start = page(number // 64 * 64)
        found = findings_in(raw, "memory.raw")
        assert [f.offset for f in found if "chunk" in f.what] == [chunk_start]
        assert any("digest" in f.what for f in found)
        flip(raw / "memory.raw", bit)
    assert verify(raw).ok


def test_a_byte_in_a_hole_is_found(raw: Path) -> None:
    flip(raw / "memory.raw", page(500) * 8)
    assert findings_in(raw, "memory.raw")[0].offset == page(448)


def test_a_page_that_became_a_hole_is_found(raw: Path) -> None:
    data = (raw / "memory.raw").read_bytes()
    with (raw / "memory.raw").open("r+b") as file:
        file.truncate(page(64))
        file.truncate(len(data))
        file.seek(page(128))
        file.write(data[page(128) :])
    found = findings_in(raw, "memory.raw")
    assert found[0].offset == page(64) and "chunk" in found[0].what
    # The pages around it are told from it.
    assert len([f for f in found if "chunk" in f.what]) == 1


def test_two_pages_that_changed_places_are_found(raw: Path) -> None:
    with (raw / "memory.raw").open("r+b") as file:
        first, second = file.read(PAGE_BYTES), file.read(PAGE_BYTES)
        file.seek(0)
        file.write(second + first)
    assert findings_in(raw, "memory.raw")[0].offset == 0


def test_damage_in_several_places_is_told_in_one_report(raw: Path) -> None:
    flip(raw / "memory.raw", 8)
    flip(raw / "memory.raw", page(130) * 8)
    starts = frame_starts((raw / "state").read_bytes())
    flip(raw / "state", (starts[2] + 40) * 8)
    (raw / "notes").write_text("")
    found = verify(raw).findings
    chunks = [f.offset for f in found if f.file == "memory.raw" and "chunk" in f.what]
    assert chunks == [0, page(128)]
    assert [f.offset for f in found if f.file == "state"] == [starts[2] + 32]
    assert [f.file for f in found if "does not belong" in f.what] == ["notes"]


@pytest.mark.parametrize("change", [-PAGE_BYTES, -1, 1, PAGE_BYTES])
def test_memory_file_of_another_size_is_refused_and_found(snapshot: Path, change: int) -> None:
    path = next(snapshot.glob("memory.*"))
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(size + change)
    assert f"has {size + change} bytes, the index says {size}" in assert_refused(snapshot, path.name)
    assert any(f"has {size + change} bytes" in f.what for f in findings_in(snapshot, path.name))


def test_flipped_bytes_of_frames_are_refused_and_found(zstd: Path) -> None:
    """Sampled: all headers and tables, and some of the data. A flip that zstd does not mind changes no page."""
    good = hashes(zstd)
    path = zstd / "memory.frames"
    whole = path.read_bytes()
    rng = random.Random(3)
    starts = frame_starts(whole)
    assert len(starts) > 1
    head = {at + n for at in starts for n in range(64)}
    data = set(range(len(whole))) - head
    for at in sorted(head | set(rng.sample(sorted(data), 150)) | set(sorted(data)[-400:])):
        bit = at * 8 + rng.randrange(8)
        flip(path, bit)
        if findings_in(zstd, "memory.frames"):
            assert_refused(zstd, "memory.frames")
        else:
            assert at in data and hashes(zstd) == good
        flip(path, bit)
    assert verify(zstd).ok


def replace_by_link(path: Path) -> None:
    path.rename(path.parent.parent / "elsewhere")
    path.symlink_to(path.parent.parent / "elsewhere")


def replace_by_fifo(path: Path) -> None:
    path.unlink()
    subprocess.run(["mkfifo", str(path)], check=True)


def replace_by_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    "replace", [Path.unlink, replace_by_link, replace_by_fifo, replace_by_directory], ids=lambda f: f.__name__
)
@pytest.mark.parametrize("file", ["state", "memory"])
def test_odd_files_are_refused_and_found(snapshot: Path, file: str, replace: Callable[[Path], None]) -> None:
    path = next(snapshot.glob(f"{file}*"))
    replace(path)
    assert_refused(snapshot, path.name)
    assert findings_in(snapshot, path.name)


@pytest.mark.parametrize("content", [b"", b"QEVM" + bytes(100), b"KVMG", bytes(4096), b"\x7fELF" + bytes(60)])
def test_foreign_state_is_refused_and_found(raw: Path, content: bytes) -> None:
    (raw / "state").write_bytes(content)
    assert_refused(raw, "state")
    assert findings_in(raw, "state")[0].offset == 0


@pytest.mark.parametrize("file", ["state", "memory"])
def test_bad_sector_is_told_with_its_place_and_refused(
    snapshot: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    path = next(snapshot.glob(f"{file}*"))
    inode = path.stat().st_ino
    pread = os.pread

    def bad_sector(fd: int, length: int, offset: int) -> bytes:
        if os.fstat(fd).st_ino == inode and offset <= 200 < offset + length:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return pread(fd, length, offset)

    monkeypatch.setattr(os, "pread", bad_sector)
    found = verify(snapshot).findings
    unread = [f for f in found if "Input/output error" in f.what]
    assert [f.file for f in unread] == [path.name] and unread[0].offset <= 200
    if path.name != "memory.raw":
        assert "Input/output error" in assert_refused(snapshot, path.name)


def test_directory_that_is_no_snapshot_is_told_as_such(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "none", tmp_path / "file"):
        for read in (lambda path: restore(path, build), inspect):
            with pytest.raises(SnapshotError, match="name the directory of a snapshot"):
                read(place)
        assert not verify(place).ok
    assert "is it a whole snapshot?" in assert_refused(tmp_path, "state")


def test_checker_shares_no_code_with_what_it_checks() -> None:
    script = (
        "import sys, kvmigrate.snapshot.verify\n"
        "mine = ('kvmigrate', 'msgpack', '_cffi_backend')\n"
        "print(*sorted(name for name in sys.modules if name.startswith(mine)))"
    )
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    assert loaded == [
        "kvmigrate",
        "kvmigrate.snapshot",
        "kvmigrate.snapshot.verify",
        "kvmigrate.snapshot.verify_frames",
        "kvmigrate.snapshot.verify_memory",
    ]
