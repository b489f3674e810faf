"""The registers with which a guest starts, under the kernel's field names (struct kvm_regs, struct kvm_sregs)."""

from __future__ import annotations

import struct

from ..record import dataclass, field

CR0_PE, CR0_ET, CR0_PG = 1 << 0, 1 << 4, 1 << 31
CR4_PAE = 1 << 5
EFER_LME, EFER_LMA = 1 << 8, 1 << 10
RFLAGS_FIXED = 1 << 1
BOOT_CS, BOOT_DS, BOOT_TSS = 0x10, 0x18, 0x20
TYPE_CODE, TYPE_DATA, TYPE_TSS_BUSY = 0xB, 0x3, 0xB
ALL = 0xFFFFFFFF
TSS_LIMIT = 0x67

SegmentState = dict[str, int]


@dataclass(frozen=True, slots=True)
class EntryState:
    """What to lay over the first vCPU's reset state: ``regs``, and ``sregs`` with a map for each segment and table.

    Fields that are not named keep what they have after reset.
    """

    regs: dict[str, int] = field(default_factory=dict)
    sregs: dict[str, int | SegmentState] = field(default_factory=dict)


def segment(selector: int, type_: int, *, long: bool = False, flat: bool = True, base: int = 0) -> SegmentState:
    """A code or data segment: 4 GiB from 0 (``flat``; 64-bit code when ``long``), or a real-mode one at ``base``."""
    return {
        "base": base,
        "limit": ALL if flat else 0xFFFF,
        "selector": selector,
        "type": type_,
        "present": 1,
        "dpl": 0,
        "db": int(flat and not long),
        "s": 1,
        "l": int(long),
        "g": int(flat),
        "avl": 0,
        "unusable": 0,
    }


def task_segment() -> SegmentState:
    """A busy 32-bit TSS at 0 with limit 0x67, as PVH demands (xen docs/misc/pvh.pandoc); 64-bit in long mode."""
    return segment(BOOT_TSS, TYPE_TSS_BUSY, flat=False) | {"limit": TSS_LIMIT, "s": 0}


def descriptor(state: SegmentState) -> int:
    """The eight bytes of a GDT entry that load what ``state`` says."""
    limit = state["limit"] >> 12 if state["g"] else state["limit"]
    access = state["type"] | state["s"] << 4 | state["dpl"] << 5 | state["present"] << 7
    flags = state["avl"] | state["l"] << 1 | state["db"] << 2 | state["g"] << 3
    base = state["base"]
    return (
        limit & 0xFFFF
        | (base & 0xFFFFFF) << 16
        | access << 40
        | (limit >> 16) << 48
        | flags << 52
        | (base >> 24 & 0xFF) << 56
    )


def gdt(*, long: bool = False) -> bytes:
    """A GDT with code (64-bit when ``long``) at 0x10 and data at 0x18, as Linux's protocol says, and a TSS at 0x20."""
    code, data = segment(BOOT_CS, TYPE_CODE, long=long), segment(BOOT_DS, TYPE_DATA)
    return struct.pack("<7Q", 0, 0, descriptor(code), descriptor(data), descriptor(task_segment()), 0, 0)


def flat_sregs(code: SegmentState, gdt_gpa: int) -> dict[str, int | SegmentState]:
    """Special registers for flat protected mode with ``code``: all data segments alike, the GDT at ``gdt_gpa``."""
    data = segment(BOOT_DS, TYPE_DATA)
    return {
        "cs": code,
        **{name: dict(data) for name in ("ds", "es", "fs", "gs", "ss")},
        "tr": task_segment(),
        "gdt": {"base": gdt_gpa, "limit": len(gdt()) - 1},
        "idt": {"base": 0, "limit": 0},
        "cr0": CR0_PE | CR0_ET,
        "cr3": 0,
        "cr4": 0,
        "efer": 0,
    }


def protected_mode(gdt_gpa: int, entry_gpa: int, **regs: int) -> EntryState:
    """32-bit protected mode without paging at ``entry_gpa``, interrupts off, with ``regs`` besides."""
    code = segment(BOOT_CS, TYPE_CODE)
    return EntryState({"rip": entry_gpa, "rflags": RFLAGS_FIXED, **regs}, flat_sregs(code, gdt_gpa))


def long_mode(gdt_gpa: int, top_table_gpa: int, entry_gpa: int, **regs: int) -> EntryState:
    """64-bit mode at ``entry_gpa`` under the page tables at ``top_table_gpa``, interrupts off, with ``regs``."""
    code = segment(BOOT_CS, TYPE_CODE, long=True)
    sregs = flat_sregs(code, gdt_gpa) | {
        "cr0": CR0_PE | CR0_ET | CR0_PG,
        "cr3": top_table_gpa,
        "cr4": CR4_PAE,
        "efer": EFER_LME | EFER_LMA,
    }
    return EntryState({"rip": entry_gpa, "rflags": RFLAGS_FIXED, **regs}, sregs)
