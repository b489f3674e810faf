"""Linux's 64-bit boot protocol (linux Documentation/arch/x86/boot.rst)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from kvmigrate.errors import ConfigError

from .images import LINUX_CODE, MIB, Loaded, bzimage, flat_descriptor

Load = Callable[..., Loaded]
LOAD_GPA = 0x1000000
PAGE_MASK = 0x000FFFFFFFFFF000


def translate(guest: Loaded, address: int) -> int | None:
    """Walk the page tables as the processor does (Intel SDM volume 3, 4.5); None when not present."""
    table = guest.entry.sregs["cr3"]
    assert isinstance(table, int)
    for shift in (39, 30, 21):
        (entry,) = guest.words((table & PAGE_MASK) + (address >> shift & 511) * 8, "Q")
        if not entry & 1:
            return None
        assert entry & 2, "writable"
        if entry & 0x80:
            return (entry & PAGE_MASK) + (address & (1 << shift) - 1)
        table = entry
    raise AssertionError("no 4 KiB pages are made")


def zero_page_field(guest: Loaded, offset: int, layout: str) -> int:
    return guest.words(guest.regs["rsi"] + offset, layout)[0]


def test_machine_state_is_that_of_the_protocol(load: Load, tmp_path: Path) -> None:
    guest = load(bzimage(tmp_path))
    assert guest.regs["rip"] == LOAD_GPA + 0x200
    assert guest.regs["rflags"] & 1 << 9 == 0
    assert guest.entry.sregs["cr0"] == 0x80000011
    assert guest.entry.sregs["cr4"] == 0x20
    assert guest.entry.sregs["efer"] == 0x500
    code = guest.segment("cs")
    assert (code["selector"], code["l"], code["db"], code["type"]) == (0x10, 1, 0, 0xB)
    for name in ("ds", "es", "ss"):
        assert guest.segment(name)["selector"] == 0x18, name
    assert guest.descriptor(0x10) == flat_descriptor(code=True, long=True)
    assert guest.descriptor(0x18) == flat_descriptor(code=False, long=True)


def test_kernel_lies_at_its_preferred_address(load: Load, tmp_path: Path) -> None:
    guest = load(bzimage(tmp_path))
    assert guest.read(LOAD_GPA, len(LINUX_CODE)) == LINUX_CODE
    guest = load(bzimage(tmp_path, pref_address=0x400000))
    assert guest.regs["rip"] == 0x400200
    guest = load(bzimage(tmp_path, pref_address=0))
    assert guest.regs["rip"] == 0x100200, "without a preference at 1 MiB"


def test_setup_sectors_of_zero_mean_four(load: Load, tmp_path: Path) -> None:
    image = bzimage(tmp_path)
    data = bytearray(image.read_bytes())
    data[0x1F1] = 0
    image.write_bytes(data)
    assert load(image).read(LOAD_GPA, len(LINUX_CODE)) == LINUX_CODE


def test_bytes_behind_the_kernel_are_not_loaded(load: Load, tmp_path: Path) -> None:
    image = bzimage(tmp_path)
    image.write_bytes(image.read_bytes() + b"a signature")
    assert load(image).read(LOAD_GPA + len(LINUX_CODE), 16) == bytes(16)


def test_a_file_that_is_not_padded_to_a_paragraph_loads(load: Load, tmp_path: Path) -> None:
    code = LINUX_CODE + b"12345"
    assert load(bzimage(tmp_path, code)).read(LOAD_GPA, len(code) + 1) == code + b"\0"


def test_first_4_gib_are_identity_mapped(load: Load, tmp_path: Path) -> None:
    guest = load(bzimage(tmp_path))
    for address in (0, 0x1000, guest.regs["rsi"], LOAD_GPA, LOAD_GPA + 0x1FFFFF, 0xBFFFFFFF, 0xFFFFFFFF):
        assert translate(guest, address) == address, hex(address)
    assert translate(guest, 1 << 32) is None
    assert translate(guest, 1 << 39) is None


def test_zero_page_has_the_kernels_header_and_the_loaders_fields(load: Load, tmp_path: Path) -> None:
    image = bzimage(tmp_path)
    guest = load(image, cmdline="console=ttyS0 quiet")
    header = image.read_bytes()
    page = guest.read(guest.regs["rsi"], 4096)
    assert guest.regs["rsi"] % 4096 == 0
    assert guest.read(zero_page_field(guest, 0x70, "Q"), 8) == b"RSD PTR "
    assert page[:0x70] == bytes(0x70) and page[0x78:0x1E8] == bytes(0x170), "all else is zero, the sentinel too"
    assert page[0x1E9:0x1F1] == bytes(8)
    end = 0x202 + header[0x201]
    changed = {*range(0x1FA, 0x1FC), 0x210, *range(0x214, 0x220), *range(0x228, 0x22C)}
    assert all(page[at] == header[at] for at in range(0x1F1, end) if at not in changed)
    assert page[end:0x2D0] == bytes(0x2D0 - end)
    assert zero_page_field(guest, 0x210, "B") == 0xFF
    assert zero_page_field(guest, 0x1FA, "H") == 0xFFFF
    assert zero_page_field(guest, 0x214, "I") == LOAD_GPA
    cmdline = zero_page_field(guest, 0x228, "I")
    assert 0x10000 <= cmdline < 0xA0000 and guest.text(cmdline) == b"console=ttyS0 quiet"
    assert (zero_page_field(guest, 0x218, "I"), zero_page_field(guest, 0x21C, "I")) == (0, 0)


@pytest.mark.parametrize(
    ("memory_bytes", "high"),
    [(64 * MIB, [(MIB, 63 * MIB, 1)]), (5 << 30, [(MIB, (3 << 30) - MIB, 1), (4 << 30, 2 << 30, 1)])],
)
def test_e820_map_tells_all_ram(
    load: Load, tmp_path: Path, memory_bytes: int, high: list[tuple[int, int, int]]
) -> None:
    guest = load(bzimage(tmp_path), memory_bytes)
    count = zero_page_field(guest, 0x1E8, "B")
    entries = [guest.words(guest.regs["rsi"] + 0x2D0 + 20 * at, "QQI") for at in range(count)]
    assert entries == [(0, 0x9FC00, 1), (0x9FC00, 0x60400, 2), *high]


@pytest.mark.parametrize(
    ("memory_bytes", "addr_max", "end"),
    [(64 * MIB, 0x7FFFFFFF, 64 * MIB), (64 * MIB, 0x37FFFFF, 0x3800000), (5 << 30, 0xFFFFFFFF, 3 << 30)],
)
def test_initrd_lies_as_high_as_the_kernel_allows(
    load: Load, tmp_path: Path, memory_bytes: int, addr_max: int, end: int
) -> None:
    initrd = tmp_path / "initrd"
    initrd.write_bytes(b"0123456789" * 1000)
    guest = load(bzimage(tmp_path, initrd_addr_max=addr_max), memory_bytes, initrd=initrd)
    start, size = guest.words(guest.regs["rsi"] + 0x218, "II")
    assert (start, size) == (end - 3 * 4096, 10000)
    assert guest.read(start, size) == initrd.read_bytes()


def test_initrd_goes_below_the_kernel_when_there_is_no_room_above(load: Load, tmp_path: Path) -> None:
    initrd = tmp_path / "initrd"
    initrd.write_bytes(b"i" * MIB)
    guest = load(bzimage(tmp_path), 24 * MIB, initrd=initrd)
    assert guest.words(guest.regs["rsi"] + 0x218, "II") == (15 * MIB, MIB)


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"boot_flag": 0}, "boot flag is 0x0"),
        ({"version": 0x20B}, "boot protocol 2.11, but 2.12"),
        ({"loadflags": 0}, "no 64-bit entry"),
        ({"xloadflags": 0x7E}, "no 64-bit entry"),
        ({"cmdline_size": 3}, "command line has 4 bytes, this kernel takes 3"),
        ({"pref_address": 0x1000001}, "cannot be"),
        ({"pref_address": 0x8000}, "cannot be"),
        ({"pref_address": 1 << 40}, "over 3 GiB"),
        ({"pref_address": (1 << 64) - 4096}, "over 3 GiB"),
        ({"init_size": 0xFFFFFFFF}, "over 3 GiB"),
        ({"init_size": 64 * MIB}, "not all RAM"),
        ({"init_size": 100}, "only 0x64 are kept"),
        ({"setup_sects": 255, "syssize": 0xFFFFFFFF}, "is it cut short"),
        ({"syssize": 257}, "is it cut short"),
        ({"syssize": 0x20}, "0 bytes|512 bytes behind"),
        ({"syssize": 0}, "0 bytes behind"),
    ],
)
def test_a_header_that_cannot_be_is_refused(load: Load, tmp_path: Path, fields: dict[str, int], why: str) -> None:
    image = bzimage(tmp_path, LINUX_CODE, **fields)
    with pytest.raises(ConfigError, match=f"^{image}: .*({why})"):
        load(image, cmdline="four")


def test_an_initrd_that_does_not_fit_is_refused(load: Load, tmp_path: Path) -> None:
    initrd = tmp_path / "initrd"
    initrd.write_bytes(b"i" * (16 * MIB))
    with pytest.raises(ConfigError, match="the initrd of 0x1000000 bytes does not fit"):
        load(bzimage(tmp_path), 24 * MIB, initrd=initrd)
    with pytest.raises(ConfigError, match="the initrd of 0x1000000 bytes does not fit"):
        load(bzimage(tmp_path, initrd_addr_max=0x1000000), 256 * MIB, initrd=initrd)


def test_every_cut_of_a_file_is_refused_by_name(load: Load, tmp_path: Path) -> None:
    image = bzimage(tmp_path)
    whole = image.read_bytes()
    boundaries = (0x1F1, 0x1FE, 0x206, 0x290, 5 * 512, 5 * 512 + 0x200, len(whole) - 16)
    sizes = {at + by for at in boundaries for by in (-1, 0, 1)} | {*range(1, len(whole) - 16, 61)}
    # One with a sector's signature and without all of HdrS is a boot sector, as far as anyone can tell. The last 15
    # bytes may be missing: the header counts paragraphs.
    for size in sorted(sizes - {*range(0x200, 0x206), len(whole) - 15}):
        image.write_bytes(whole[:size])
        with pytest.raises(ConfigError, match=f"^{image}: ") as caught:
            load(image)
        assert "\n" not in str(caught.value), size


def test_a_file_cut_in_its_header_is_refused(load: Load, tmp_path: Path) -> None:
    image = bzimage(tmp_path)
    image.write_bytes(image.read_bytes()[:0x250])
    with pytest.raises(ConfigError, match="is it cut short"):
        load(image)
