"""PVH, the direct boot of Xen's HVM guests (xen docs/misc/pvh.pandoc, include/public/arch-x86/hvm/start_info.h).

The kernel is an ELF file with a note XEN_ELFNOTE_PHYS32_ENTRY that gives the physical address of its 32-bit entry. It
is entered in protected mode without paging, with the address of struct hvm_start_info in EBX: memory map, command line,
and the initrd as its one module.
"""

from __future__ import annotations

import struct

from .acpi import place_acpi
from .elf import Elf, notes, parse_elf, place_elf
from .entry import EntryState, gdt, protected_mode
from .image import Image
from .plan import LoadPlan, memory_map

NOTE_NAME = b"Xen\0"
XEN_ELFNOTE_PHYS32_ENTRY = 18
START_MAGIC = 0x336EC578
START_VERSION = 1
START_INFO = struct.Struct("<4I4QII")
MODULE = struct.Struct("<4Q")
MAP_ENTRY = struct.Struct("<QQII")


def find_entry(elf: Elf) -> int | None:
    """The physical entry address that the file's note gives, or None when there is no such note."""
    for name, type_, descriptor in notes(elf):
        if name == NOTE_NAME and type_ == XEN_ELFNOTE_PHYS32_ENTRY:
            if len(descriptor) not in (4, 8):
                raise elf.image.error(f"the PVH note has {len(descriptor)} bytes instead of 4 or 8")
            return int.from_bytes(descriptor, "little")
    return None


def load_pvh(plan: LoadPlan, initrd: Image | None, cmdline: bytes) -> EntryState:
    """Plan the kernel, its module and the start information. Raises :class:`ConfigError`."""
    elf = parse_elf(plan.image)
    entry = find_entry(elf)
    if entry is None:
        raise plan.image.error("no PVH note (XEN_ELFNOTE_PHYS32_ENTRY) in this ELF file: build it with CONFIG_PVH")
    if entry >= 1 << 32 or not elf.contains(entry):
        raise plan.image.error(f"the PVH entry point {entry:#x} lies in no loaded segment below 4 GiB")
    place_elf(plan, elf)
    info = _place_start_info(plan, initrd, cmdline)
    table = plan.place_low(gdt(), "the GDT")
    return protected_mode(table, entry, rbx=info)


def _place_start_info(plan: LoadPlan, initrd: Image | None, cmdline: bytes) -> int:
    modules = 0
    if initrd is not None:
        start = plan.place_after(initrd.data, "the initrd")
        modules = plan.place_low(MODULE.pack(start, len(initrd.data), 0, 0), "the module list")
    entries = [MAP_ENTRY.pack(*entry, 0) for entry in memory_map(plan.memory_bytes)]
    info = START_INFO.pack(
        START_MAGIC,
        START_VERSION,
        0,
        int(initrd is not None),
        modules,
        plan.place_low(cmdline + b"\0", "the command line"),
        place_acpi(plan),
        plan.place_low(b"".join(entries), "the memory map"),
        len(entries),
        0,
    )
    return plan.place_low(info, "the start information")
