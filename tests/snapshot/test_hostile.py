"""Snapshots whose checksums hold and whose contents lie: refused before anything is allocated, mapped or written."""

from __future__ import annotations

import copy
import shutil
import struct
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import xxhash
import zstandard

from kvmigrate.config import PAGE_BYTES
from kvmigrate.errors import RestoreRefused, SnapshotError
from kvmigrate.snapshot import statefile
from kvmigrate.snapshot.load import restore
from kvmigrate.snapshot.save import take
from kvmigrate.snapshot.statefile import opened, read_state
from kvmigrate.snapshot.verify import verify
from kvmigrate.state import frame, section
from kvmigrate.state.frame import FrameKind
from kvmigrate.state.section import Section
from tests.fake_machine import MIB
from tests.snapshot.tools import RAW, ZSTD, Guest, RawFrame, build, edit, guest, page, read_frames, restored

HELLO, CONFIG, CPU0, SERIAL0, INDEX, HASHES, END = range(7)
Change = Callable[[list[RawFrame]], None]


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    parent = tmp_path_factory.mktemp("originals")
    with guest(8 * MIB) as machine:
        machine.fill(200)
        take(machine, parent / "raw", RAW)
        machine.write(page(300), b"squeeze " * 512 * 20)
        take(machine, parent / "zstd", ZSTD)
    return parent


@pytest.fixture
def raw(originals: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(originals / "raw", tmp_path / "raw"))


@pytest.fixture
def zstd(originals: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(originals / "zstd", tmp_path / "zstd"))


def must_not_build(description: object) -> Guest:
    raise AssertionError("a machine was built from a bad snapshot")


def setting(at: int, key: str, value: object) -> Change:
    def change(frames: list[RawFrame]) -> None:
        frames[at].value[key] = value

    return change


def describing(key: str, value: object) -> Change:
    def change(frames: list[RawFrame]) -> None:
        frames[CONFIG].value["description"][key] = value

    return change


def slots_everywhere(slots: list[list[int]]) -> Change:
    def change(frames: list[RawFrame]) -> None:
        frames[CONFIG].value["description"]["slots"] = slots
        frames[INDEX].value["slots"] = slots

    return change


def dropping(at: int) -> Change:
    return lambda frames: frames.__delitem__(at)


def doubling(at: int) -> Change:
    return lambda frames: frames.insert(at, copy.deepcopy(frames[at]))


def inserting(at: int, kind: int, *, mandatory: bool) -> Change:
    return lambda frames: frames.insert(at, RawFrame(kind, {"x": 1}, mandatory))


def swapping(a: int, b: int) -> Change:
    def change(frames: list[RawFrame]) -> None:
        frames[a], frames[b] = frames[b], frames[a]

    return change


