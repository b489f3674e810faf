"""Which boot method an image wants, for ``--boot auto``."""

from __future__ import annotations

from .elf import is_elf, parse_elf
from .image import Image
from .linux import is_linux
from .multiboot import SEARCH_BYTES, find_header
from .pvh import find_entry

SECTOR_BYTES = 512
SECTOR_SIGNATURE = b"\x55\xaa"
FOREIGN = (
    (0x38, b"ARMd", "an Image for ARM64"),  # linux Documentation/arch/arm64/booting.rst
    (0x38, b"RSC\x05", "an Image for RISC-V"),  # linux Documentation/arch/riscv/boot-image-header.rst
    (0x24, b"\x18\x28\x6f\x01", "a zImage for ARM"),  # linux arch/arm/boot/compressed/head.S
    (4, b"zimg", "a compressed image for EFI"),  # linux drivers/firmware/efi/libstub/zboot-header.S
)
"""Where the magics of other architectures' kernels stand."""


def detect(image: Image) -> str:
    """``linux``, ``pvh``, ``multiboot`` or ``flat``, whichever fits first.

    A boot sector is flat only when it is nothing else, since a bzImage begins with one. Raises :class:`ConfigError`
    that says what was looked for.
    """
    if is_linux(image):
        return "linux"
    for at, magic, what in FOREIGN:
        if image.data[at : at + len(magic)] == magic:
            raise image.error(f"this is {what}, not a kernel for x86-64: take its bzImage or vmlinux")
    if is_elf(image) and find_entry(parse_elf(image)) is not None:
        return "pvh"
    if find_header(image) is not None:
        return "multiboot"
    if image.data[SECTOR_BYTES - 2 : SECTOR_BYTES] == SECTOR_SIGNATURE:
        return "flat"
    raise image.error(
        "no boot method fits: this is no bzImage (HdrS), no ELF file with a PVH note, has no multiboot header in its "
        f"first {SEARCH_BYTES} bytes and no boot sector signature (55 aa); for a plain binary say --boot flat@ADDR"
    )
