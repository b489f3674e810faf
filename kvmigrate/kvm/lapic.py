"""The local APIC's register page: what of it may differ after a restore, and why.

Offsets: Intel SDM volume 3, 10.4.1, table "Local APIC Register Address Map".
"""

from __future__ import annotations

from ..state.fidelity import Fidelity

_LVT_TIMER = 0x320
_IRR = 0x200
_CURRENT_COUNT = 0x390
_COUNT_END = _CURRENT_COUNT + 4
_MASKED = 1 << 16


def compare_lapic(saved: bytes, read_back: bytes, fidelity: Fidelity, where: str) -> None:
    """Exact when all bytes are equal; the timer's count goes on by itself, and its interrupt may come meanwhile."""
    if saved == read_back:
        fidelity.exact(where)
        return
    count, now = saved[_CURRENT_COUNT:_COUNT_END], read_back[_CURRENT_COUNT:_COUNT_END]
    if count != now:
        why = "the timer's current count goes on from the saved one"
        fidelity.adjusted(f"{where}.{_CURRENT_COUNT:#x}", count, now, why)
    others = read_back[:_CURRENT_COUNT] + count + read_back[_COUNT_END:]
    # For most that is all: nobody looks through sixty-four registers while a guest waits.
    if others != saved:
        _compare_each(saved, others, fidelity, where)
    fidelity.exact(f"{where}.other")


def _compare_each(saved: bytes, read_back: bytes, fidelity: Fidelity, where: str) -> None:
    differing = [at for at in range(0, len(saved), 16) if saved[at : at + 16] != read_back[at : at + 16]]
    for at in differing:
        name, old, new = f"{where}.{at:#x}", saved[at : at + 4], read_back[at : at + 4]
        if at == _timer_irr(saved) and _only_timer_bit(saved, old, new):
            fidelity.adjusted(name, old, new, "the timer was due, and its interrupt is pending")
        else:
            fidelity.refused(name, old, new, "the host took the value and holds another")


def _timer_irr(regs: bytes) -> int:
    return _IRR + (regs[_LVT_TIMER] >> 5) * 16


def _only_timer_bit(regs: bytes, old: bytes, new: bytes) -> bool:
    if int.from_bytes(regs[_LVT_TIMER : _LVT_TIMER + 4], "little") & _MASKED:
        return False
    changed = int.from_bytes(old, "little") ^ int.from_bytes(new, "little")
    return changed == 1 << (regs[_LVT_TIMER] & 31)