LIES: dict[str, tuple[Change, str]] = {
    "later format": (setting(HELLO, "format", 2), "format 2"),
    "format of another type": (setting(HELLO, "format", "1"), "format"),
    "year 300000": (setting(HELLO, "created_ms", 1 << 53), "created_ms"),
    "no hello": (dropping(HELLO), "HELLO"),
    "no config": (dropping(CONFIG), "CONFIG"),
    "no index": (dropping(INDEX), "MEMORY_INDEX"),
    "no hashes": (dropping(HASHES), "hashes"),
    "no end": (dropping(END), "too early"),
    "two hellos": (doubling(HELLO), "CONFIG"),
    "two indexes": (doubling(INDEX), "MEMORY_INDEX"),
    "two ends": (doubling(END), "bytes follow END"),
    "hashes twice": (doubling(HASHES), "do not follow"),
    "config before hello": (swapping(HELLO, CONFIG), "HELLO"),
    "section after the index": (swapping(SERIAL0, INDEX), "MEMORY_INDEX"),
    "section twice": (doubling(CPU0), "cpu0 comes twice"),
    "section with an unknown field": (setting(CPU0, "extra", 1), "extra"),
    "section without a version": (lambda frames: frames[CPU0].value.pop("version"), "version"),
    "section with a body that is none": (setting(CPU0, "body", [1]), "body"),
    "unknown mandatory frame": (inserting(SERIAL0, 999, mandatory=True), "unknown kind 999: update kvmigrate"),
    "frame of a migration": (inserting(SERIAL0, FrameKind.COMMIT, mandatory=True), "kind 8"),
    "optional frame of a migration": (inserting(SERIAL0, FrameKind.COMMIT, mandatory=False), "kind 8"),
    "end that counts wrong": (setting(END, "nr_frames", 5), "nr_frames"),
    "description that is none": (setting(CONFIG, "description", [1]), "description"),
    "negative memory": (describing("memory_bytes", -4096), "memory_bytes"),
    "memory of 2 TiB": (describing("memory_bytes", 1 << 41), "memory_bytes"),
    "memory that is not the slots'": (describing("memory_bytes", 16 * MIB), "add up"),
    "no slots": (slots_everywhere([]), "slots"),
    "slot without pages": (slots_everywhere([[0, 0, 0]]), "slot 0"),
    "slot of a negative size": (slots_everywhere([[0, 0, -1]]), "slot 0"),
    "slot that wraps around": (slots_everywhere([[0, 2**64 - 1024, 2048]]), "slots"),
    "slot of text": (slots_everywhere([["0", 0, 2048]]), "slot 0"),  # type: ignore[list-item]
    "slots over each other": (slots_everywhere([[0, 0, 2048], [1, 1024, 2048]]), "slot 1"),
    "slots with one id": (slots_everywhere([[0, 0, 1024], [0, 1024, 1024]]), "id"),
    "slots that fall": (slots_everywhere([[0, 4096, 1024], [1, 0, 1024]]), "slot 1"),
    "slots of 33": (slots_everywhere([[n, n * 64, 64] for n in range(33)]), "slots"),
    "index of other slots": (setting(INDEX, "slots", [[0, 0, 1024], [1, 1024, 1024]]), "hashes"),
    "index of slots elsewhere": (setting(INDEX, "slots", [[0, 64, 2048]]), "not those of CONFIG"),
    "path out of the directory": (setting(INDEX, "file", "../memory.raw"), "file"),
    "absolute path": (setting(INDEX, "file", "/etc/passwd"), "file"),
    "the state as memory": (setting(INDEX, "file", "state"), "file"),
    "compression that is not the file's": (setting(INDEX, "compression", "zstd"), "compression"),
    "file size that is not the slots'": (setting(INDEX, "size_bytes", 4 * MIB), "size_bytes|bytes cannot be"),
    "frames in a raw file": (setting(INDEX, "nr_frames", 1), "memory.raw"),
    "more pages with data than pages": (setting(INDEX, "nr_hashed", 1 << 40), "pages hold data"),
    "digest of text": (setting(INDEX, "digest", "0"), "digest"),
    "hashes of a slot that is not there": (setting(HASHES, "slot", 1), "slot"),
    "hashes that leave a gap": (
        lambda frames: frames[HASHES].value.update(first_chunk=1, hashes=bytes(8 * 31)),
        "do not follow",
    ),
    "hashes of half a word": (setting(HASHES, "hashes", b"1234"), "do not follow"),
    "hashes past the slot": (setting(HASHES, "hashes", bytes(8 * 33)), "do not follow"),
    "too few hashes": (setting(HASHES, "hashes", bytes(8 * 31)), "hashes are missing"),
    "no hash at all": (setting(HASHES, "hashes", b""), "do not follow"),
}


@pytest.mark.parametrize("name", LIES)
def test_lie_in_state_is_refused_and_found(raw: Path, name: str) -> None:
    change, told = LIES[name]
    edit(raw, change)
    with pytest.raises(SnapshotError, match=told) as raised:
        restore(raw, must_not_build)
    assert str(raised.value).startswith(f"{raw / 'state'} at byte ")
    assert "\n" not in str(raised.value)
    assert any(found.file == "state" for found in verify(raw).findings), "not found by the checker"


def test_frames_that_changed_places_are_refused_and_found(raw: Path) -> None:
    data = (raw / "state").read_bytes()
    starts = [0]
    while starts[-1] < len(data):
        starts.append(starts[-1] + 32 + frame.decode_header(data[starts[-1] : starts[-1] + 32]).length)
    parts = [data[a:b] for a, b in pairwise(starts)]
    parts[CPU0], parts[SERIAL0] = parts[SERIAL0], parts[CPU0]
    (raw / "state").write_bytes(b"".join(parts))
    with pytest.raises(SnapshotError, match="frame 3 where frame 2 has to be"):
        restore(raw, must_not_build)
    assert verify(raw).findings[0].offset == starts[CPU0]


def test_unknown_optional_frame_is_skipped(raw: Path) -> None:
    edit(raw, inserting(SERIAL0, 999, mandatory=False))

    def count_again(frames: list[RawFrame]) -> None:
        frames[-1].value["nr_frames"] = len(frames) - 1

    edit(raw, count_again)
    assert verify(raw).findings == ()
    with restored(raw) as result:
        assert result.fidelity.counts()["refused"] == 0


