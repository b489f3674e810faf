"""A flat binary, such as a boot sector, started in real mode as a BIOS would start it.

It is loaded at ADDR (0x7c00 unless said otherwise) and entered there: CS is 0 and IP is ADDR when ADDR is below 64 KiB,
else CS is ADDR / 16 and IP the remainder. DS, ES, FS and GS are 0, DL is 0x80 (the first hard disk), interrupts are
off. SS:SP is 0:ADDR when ADDR is from 0x1000 to 0xffff, 0x9000:0xf000 when it is lower and 0:0x7c00 when it is higher;
1 KiB below it must be free. There is no BIOS: the interrupt vectors are zero and no INT call answers.
"""

from __future__ import annotations

from .entry import CR0_ET, RFLAGS_FIXED, TYPE_CODE, TYPE_DATA, EntryState, segment
from .plan import LoadPlan

FIRST_DISK = 0x80
STACK_BYTES = 1024
HIGHEST_ADDR = 0xFFFFF


def load_flat(plan: LoadPlan, addr: int) -> EntryState:
    """Plan the whole image at ``addr`` and say how it is entered. Raises :class:`ConfigError`."""
    if not 0 <= addr <= HIGHEST_ADDR:
        raise plan.image.error(f"real mode cannot start at {addr:#x}: take an address below 1 MiB")
    plan.place(addr, plan.image.data, "the image")
    stack_segment, stack_pointer = _stack(addr)
    plan.place((stack_segment << 4) + stack_pointer - STACK_BYTES, b"", "the stack", STACK_BYTES)
    code_segment, start = (0, addr) if addr <= 0xFFFF else (addr >> 4, addr & 0xF)
    data = segment(0, TYPE_DATA, flat=False)
    return EntryState(
        {"rip": start, "rsp": stack_pointer, "rdx": FIRST_DISK, "rflags": RFLAGS_FIXED},
        {
            "cs": _real_mode(code_segment, TYPE_CODE),
            "ss": _real_mode(stack_segment, TYPE_DATA),
            **{name: dict(data) for name in ("ds", "es", "fs", "gs")},
            "gdt": {"base": 0, "limit": 0xFFFF},
            "idt": {"base": 0, "limit": 0x3FF},
            "cr0": CR0_ET,
            "cr3": 0,
            "cr4": 0,
            "efer": 0,
        },
    )


def _stack(addr: int) -> tuple[int, int]:
    if 0x1000 <= addr <= 0xFFFF:
        return 0, addr & ~1
    return (0x9000, 0xF000) if addr < 0x1000 else (0, 0x7C00)


def _real_mode(selector: int, type_: int) -> dict[str, int]:
    return segment(selector, type_, flat=False, base=selector << 4)
