"""A Linux bzImage, by the 64-bit boot protocol (linux Documentation/arch/x86/boot.rst and zero-page.rst).

The kernel is loaded at its preferred address and entered 0x200 bytes behind it in long mode, with the first 4 GiB
identity-mapped in 2 MiB pages, interrupts off and the address of the zero page (struct boot_params) in RSI. The initrd
lies as high as initrd_addr_max and the hole at 3 GiB allow.
"""

from __future__ import annotations

import struct

from ..config import PAGE_BYTES
from ..memory.layout import HOLE_START
from ..record import dataclass
from .acpi import place_acpi
from .entry import EntryState, gdt, long_mode
from .image import Image
from .plan import HIGH_RAM, LoadPlan, memory_map

HEADER_AT, HEADER_MAX_END = 0x1F1, 0x290
BOOT_FLAG_AT, BOOT_FLAG = 0x1FE, 0xAA55
MAGIC_AT, MAGIC = 0x202, b"HdrS"
SECTOR_BYTES, PARAGRAPH_BYTES = 512, 16
OLDEST_VERSION = 0x20C
LOADED_HIGH = 1 << 0
XLF_KERNEL_64 = 1 << 0
ENTRY_64_OFFSET = 0x200
UNDEFINED_LOADER = 0xFF
NORMAL_VIDEO_MODE = 0xFFFF
TYPE_OF_LOADER_AT, VID_MODE_AT, CODE32_START_AT, RAMDISK_AT, CMD_LINE_PTR_AT = 0x210, 0x1FA, 0x214, 0x218, 0x228
ACPI_RSDP_AT, E820_ENTRIES_AT, E820_TABLE_AT = 0x070, 0x1E8, 0x2D0
MAPPED_GIB = 4
PRESENT, WRITABLE, LARGE = 1 << 0, 1 << 1, 1 << 7
ENTRIES = 512


@dataclass(frozen=True, slots=True)
class SetupHeader:
    """The fields of the setup header that a loader reads, under the kernel's names."""

    setup_sects: int
    syssize: int
    boot_flag: int
    version: int
    loadflags: int
    initrd_addr_max: int
    xloadflags: int
    cmdline_size: int
    pref_address: int
    init_size: int

    @classmethod
    def parse(cls, image: Image) -> SetupHeader:
        """Read the header; raises :class:`ConfigError` when the file is too short for one."""
        image.bytes_at(HEADER_AT, HEADER_MAX_END - HEADER_AT, "the Linux setup header")

        def field(code: str, offset: int) -> int:
            (value,) = struct.unpack_from("<" + code, image.data, offset)
            return int(value)

        return cls(
            setup_sects=field("B", 0x1F1) or 4,
            syssize=field("I", 0x1F4),
            boot_flag=field("H", BOOT_FLAG_AT),
            version=field("H", 0x206),
            loadflags=field("B", 0x211),
            initrd_addr_max=field("I", 0x22C),
            xloadflags=field("H", 0x236),
            cmdline_size=field("I", 0x238),
            pref_address=field("Q", 0x258),
            init_size=field("I", 0x260),
        )


def is_linux(image: Image) -> bool:
    """Whether the file has the setup header's magic."""
    return image.data[MAGIC_AT : MAGIC_AT + len(MAGIC)] == MAGIC


def load_linux(plan: LoadPlan, initrd: Image | None, cmdline: bytes) -> EntryState:
    """Plan the kernel, the initrd, the zero page and what long mode needs. Raises :class:`ConfigError`."""
    image = plan.image
    if not is_linux(image):
        raise image.error("this is not a Linux bzImage: there is no HdrS at 0x202")
    header = SetupHeader.parse(image)
    _check(image, header, cmdline)
    load_gpa = header.pref_address or HIGH_RAM
    plan.place(load_gpa, _protected_mode_code(image, header), "the kernel", header.init_size)
    ramdisk = _place_initrd(plan, header, initrd)
    cmdline_gpa = plan.place_low(cmdline + b"\0", "the command line")
    zero_page = _zero_page(plan, load_gpa, ramdisk, cmdline_gpa, place_acpi(plan))
    zero_page_gpa = plan.place_low(zero_page, "the zero page", align=PAGE_BYTES)
    table = plan.place_low(gdt(long=True), "the GDT")
    return long_mode(table, _place_page_tables(plan), load_gpa + ENTRY_64_OFFSET, rsi=zero_page_gpa)


