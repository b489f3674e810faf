"""Multiboot 1 (The Multiboot Specification version 0.6.96).

The kernel is an ELF file, or any file whose header gives load addresses (flag 16). It is entered in 32-bit protected
mode with flat segments, interrupts off, 0x2BADB002 in EAX and the address of the information structure in EBX. That
structure gives mem_lower and mem_upper, the memory map, the command line exactly as ``--append`` gave it, one module
(the initrd, named by its file's name, on a page boundary behind the kernel), and the loader's name.
"""

from __future__ import annotations

import struct

from ..record import dataclass
from .elf import is_elf, parse_elf, place_elf
from .entry import EntryState, gdt, protected_mode
from .image import Image
from .plan import HIGH_RAM, LOW_RAM_END, LoadPlan, memory_map, ram_ranges

HEADER_MAGIC, LOADER_MAGIC = 0x1BADB002, 0x2BADB002
SEARCH_BYTES = 8192
HEADER = struct.Struct("<III")
ADDRESSES = struct.Struct("<IIIII")
FLAG_PAGE_ALIGN, FLAG_MEMORY, FLAG_VIDEO, FLAG_ADDRESSES = 1 << 0, 1 << 1, 1 << 2, 1 << 16
MANDATORY_FLAGS = 0xFFFF
INFO_MEMORY, INFO_CMDLINE, INFO_MODULES, INFO_MMAP, INFO_LOADER = 1 << 0, 1 << 2, 1 << 3, 1 << 6, 1 << 9
INFO_BYTES = 120
LOADER_NAME = b"kvmigrate\0"


@dataclass(frozen=True, slots=True)
class Header:
    """The header found at ``offset`` of the file; ``flags`` say what the kernel wants."""

    offset: int
    flags: int


def find_header(image: Image) -> Header | None:
    """The first multiboot header, on a 4-byte boundary in the first 8192 bytes, whose checksum is right."""
    window = image.data[:SEARCH_BYTES]
    for offset in range(0, len(window) - HEADER.size + 1, 4):
        magic, flags, checksum = HEADER.unpack_from(window, offset)
        if magic == HEADER_MAGIC and (magic + flags + checksum) & 0xFFFFFFFF == 0:
            return Header(offset, flags)
    return None


def load_multiboot(plan: LoadPlan, initrd: Image | None, cmdline: bytes) -> EntryState:
    """Plan the kernel, its module and the information structure. Raises :class:`ConfigError`."""
    header = find_header(plan.image)
    if header is None:
        raise plan.image.error(f"no multiboot header in the first {SEARCH_BYTES} bytes")
    _check_flags(plan.image, header)
    entry = _place_addresses(plan, header) if header.flags & FLAG_ADDRESSES else _place_elf(plan)
    info = _place_info(plan, initrd, cmdline)
    table = plan.place_low(gdt(), "the GDT")
    return protected_mode(table, entry, rax=LOADER_MAGIC, rbx=info)


def _check_flags(image: Image, header: Header) -> None:
    # "If the boot loader sees any of these bits set but doesn't understand the flag or can't fulfill the requirements
    # it indicates for some reason, it must notify the user and fail to load the OS image" (3.1.2).
    if header.flags & FLAG_VIDEO:
        raise image.error("the multiboot header asks for a video mode (flag 2), but the machine has no display")
    unknown = header.flags & MANDATORY_FLAGS & ~(FLAG_PAGE_ALIGN | FLAG_MEMORY)
    if unknown:
        raise image.error(f"the multiboot header has mandatory flags {unknown:#x}, which are not known here")


def _place_elf(plan: LoadPlan) -> int:
    if not is_elf(plan.image):
        raise plan.image.error("the multiboot header gives no addresses (flag 16), and the image is not an ELF file")
    elf = parse_elf(plan.image)
    place_elf(plan, elf)
    return _check_entry(plan.image, elf.entry_gpa())


def _place_addresses(plan: LoadPlan, header: Header) -> int:
    """Load as the header's own five addresses say (3.1.3), which go before those of an ELF header."""
    image = plan.image
    packed = image.bytes_at(header.offset + HEADER.size, ADDRESSES.size, "the multiboot header's addresses")
    entry: int
    header_addr, load_addr, load_end, bss_end, entry = ADDRESSES.unpack(packed)
    start = header.offset - (header_addr - load_addr)
    if load_addr > header_addr or start < 0:
        raise image.error(f"multiboot load_addr {load_addr:#x} does not fit header_addr {header_addr:#x}")
    size = load_end - load_addr if load_end else len(image.data) - start
    memory_bytes = max(size, bss_end - load_addr if bss_end else 0)
    if size < 0 or (bss_end and bss_end < load_addr + size):
        raise image.error(f"multiboot addresses are out of order: {load_addr:#x}, {load_end:#x}, {bss_end:#x}")
    plan.place(load_addr, image.bytes_at(start, size, "the multiboot image"), "the image", memory_bytes)
    if not load_addr <= entry < load_addr + memory_bytes:
        raise image.error(f"multiboot entry_addr {entry:#x} lies outside of what is loaded")
    return entry


def _check_entry(image: Image, entry: int) -> int:
    if entry >= 1 << 32:
        raise image.error(f"the entry point {entry:#x} lies over 4 GiB, where multiboot cannot start")
    return entry


def _place_info(plan: LoadPlan, initrd: Image | None, cmdline: bytes) -> int:
    flags = INFO_MEMORY | INFO_CMDLINE | INFO_MMAP | INFO_LOADER
    modules = 0
    if initrd is not None:
        modules = _place_module(plan, initrd)
        flags |= INFO_MODULES
    entries = b"".join(struct.pack("<IQQI", 20, *entry) for entry in memory_map(plan.memory_bytes))
    info = struct.pack(
        "<7I16xIIIIII",
        flags,
        LOW_RAM_END >> 10,
        ram_ranges(plan.memory_bytes)[0][1] - HIGH_RAM >> 10,
        0,
        plan.place_low(cmdline + b"\0", "the command line"),
        int(initrd is not None),
        modules,
        len(entries),
        plan.place_low(entries, "the memory map"),
        0,
        0,
        0,
        plan.place_low(LOADER_NAME, "the loader's name"),
    )
    return plan.place_low(info.ljust(INFO_BYTES, b"\0"), "the multiboot information")


def _place_module(plan: LoadPlan, initrd: Image) -> int:
    start = plan.place_after(initrd.data, "the initrd")
    name = plan.place_low(bytes(initrd.path.name, "utf-8", "surrogateescape") + b"\0", "the module's name")
    return plan.place_low(struct.pack("<4I", start, start + len(initrd.data), name, 0), "the module list")
