"""Kernels with a PVH note."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from kvmigrate.errors import ConfigError

from .images import MIB, Loaded, flat_descriptor, pvh_kernel, pvh_source

Load = Callable[..., Loaded]


def start_info(guest: Loaded) -> dict[str, int]:
    names = ["magic", "version", "flags", "nr_modules", "modlist_paddr", "cmdline_paddr", "rsdp_paddr"]
    names += ["memmap_paddr", "memmap_entries", "reserved"]
    return dict(zip(names, guest.words(guest.regs["rbx"], "4I4Q2I"), strict=True))


@pytest.mark.parametrize("bits", [32, 64])
def test_machine_state_is_that_of_the_abi(load: Load, tmp_path: Path, bits: int) -> None:
    guest = load(pvh_kernel(tmp_path, bits=bits))
    assert guest.read(guest.regs["rip"], 2) == b"\xfa\xf4", "entered at the note's address, not the header's"
    assert not guest.regs["rflags"] & (1 << 17 | 1 << 9 | 1 << 8)
    assert (guest.entry.sregs["cr0"], guest.entry.sregs["cr4"]) == (0x11, 0)
    for name, type_ in (("cs", 0xB), ("ds", 3), ("es", 3), ("ss", 3)):
        segment = guest.segment(name)
        assert (segment["base"], segment["limit"], segment["type"], segment["db"]) == (0, 0xFFFFFFFF, type_, 1), name
    task = guest.segment("tr")
    assert (task["base"], task["limit"], task["type"], task["s"], task["present"]) == (0, 0x67, 0xB, 0, 1)
    assert guest.descriptor(guest.segment("cs")["selector"]) == flat_descriptor(code=True, long=False)


def test_start_info_tells_memory_and_command_line(load: Load, tmp_path: Path) -> None:
    guest = load(pvh_kernel(tmp_path), cmdline="console=ttyS0")
    info = start_info(guest)
    assert (info["magic"], info["version"], info["flags"], info["reserved"]) == (0x336EC578, 1, 0, 0)
    assert (info["nr_modules"], info["modlist_paddr"]) == (0, 0)
    assert guest.read(info["rsdp_paddr"], 8) == b"RSD PTR "
    assert guest.text(info["cmdline_paddr"]) == b"console=ttyS0"
    entries = [guest.words(info["memmap_paddr"] + 24 * at, "QQII") for at in range(info["memmap_entries"])]
    assert entries == [(0, 0x9FC00, 1, 0), (0x9FC00, 0x60400, 2, 0), (MIB, 63 * MIB, 1, 0)]


def test_initrd_is_the_one_module(load: Load, tmp_path: Path) -> None:
    initrd = tmp_path / "initrd"
    initrd.write_bytes(b"ramdisk" * 999)
    guest = load(pvh_kernel(tmp_path), initrd=initrd)
    assert start_info(guest)["nr_modules"] == 1
    paddr, size, cmdline, reserved = guest.words(start_info(guest)["modlist_paddr"], "4Q")
    assert guest.read(paddr, size) == initrd.read_bytes()
    assert paddr == 0x201000 and (cmdline, reserved) == (0, 0), "on the page behind the kernel"


def test_initrd_goes_before_the_kernel_when_there_is_no_room_behind(load: Load, tmp_path: Path) -> None:
    initrd = tmp_path / "initrd"
    initrd.write_bytes(b"i" * 0x8000)
    guest = load(pvh_kernel(tmp_path), 0x208000, initrd=initrd)
    assert guest.words(start_info(guest)["modlist_paddr"], "QQ") == (0x100000, 0x8000)


@pytest.mark.parametrize(
    ("note", "why"),
    [
        ('.long 4, 4, 17\n.asciz "Xen"\n.long pvh_entry', "no PVH note"),
        ('.long 4, 4, 18\n.asciz "Xan"\n.long pvh_entry', "no PVH note"),
        ('.long 4, 2, 18\n.asciz "Xen"\n.short 0\n.short 0', "2 bytes instead of 4 or 8"),
        ('.long 4, 4, 18\n.asciz "Xen"\n.long 0x100', "no loaded segment"),
        ('.long 4, 8, 18\n.asciz "Xen"\n.quad 0x100200000', "no loaded segment"),
        ('.long 4, 0x7fffffff, 18\n.asciz "Xen"\n.long pvh_entry', "runs over the end of its segment"),
        ('.long 0xfffffff0, 4, 18\n.asciz "Xen"\n.long pvh_entry', "runs over the end of its segment"),
    ],
)
def test_a_note_that_cannot_be_is_refused(load: Load, tmp_path: Path, note: str, why: str) -> None:
    image = pvh_kernel(tmp_path, pvh_source(note))
    with pytest.raises(ConfigError, match=f"^{image}: .*{why}"):
        load(image, method="pvh")


def test_the_note_is_found_behind_others(load: Load, tmp_path: Path) -> None:
    note = '.long 3, 5, 1\n.ascii "ab\\0\\0"\n.ascii "12345\\0\\0\\0"\n.long 4, 8, 18\n.asciz "Xen"\n.quad pvh_entry'
    guest = load(pvh_kernel(tmp_path, pvh_source(note)))
    assert guest.read(guest.regs["rip"], 2) == b"\xfa\xf4"