def _check(image: Image, header: SetupHeader, cmdline: bytes) -> None:
    version = f"{header.version >> 8}.{header.version & 0xFF:02}"
    if header.boot_flag != BOOT_FLAG:
        raise image.error(
            f"the Linux boot flag is {header.boot_flag:#x} instead of {BOOT_FLAG:#x}: is the file damaged?"
        )
    if header.version < OLDEST_VERSION:
        raise image.error(f"this kernel has boot protocol {version}, but 2.12 (Linux 3.8) or later is needed")
    if not header.loadflags & LOADED_HIGH or not header.xloadflags & XLF_KERNEL_64:
        raise image.error("this kernel has no 64-bit entry point: take a bzImage for x86-64")
    if len(cmdline) > header.cmdline_size:
        raise image.error(f"the command line has {len(cmdline)} bytes, this kernel takes {header.cmdline_size}")
    if header.pref_address % PAGE_BYTES or 0 < header.pref_address < HIGH_RAM:
        raise image.error(f"the preferred address {header.pref_address:#x} cannot be: is the file damaged?")
    # What is placed below 4 GiB is what the identity mapping covers; over it this would fault on its first fetch.
    if header.pref_address + header.init_size > HOLE_START:
        raise image.error(f"this kernel wants {header.init_size:#x} bytes at {header.pref_address:#x}, over 3 GiB")


def _protected_mode_code(image: Image, header: SetupHeader) -> memoryview:
    start = (header.setup_sects + 1) * SECTOR_BYTES
    size = header.syssize * PARAGRAPH_BYTES
    # syssize is rounded up, and the file need not be padded to it.
    missing = start + size - len(image.data)
    code = image.bytes_at(start, size - missing if 0 < missing < PARAGRAPH_BYTES else size, "the kernel")
    if len(code) <= ENTRY_64_OFFSET:
        raise image.error(f"the kernel has {len(code)} bytes behind its setup code: is the file damaged?")
    return code


def _place_initrd(plan: LoadPlan, header: SetupHeader, initrd: Image | None) -> tuple[int, int]:
    """The address and size of the initrd, both 0 when there is none."""
    if initrd is None:
        return 0, 0
    end = min(header.initrd_addr_max + 1, HOLE_START)
    gpa = plan.place_below(end, initrd.data, "the initrd", lowest=HIGH_RAM, align=PAGE_BYTES)
    return gpa, len(initrd.data)


def _zero_page(plan: LoadPlan, load_gpa: int, ramdisk: tuple[int, int], cmdline_gpa: int, rsdp_gpa: int) -> bytes:
    """struct boot_params: zero but for the setup header, with the loader's fields filled in, and the E820 map."""
    page = bytearray(PAGE_BYTES)
    # The header ends where the jump at 0x200, which leads over it, leads to.
    end = min(MAGIC_AT + plan.image.data[0x201], HEADER_MAX_END)
    page[HEADER_AT:end] = plan.image.data[HEADER_AT:end]
    page[TYPE_OF_LOADER_AT] = UNDEFINED_LOADER
    struct.pack_into("<H", page, VID_MODE_AT, NORMAL_VIDEO_MODE)
    struct.pack_into("<I", page, CODE32_START_AT, load_gpa)
    struct.pack_into("<II", page, RAMDISK_AT, *ramdisk)
    struct.pack_into("<I", page, CMD_LINE_PTR_AT, cmdline_gpa)
    struct.pack_into("<Q", page, ACPI_RSDP_AT, rsdp_gpa)
    entries = memory_map(plan.memory_bytes)
    page[E820_ENTRIES_AT] = len(entries)
    for at, entry in enumerate(entries):
        struct.pack_into("<QQI", page, E820_TABLE_AT + 20 * at, *entry)
    return bytes(page)


def _place_page_tables(plan: LoadPlan) -> int:
    """Identity-map the first 4 GiB; returns the address of the top table (Intel SDM volume 3, 4.5)."""
    directories = plan.place_low(_page_directories(), "the page directories", align=PAGE_BYTES)
    pointers = [directories + at * PAGE_BYTES | PRESENT | WRITABLE for at in range(MAPPED_GIB)]
    upper = plan.place_low(_table(pointers), "the page directory pointers", align=PAGE_BYTES)
    return plan.place_low(_table([upper | PRESENT | WRITABLE]), "the top page table", align=PAGE_BYTES)


def _page_directories() -> bytes:
    return _table([at << 21 | PRESENT | WRITABLE | LARGE for at in range(MAPPED_GIB * ENTRIES)])


def _table(entries: list[int]) -> bytes:
    size = -(-len(entries) // ENTRIES) * ENTRIES
    return struct.pack(f"<{size}Q", *entries, *[0] * (size - len(entries)))