def test_bytes_after_the_end_are_refused_and_found(raw: Path) -> None:
    with (raw / "state").open("ab") as file:
        file.write(b"more")
    with pytest.raises(SnapshotError, match="4 bytes follow END"):
        restore(raw, must_not_build)
    assert not verify(raw).ok


def test_frame_that_claims_to_be_huge_is_refused_before_it_is_read(raw: Path) -> None:
    header = frame.FrameHeader(FrameKind.HELLO, 1, 1 << 60, 0, 0)
    (raw / "state").write_bytes(frame.encode_header(header) + b"x")
    with pytest.raises(SnapshotError, match="over the limit"):
        restore(raw, must_not_build)
    assert not verify(raw).ok


@pytest.mark.parametrize("read_bytes", [1, 33, 4096])
def test_state_that_is_read_in_pieces_is_the_same(
    raw: Path, monkeypatch: pytest.MonkeyPatch, read_bytes: int
) -> None:
    with opened(raw) as fd:
        at_once = read_state(fd, raw)
        assert (raw / "state").stat().st_size < statefile.READ_BYTES
        monkeypatch.setattr(statefile, "READ_BYTES", read_bytes)
        in_pieces = read_state(fd, raw)
    assert (in_pieces.description, in_pieces.sections) == (at_once.description, at_once.sections)
    assert (in_pieces.index, in_pieces.hashes.of_slot) == (at_once.index, at_once.hashes.of_slot)


def test_section_with_a_value_that_no_msgpack_has_is_refused_before_a_machine_is_built(raw: Path) -> None:
    frames = read_frames(raw / "state")
    at = next(n for n, one in enumerate(frames) if one.kind == FrameKind.SECTION)
    parts = [section.pack(one.value) for one in frames]
    # A string that is not UTF-8: what skips over it does not see that.
    parts[at] = section.encode(Section(frames[at].value["name"], 1, b"\x81\xa1x\xa1\xff"))
    pairs = zip(frames, parts, strict=True)
    written = [frame.encode_frame(FrameKind(one.kind), part, n) for n, (one, part) in enumerate(pairs)]
    (raw / "state").write_bytes(b"".join(written))
    with pytest.raises(SnapshotError, match="not valid msgpack"):
        restore(raw, must_not_build)
    assert not verify(raw).ok


def test_deeply_nested_value_is_refused_and_found(raw: Path) -> None:
    payload = b"\x81\xa1x" * 5000 + b"\xc0"
    (raw / "state").write_bytes(frame.encode_frame(FrameKind.HELLO, payload, 0))
    with pytest.raises(SnapshotError, match="msgpack"):
        restore(raw, must_not_build)
    assert "nested" in verify(raw).findings[0].what


def test_machine_with_other_slots_is_refused_and_closed(raw: Path) -> None:
    machines: list[Guest] = []

    def builder(description: object) -> Guest:
        machines.append(Guest(4 * MIB))
        return machines[-1]

    with pytest.raises(SnapshotError, match="other memory slots"):
        restore(raw, builder)
    assert machines[0].closed


def test_item_that_the_host_refuses_ends_the_restore(raw: Path) -> None:
    machines: list[Guest] = []

    def builder(description: dict[str, object]) -> Guest:
        machines.append(build(description))
        machines[-1].faults.refuse = "vcpu0.msrs.0x10"
        return machines[-1]

    with pytest.raises(RestoreRefused, match=r"vcpu0\.msrs\.0x10"):
        restore(raw, builder)  # type: ignore[arg-type]
    assert machines[0].closed and not machines[0].ever_ran


def test_section_that_the_machine_does_not_take_names_the_state_file(raw: Path) -> None:
    def change(frames: list[RawFrame]) -> None:
        del frames[CPU0]
        frames[-1].value["nr_frames"] -= 1

    edit(raw, change)
    with pytest.raises(SnapshotError, match="section cpu0 is missing") as raised:
        restore(raw, build)
    assert str(raw / "state") in str(raised.value)


Run = tuple[int, int, int]


def pages_frame(runs: list[Run], data: bytes, *, flags: int = 0, sequence: int = 0, data_bytes: int = -1) -> bytes:
    """A PAGES frame with right checksums, whatever it says."""
    announced = len(data) if data_bytes < 0 else data_bytes
    table = struct.pack("<IIQ", len(runs), flags, announced) + b"".join(struct.pack("<QII", *run) for run in runs)
    checksum = xxhash.xxh3_64_intdigest(table)
    header = frame.FrameHeader(FrameKind.PAGES, 1, len(table) + announced, checksum, sequence)
    return frame.encode_header(header) + table + data


