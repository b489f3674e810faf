"""Multiboot kernels, as the specification says (version 0.6.96; section numbers from it)."""

from __future__ import annotations

import itertools
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from kvmigrate.errors import ConfigError

from .images import MIB, MULTIBOOT_MAGIC, Loaded, flat_descriptor, link, multiboot_header, multiboot_kernel

Load = Callable[..., Loaded]
GIB = 1 << 30


def symbols(image: Path) -> dict[str, int]:
    lines = subprocess.run(["nm", str(image)], check=True, capture_output=True, text=True).stdout.splitlines()
    return {line.split()[2]: int(line.split()[0], 16) for line in lines}


def info(guest: Loaded) -> dict[str, int]:
    """The information structure (3.3), by the names that the specification draws."""
    names = ["flags", "mem_lower", "mem_upper", "boot_device", "cmdline", "mods_count", "mods_addr"]
    names += ["syms0", "syms1", "syms2", "syms3", "mmap_length", "mmap_addr", "drives_length", "drives_addr"]
    names += ["config_table", "boot_loader_name"]
    return dict(zip(names, guest.words(guest.regs["rbx"], "17I"), strict=True))


def memory_map(guest: Loaded) -> list[tuple[int, int, int]]:
    """Walked as a kernel walks it: by each entry's own size."""
    found, at = [], info(guest)["mmap_addr"]
    end = at + info(guest)["mmap_length"]
    while at < end:
        size, base, length, type_ = guest.words(at, "IQQI")
        found.append((base, length, type_))
        at += size + 4
    assert at == end
    return found


def test_machine_state_is_that_of_the_specification(load: Load, tmp_path: Path) -> None:
    image = multiboot_kernel(tmp_path)
    guest = load(image)
    assert guest.regs["rax"] == 0x2BADB002
    assert guest.regs["rip"] == symbols(image)["_start"]
    assert not guest.regs["rflags"] & (1 << 17 | 1 << 9), "VM and IF are clear"
    assert guest.entry.sregs["cr0"] == 0x11, "PE set, PG clear"
    code = guest.segment("cs")
    assert (code["base"], code["limit"], code["db"], code["l"], code["type"]) == (0, 0xFFFFFFFF, 1, 0, 0xB)
    for name in ("ds", "es", "fs", "gs", "ss"):
        data = guest.segment(name)
        assert (data["base"], data["limit"], data["type"], data["present"]) == (0, 0xFFFFFFFF, 3, 1), name
    assert guest.descriptor(code["selector"]) == flat_descriptor(code=True, long=False)
    assert guest.descriptor(guest.segment("ds")["selector"]) == flat_descriptor(code=False, long=False)


def test_kernel_is_loaded_with_its_data_and_empty_bss(load: Load, tmp_path: Path) -> None:
    image = multiboot_kernel(tmp_path)
    guest = load(image)
    found = symbols(image)
    assert guest.read(guest.regs["rip"], 2) == b"\xfa\xf4"
    assert guest.read(found["marker"], 18) == b"data of the kernel"
    assert guest.read(found["__bss_start"], 8192) == bytes(8192)


@pytest.mark.parametrize(
    ("memory_bytes", "upper_kib", "ram"),
    [
        (MIB, 0, []),
        (64 * MIB, 63 * 1024, [(MIB, 63 * MIB, 1)]),
        (4 * GIB, 3071 * 1024, [(MIB, 3 * GIB - MIB, 1), (4 * GIB, GIB, 1)]),
    ],
)
def test_memory_is_told_twice_and_alike(
    load: Load, tmp_path: Path, memory_bytes: int, upper_kib: int, ram: list[tuple[int, int, int]]
) -> None:
    image = kludge(tmp_path, load_addr=0x10000)
    guest = load(image, memory_bytes)
    assert info(guest)["flags"] == 1 << 0 | 1 << 2 | 1 << 6 | 1 << 9
    assert (info(guest)["mem_lower"], info(guest)["mem_upper"]) == (639, upper_kib)
    assert memory_map(guest) == [(0, 0x9FC00, 1), (0x9FC00, 0x60400, 2), *ram]


