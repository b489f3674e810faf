"""ELF files that lie, and images damaged at random."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvmigrate.boot.detect import detect
from kvmigrate.boot.entry import EntryState
from kvmigrate.boot.image import Image
from kvmigrate.boot.linux import load_linux
from kvmigrate.boot.multiboot import load_multiboot
from kvmigrate.boot.plan import LoadPlan, ram_ranges
from kvmigrate.boot.pvh import load_pvh
from kvmigrate.errors import ConfigError

from .images import MIB, Loaded, bzimage, multiboot_kernel, pvh_kernel

Load = Callable[..., Loaded]
# Offsets in an ELF64 file and in its first program header (System V gABI, figures 4-3 and 5-1).
HEADER = {"class": ("B", 4), "data": ("B", 5), "type": ("H", 16), "machine": ("H", 18), "phoff": ("Q", 32)}
HEADER |= {"phentsize": ("H", 54), "phnum": ("H", 56)}
SEGMENT = {
    "p_offset": ("Q", 8),
    "p_vaddr": ("Q", 16),
    "p_paddr": ("Q", 24),
    "p_filesz": ("Q", 32),
    "p_memsz": ("Q", 40),
}


def patched(image: Path, **fields: int) -> Path:
    """The ELF64 file with header fields, and fields of its first loaded segment, set."""
    data = bytearray(image.read_bytes())
    (phoff,) = struct.unpack_from("<Q", data, 32)
    first = next(phoff + 56 * at for at in range(data[56]) if data[phoff + 56 * at] == 1)
    for name, value in fields.items():
        code, offset = HEADER.get(name) or SEGMENT[name]
        struct.pack_into("<" + code, data, offset + (first if name in SEGMENT else 0), value)
    image.write_bytes(data)
    return image


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"class": 3}, "not a little-endian ELF"),
        ({"data": 2}, "not a little-endian ELF"),
        ({"machine": 183}, "machine 183"),
        ({"type": 1}, "type 1: link it"),
        ({"phnum": 0}, "0 program headers"),
        ({"phnum": 0xFFFF}, "65535 program headers"),
        ({"phentsize": 32}, "of 32 bytes cannot be"),
        ({"phoff": 1 << 63}, "program header table .*cut short"),
        ({"phoff": (1 << 64) - 56}, "program header table .*cut short"),
        ({"p_offset": 1 << 40}, "cut short"),
        ({"p_offset": (1 << 64) - 1}, "cut short"),
        ({"p_filesz": 1 << 40, "p_memsz": 1 << 41}, "cut short"),
        ({"p_memsz": 1}, "bytes in the file but 0x1 in memory"),
        ({"p_memsz": 1 << 63}, "not all RAM"),
        ({"p_paddr": (1 << 64) - 16}, "over the end of the address space"),
        ({"p_vaddr": (1 << 64) - 16}, "over the end of the address space"),
        ({"p_paddr": 0xBFFFFFFF}, "not all RAM"),
        ({"p_paddr": 0xFEE00000}, "not all RAM"),
        ({"p_paddr": 63 * MIB, "p_memsz": MIB + 1}, "not all RAM"),
        ({"p_paddr": 0x200000}, "overlaps"),
    ],
)
def test_a_field_that_lies_is_refused(load: Load, tmp_path: Path, fields: dict[str, int], why: str) -> None:
    image = patched(pvh_kernel(tmp_path), **fields)
    with pytest.raises(ConfigError, match=f"^{image}: .*{why}"):
        load(image, method="pvh")


def test_every_cut_of_a_file_is_refused_or_loads_whole(load: Load, tmp_path: Path) -> None:
    image = pvh_kernel(tmp_path)
    whole = image.read_bytes()
    refused = 0
    for size in range(1, len(whole), 97):
        image.write_bytes(whole[:size])
        try:
            load(image, method="pvh").memory.close()
        except ConfigError as error:
            refused += 1
            assert str(image) in str(error)
    assert refused > 10


class CheckedMemory:
    """Takes writes, and fails on one that is not all RAM."""

    def __init__(self, memory_bytes: int) -> None:
        self._ranges = ram_ranges(memory_bytes)
        self.written: list[tuple[int, int]] = []

    def write(self, gpa: int, data: bytes) -> None:
        assert any(start <= gpa and gpa + len(data) <= end for start, end in self._ranges)
        assert all(gpa + len(data) <= at or at + size <= gpa for at, size in self.written), "no write over another"
        self.written.append((gpa, len(data)))


Loader = Callable[[LoadPlan, Image | None, bytes], EntryState]
LOADERS: dict[str, tuple[Callable[[Path], Path], Loader]] = {
    "multiboot": (multiboot_kernel, load_multiboot),
    "pvh": (pvh_kernel, load_pvh),
    "linux": (bzimage, load_linux),
}
WORDS = st.sampled_from([0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0xFFFFF000, 0x100000, 0xC0000000])
DAMAGE = st.lists(
    st.tuples(
        st.integers(0, 0x300), st.one_of(st.binary(min_size=1, max_size=8), WORDS.map(lambda w: struct.pack("<I", w)))
    ),
    min_size=1,
    max_size=6,
)


@pytest.mark.parametrize("kind", LOADERS)
@given(damage=DAMAGE, cut=st.integers(0, 2000), mib=st.sampled_from([1, 2, 64, 4096]))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_damaged_image_is_refused_or_stays_inside_of_ram(
    kind: str, damage: list[tuple[int, bytes]], cut: int, mib: int, tmp_path: Path
) -> None:
    make, loader = LOADERS[kind]
    path = tmp_path / "good"
    if not path.exists():
        path.write_bytes(make(tmp_path).read_bytes())
    data = bytearray(path.read_bytes())
    for offset, value in damage:
        data[offset : offset + len(value)] = value
    image = Image(path, bytes(data[: len(data) - cut]))
    plan, memory = LoadPlan(image, mib * MIB), CheckedMemory(mib * MIB)
    try:
        detect(image)
    except ConfigError as error:
        assert "\n" not in str(error)
    try:
        entry = loader(plan, Image(tmp_path / "initrd", b"i" * 5000), b"quiet")
    except ConfigError as error:
        assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
        return
    plan.write(memory)  # type: ignore[arg-type]
    assert 0 <= entry.regs["rip"] < 1 << 32