ONE = b"p" * PAGE_BYTES
BOMB = zstandard.ZstdCompressor(level=19).compress(bytes(64 * MIB))
SIZELESS = zstandard.ZstdCompressor(write_content_size=False).compress(ONE)
OPTIONAL = frame.encode_frame(999, b"\x80", 0, mandatory=False)  # type: ignore[arg-type]
BAD_FRAMES: dict[str, tuple[bytes, str]] = {
    "past the last page": (pages_frame([(2048, 1, 0)], ONE), "not RAM"),
    "over the end of the slot": (pages_frame([(2047, 2, 0)], ONE * 2), "not RAM"),
    "gfn that wraps around": (pages_frame([(2**64 - 1, 1, 0)], ONE), "not RAM"),
    "run of no pages": (pages_frame([(0, 0, 0)], b""), "not RAM"),
    "run of four billion pages": (pages_frame([(0, 2**32 - 1, 1)], b""), "not RAM"),
    "unknown kind of run": (pages_frame([(0, 1, 2)], ONE), "not RAM"),
    "page twice": (pages_frame([(0, 1, 0), (0, 1, 0)], ONE * 2), "not RAM"),
    "too many runs": (pages_frame([(n, 1, 1) for n in range(257)], b""), "over the limit"),
    "too many pages": (pages_frame([(0, 257, 1)], b""), "not RAM"),
    "less data than its table names": (pages_frame([(0, 2, 0)], ONE), "4096 bytes of data where"),
    "more data than its table names": (pages_frame([(0, 1, 0)], ONE * 2), "8192 bytes of data where"),
    "data past the end of the file": (pages_frame([(0, 1, 0)], b"", data_bytes=PAGE_BYTES), "4096 bytes too early"),
    "unknown flag": (pages_frame([(0, 1, 0)], ONE, flags=2), "flags 2: they disagree"),
    "zstd that is none": (pages_frame([(0, 1, 0)], ONE, flags=1), "unpack"),
    "zstd bomb": (pages_frame([(0, 1, 0)], BOMB, flags=1), "does not unpack to the 4096 bytes"),
    "zstd without its size": (pages_frame([(0, 1, 0)], SIZELESS, flags=1), "does not unpack to the 4096"),
    "zstd with something behind it": (pages_frame([(0, 1, 0)], zstandard.compress(ONE) + b"more", flags=1), "unpack"),
    "wrong sequence": (pages_frame([(0, 1, 0)], ONE, sequence=1), "PAGES frame 0 has to be"),
    "frame that is no PAGES": (frame.encode_frame(FrameKind.HELLO, b"\x80", 0), "PAGES frame 0 has to be"),
    "unknown optional frame": (OPTIONAL, "PAGES frame 0 has to be"),
    "page that is not the saved one": (pages_frame([(0, 1, 0)], ONE), "not what was saved"),
    "no frame": (b"", "not what was saved"),
}


@pytest.mark.parametrize("name", BAD_FRAMES)
def test_lie_in_the_memory_frames_is_refused_and_found(zstd: Path, name: str) -> None:
    data, told = BAD_FRAMES[name]
    (zstd / "memory.frames").write_bytes(data)
    edit(zstd, lambda frames: frames[INDEX].value.update(size_bytes=len(data), nr_frames=1 if data else 0))
    machines: list[Guest] = []

    def builder(description: dict[str, object]) -> Guest:
        machines.append(build(description))
        return machines[-1]

    with pytest.raises(SnapshotError, match=told) as raised:
        restore(zstd, builder)  # type: ignore[arg-type]
    assert str(zstd / "memory.frames") in str(raised.value) and "\n" not in str(raised.value)
    assert all(machine.closed for machine in machines)
    found = [finding.what for finding in verify(zstd).findings if finding.file == "memory.frames"]
    assert any("gfn 0x0, 64 pages) does not have its hash" in what for what in found) and len(found) > 1


def test_frame_more_or_less_than_the_index_says_is_refused_and_found(zstd: Path) -> None:
    edit(zstd, lambda frames: frames[INDEX].value.update(nr_frames=frames[INDEX].value["nr_frames"] + 1))
    with pytest.raises(SnapshotError, match="the index says"):
        restore(zstd, build)
    assert any("the index says" in found.what for found in verify(zstd).findings)
