"""Flat binaries: where they land and how they are entered."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from kvmigrate.errors import ConfigError

from .images import MIB, Loaded, link

Load = Callable[..., Loaded]
SECTOR = """.code16
.globl _start
_start: hlt
.org 510
.word 0xaa55
"""


def sector(directory: Path) -> Path:
    return link(directory, SECTOR, "-Ttext=0x7c00", "--oformat=binary")


def test_a_boot_sector_starts_as_a_bios_starts_it(load: Load, tmp_path: Path) -> None:
    image = sector(tmp_path)
    guest = load(image)
    assert guest.read(0x7C00, 512) == image.read_bytes()
    assert (guest.regs["rip"], guest.regs["rsp"], guest.regs["rdx"], guest.regs["rflags"]) == (0x7C00, 0x7C00, 0x80, 2)
    for name in ("cs", "ds", "es", "fs", "gs", "ss"):
        segment = guest.segment(name)
        assert (segment["selector"], segment["base"], segment["limit"], segment["db"]) == (0, 0, 0xFFFF, 0), name
    assert guest.entry.sregs["cr0"] == 0x10, "real mode"
    assert guest.entry.sregs["efer"] == 0


@pytest.mark.parametrize(
    ("addr", "cs", "ip", "ss", "sp"),
    [
        (0, 0, 0, 0x9000, 0xF000),
        (0x0FFE, 0, 0x0FFE, 0x9000, 0xF000),
        (0x1000, 0, 0x1000, 0, 0x1000),
        (0xFFFF, 0, 0xFFFF, 0, 0xFFFE),
        (0x10000, 0x1000, 0, 0, 0x7C00),
        (0x12345, 0x1234, 5, 0, 0x7C00),
    ],
)
def test_entry_and_stack_follow_the_address(
    load: Load, tmp_path: Path, addr: int, cs: int, ip: int, ss: int, sp: int
) -> None:
    image = tmp_path / "flat"
    image.write_bytes(b"\xf4" * 100)
    guest = load(image, method="flat", load_addr=addr)
    assert (guest.segment("cs")["selector"], guest.segment("cs")["base"], guest.regs["rip"]) == (cs, cs << 4, ip)
    assert (guest.segment("ss")["selector"], guest.segment("ss")["base"], guest.regs["rsp"]) == (ss, ss << 4, sp)
    assert guest.read(addr, 101) == b"\xf4" * 100 + b"\0"


@pytest.mark.parametrize(
    ("addr", "size", "why"),
    [
        (0x100000, 1, "below 1 MiB"),
        (-1, 1, "below 1 MiB"),
        (0xFFFFF, 64 * MIB, "not all RAM"),
        (0x600, 0x9EC00, "overlaps the image"),
        (0x10000, 64 * MIB, "not all RAM"),
    ],
)
def test_a_place_that_does_not_fit_is_refused(load: Load, tmp_path: Path, addr: int, size: int, why: str) -> None:
    image = tmp_path / "flat"
    image.write_bytes(b"\x90" * size)
    with pytest.raises(ConfigError, match=f"^{image}: .*{why}"):
        load(image, method="flat", load_addr=addr)


@pytest.mark.parametrize("extra", ["initrd", "cmdline"])
def test_what_a_flat_image_cannot_be_given_is_refused(load: Load, tmp_path: Path, extra: str) -> None:
    image = sector(tmp_path)
    with pytest.raises(ConfigError, match="neither an initrd nor a command line"):
        load(image, **{extra: image if extra == "initrd" else "quiet"})
