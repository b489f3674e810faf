"""What ``--boot auto`` makes of an image, and what is wrong with files that are none."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from kvmigrate.boot import load_boot
from kvmigrate.boot.detect import detect
from kvmigrate.boot.image import Image, read_image
from kvmigrate.config import BootConfig
from kvmigrate.errors import ConfigError

from .images import MIB, Loaded, bzimage, link, multiboot_header, multiboot_kernel, pvh_kernel, pvh_source

Load = Callable[..., Loaded]


def boot_sector(directory: Path) -> Path:
    path = directory / "sector"
    path.write_bytes(b"\xf4" * 510 + b"\x55\xaa")
    return path


def both_pvh_and_multiboot(directory: Path) -> Path:
    source = pvh_source().replace(".text\n", f".text\n{multiboot_header(0)}", 1)
    return link(directory, source, "-Ttext=0x200000", "--section-start=.note.pvh=0x1ff000", bits=64)


@pytest.mark.parametrize(
    ("make", "method"),
    [
        (bzimage, "linux"),
        (pvh_kernel, "pvh"),
        (both_pvh_and_multiboot, "pvh"),
        (multiboot_kernel, "multiboot"),
        (boot_sector, "flat"),
    ],
)
def test_auto_knows_each_kind(make: Callable[[Path], Path], method: str, tmp_path: Path) -> None:
    path = make(tmp_path)
    assert detect(Image(path, path.read_bytes())) == method


@pytest.mark.parametrize("data", [b"\0", b"#!/bin/sh\n", b"\xf4" * 512, bytes(100000)])
def test_what_is_no_image_is_told_what_was_looked_for(load: Load, tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "junk"
    path.write_bytes(data)
    with pytest.raises(ConfigError) as caught:
        load(path)
    for word in (str(path), "HdrS", "PVH", "multiboot", "55 aa", "--boot flat@ADDR"):
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("at", "magic", "what"),
    [
        (0x38, b"ARM\x64", "an Image for ARM64"),
        (0x38, b"RSC\x05", "an Image for RISC-V"),
        (0x24, (0x016F2818).to_bytes(4, "little"), "a zImage for ARM"),
        (4, b"zimg", "a compressed image for EFI"),
    ],
)
def test_a_kernel_of_another_architecture_is_named(
    load: Load, tmp_path: Path, at: int, magic: bytes, what: str
) -> None:
    path = tmp_path / "Image"
    # It ends its first sector as a boot sector does, by chance.
    path.write_bytes(b"MZ".ljust(at, b"\0") + magic + bytes(510 - at - 4) + b"\x55\xaa" + bytes(4096))
    with pytest.raises(ConfigError, match=f"^{path}: this is {what}, not a kernel for x86-64"):
        load(path)


@pytest.mark.parametrize("method", ["multiboot", "pvh", "linux"])
def test_a_method_that_does_not_fit_the_image_is_refused(load: Load, tmp_path: Path, method: str) -> None:
    with pytest.raises(ConfigError, match="sector: "):
        load(boot_sector(tmp_path), method=method)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("missing", "No such file"),
        ("directory", "Is a directory"),
        ("fifo", "not a regular file"),
        ("/dev/zero", "not a regular file"),
        ("empty", "is empty"),
    ],
)
def test_a_file_that_cannot_be_an_image_is_refused_at_once(load: Load, tmp_path: Path, name: str, why: str) -> None:
    good, path = boot_sector(tmp_path), tmp_path / name
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "directory").mkdir()
    (tmp_path / "empty").write_bytes(b"")
    with pytest.raises(ConfigError, match=f"^{path}: the image .*{why}"):
        load(path)
    with pytest.raises(ConfigError, match=f"^{path}: the initrd .*{why}"):
        load(good, initrd=path)


def test_an_image_over_the_limit_is_refused(load: Load, tmp_path: Path) -> None:
    image = boot_sector(tmp_path)
    with image.open("r+b") as file:
        file.truncate((1 << 30) + 1)
    with pytest.raises(ConfigError, match="the image is larger than 1073741824 bytes"):
        load(image)


def test_an_initrd_larger_than_memory_is_refused_before_it_is_read_whole(load: Load, tmp_path: Path) -> None:
    sparse = tmp_path / "initrd"
    with sparse.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(ConfigError, match=f"the initrd is larger than {MIB} bytes"):
        load(multiboot_kernel(tmp_path), MIB, initrd=sparse)


def test_reading_an_initrd_takes_the_memory_of_the_initrd_not_of_the_guest(tmp_path: Path) -> None:
    path = tmp_path / "initrd"
    path.write_bytes(b"small")
    assert read_image(path, "initrd", 1 << 45).data == b"small"


@pytest.mark.parametrize("cmdline", ["a\0b", "x" * 20000])
def test_a_command_line_that_cannot_be_passed_on_is_refused(load: Load, tmp_path: Path, cmdline: str) -> None:
    with pytest.raises(ConfigError, match="a command line must not"):
        load(multiboot_kernel(tmp_path), cmdline=cmdline)


def test_an_unknown_method_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'uefi' is not a boot method"):
        load_boot(None, BootConfig(boot_sector(tmp_path), method="uefi"), MIB)  # type: ignore[arg-type]