def test_command_line_and_loader_are_told(load: Load, tmp_path: Path) -> None:
    guest = load(multiboot_kernel(tmp_path), cmdline="one two=3 ä")
    assert guest.text(info(guest)["cmdline"]) == "one two=3 ä".encode()
    assert guest.text(info(guest)["boot_loader_name"]) == b"kvmigrate"


def test_initrd_is_one_module_on_a_page_behind_the_kernel(load: Load, tmp_path: Path) -> None:
    image = multiboot_kernel(tmp_path)
    initrd = tmp_path / "initrd.img"
    initrd.write_bytes(b"module" * 5000)
    guest = load(image, initrd=initrd)
    found = info(guest)
    assert found["flags"] & 1 << 3 and found["mods_count"] == 1
    start, end, name, reserved = guest.words(found["mods_addr"], "4I")
    assert start % 4096 == 0 and start >= symbols(image)["_end"] and reserved == 0
    assert guest.read(start, end - start) == initrd.read_bytes()
    assert guest.text(name) == b"initrd.img"


def test_nothing_that_is_placed_overlaps(load: Load, tmp_path: Path) -> None:
    initrd = tmp_path / "initrd.img"
    initrd.write_bytes(b"m" * 12345)
    image = multiboot_kernel(tmp_path)
    guest = load(image, initrd=initrd, cmdline="c" * 4000)
    found = info(guest)
    start, end, name, _ = guest.words(found["mods_addr"], "4I")
    taken = [
        (guest.regs["rbx"], 120),
        (found["mmap_addr"], found["mmap_length"]),
        (found["mods_addr"], 16),
        (found["cmdline"], 4001),
        (found["boot_loader_name"], 10),
        (name, 11),
        (start, end - start),
        (guest.segment("gdt")["base"], guest.segment("gdt")["limit"] + 1),
        (0x100000, symbols(image)["_end"] - 0x100000),
    ]
    taken.sort()
    assert all(a + size <= b for (a, size), (b, _) in itertools.pairwise(taken))
    assert taken[0][0] >= 0x1000 and taken[-2][0] + taken[-2][1] <= 64 * MIB


def test_a_64_bit_elf_is_entered_at_its_physical_address(load: Load, tmp_path: Path) -> None:
    script = tmp_path / "script.ld"
    script.write_text(
        "ENTRY(_start) PHDRS { t PT_LOAD; }\nSECTIONS { . = 0xffffffff80100000; .text : AT(0x100000) { *(.text) } :t }"
    )
    source = f".text\n{multiboot_header(0)}.globl _start\n_start: hlt\n"
    image = link(tmp_path, source, "-T", str(script), bits=64)
    guest = load(image)
    assert guest.read(guest.regs["rip"], 1) == b"\xf4" and guest.regs["rip"] == 0x10000C


def kludge(directory: Path, **change: int) -> Path:
    """A file of no known format whose header, 32 bytes in, gives the addresses (3.1.3)."""
    load_addr = change.get("load_addr", 0x200000)
    fields = {
        "header_addr": load_addr + 32,
        "load_addr": load_addr,
        "load_end_addr": load_addr + 256,
        "bss_end_addr": load_addr + 8192,
        "entry_addr": load_addr + 64,
    } | change
    flags = 1 << 16
    header = struct.pack("<3I5I", MULTIBOOT_MAGIC, flags, -(MULTIBOOT_MAGIC + flags) & 0xFFFFFFFF, *fields.values())
    image = directory / "kludge"
    image.write_bytes(b"\x90" * 32 + header + b"\xf4" * 444)
    return image


def test_addresses_in_the_header_say_what_is_loaded_where(load: Load, tmp_path: Path) -> None:
    image = kludge(tmp_path)
    guest = load(image)
    assert guest.regs["rip"] == 0x200040
    assert guest.read(0x200000, 8192) == image.read_bytes()[:256] + bytes(8192 - 256)


def test_load_end_and_bss_end_of_zero_mean_all_of_the_file_and_no_more(load: Load, tmp_path: Path) -> None:
    image = kludge(tmp_path, load_end_addr=0, bss_end_addr=0)
    guest = load(image)
    assert guest.read(0x200000, 1024) == image.read_bytes().ljust(1024, b"\0")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"header_addr": 0x1FFFFF}, "does not fit header_addr"),
        ({"header_addr": 0x200021}, "does not fit header_addr"),
        ({"load_end_addr": 0x1FFFFF}, "out of order"),
        ({"load_end_addr": 0x300000, "bss_end_addr": 0}, "is it cut short"),
        ({"bss_end_addr": 0x200080}, "out of order"),
        ({"bss_end_addr": 0xFFFFFFFF}, "not all RAM"),
        ({"entry_addr": 0x1FFFFF}, "outside of what is loaded"),
        ({"entry_addr": 0x202000}, "outside of what is loaded"),
    ],
)
def test_addresses_that_contradict_each_other_are_refused(
    load: Load, tmp_path: Path, change: dict[str, int], why: str
) -> None:
    image = kludge(tmp_path, **change)
    with pytest.raises(ConfigError, match=f"^{image}: .*{why}"):
        load(image)


@pytest.mark.parametrize(("flag", "why"), [(2, "video mode"), (3, "0x8"), (15, "0x8000")])
def test_a_mandatory_flag_that_cannot_be_met_is_refused(load: Load, tmp_path: Path, flag: int, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        load(multiboot_kernel(tmp_path, flags=1 << flag))


def test_an_optional_flag_that_is_not_known_is_ignored(load: Load, tmp_path: Path) -> None:
    load(multiboot_kernel(tmp_path, flags=1 << 20))


@pytest.mark.parametrize(("offset", "found"), [(0, True), (8180, True), (8184, False), (2, False)])
def test_the_header_is_looked_for_on_every_fourth_of_8192_bytes(
    load: Load, tmp_path: Path, offset: int, found: bool
) -> None:
    flags = 1 << 16
    header = struct.pack("<3I", MULTIBOOT_MAGIC, flags, -(MULTIBOOT_MAGIC + flags) & 0xFFFFFFFF)
    base = 0x200000
    addresses = struct.pack("<5I", base + offset, base, 0, 0, base)
    image = tmp_path / "offset"
    image.write_bytes(bytes(offset) + header + addresses + bytes(8192))
    if found:
        assert load(image).regs["rip"] == base
    else:
        with pytest.raises(ConfigError, match="no boot method fits"):
            load(image)


def test_a_wrong_checksum_is_no_header(load: Load, tmp_path: Path) -> None:
    image = tmp_path / "checksum"
    image.write_bytes(struct.pack("<3I", MULTIBOOT_MAGIC, 3, 1) + bytes(512))
    with pytest.raises(ConfigError, match="no multiboot header in the first 8192 bytes"):
        load(image, method="multiboot")


def test_a_kernel_that_does_not_fit_its_memory_is_refused(load: Load, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not all RAM: the guest has 0x100000 bytes"):
        load(multiboot_kernel(tmp_path), MIB)


def test_an_initrd_that_does_not_fit_is_refused(load: Load, tmp_path: Path) -> None:
    initrd = tmp_path / "initrd"
    initrd.write_bytes(b"x" * (3 * MIB))
    with pytest.raises(ConfigError, match="the initrd of 0x300000 bytes does not fit"):
        load(multiboot_kernel(tmp_path), 4 * MIB, initrd=initrd)
    load(multiboot_kernel(tmp_path), 5 * MIB, initrd=initrd)
