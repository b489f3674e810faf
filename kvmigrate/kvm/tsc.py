"""The time stamp counter of one vCPU and the timer that is armed on it: set, read back, and told when they jump."""

from __future__ import annotations

from collections.abc import Mapping

from .._core import lib
from ..record import dataclass
from ..state.fidelity import Fidelity
from . import msr_names as msr
from .clock import ClockBase
from .vcpu import Vcpu

TOLERANCE_PPM = 250
"""How far two TSC frequencies may be apart without scaling: what guests' own clock discipline absorbs (Firecracker)."""
_SETTLED_MS = 20
_MASK = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class SavedTsc:
    """The TSC of one vCPU as saved: frequency in kHz, the MSR, and guest minus host TSC if the kernel had it."""

    khz: int
    value: int
    offset: int | None


def load_tsc_khz(vcpu: Vcpu, khz: int, fidelity: Fidelity, where: str) -> int:
    """Bring the guest's TSC to its frequency: before its value, which scaling would change. Returns what it has now."""
    here = vcpu.get_tsc_khz()
    if here == khz:
        fidelity.exact(where)
    elif abs(here - khz) * 1_000_000 <= khz * TOLERANCE_PPM:
        fidelity.adjusted(where, khz, here, f"within {TOLERANCE_PPM} ppm, which needs no scaling")
    elif not vcpu.host.can_scale_tsc:
        fidelity.refused(where, khz, here, "this CPU cannot scale the TSC (KVM_CAP_TSC_CONTROL)")
    else:
        vcpu.set_tsc_khz(khz)
        here = vcpu.get_tsc_khz()
        fidelity.compare(where, khz, here)
    return here


def load_tsc(vcpu: Vcpu, saved: SavedTsc, khz: int, base: ClockBase, fidelity: Fidelity, where: str) -> int:
    """Set the TSC, which counts at ``khz`` here; returns by how many cycles it is off from where it should be: 0, or a
    jump that the host forces."""
    offset = _wanted_offset(vcpu, saved, khz, base)
    if offset is not None:
        vcpu.set_tsc_offset(offset)
        wanted = (lib.kmig_host_tsc() + offset) & _MASK
    else:
        wanted = (saved.value + base.elapsed(saved.khz)) & _MASK
        vcpu.set_msr(msr.IA32_TSC, wanted)
    held = vcpu.get_msr(msr.IA32_TSC) or 0
    off = _signed(held - wanted)
    name = f"{where}.MSR_IA32_TSC"
    if abs(off) <= saved.khz * _SETTLED_MS:
        fidelity.adjusted(name, saved.value, held, "the TSC goes on from the saved value")
        return 0
    milliseconds = off / saved.khz
    fidelity.adjusted(name, saved.value, held, f"tsc-jump: this host keeps its own TSC, off by {milliseconds:.0f} ms")
    return off


def _wanted_offset(vcpu: Vcpu, saved: SavedTsc, khz: int, base: ClockBase) -> int | None:
    """None where the TSC can only be set by its MSR: no such attribute, here or there, or a scaled TSC, of which the
    offset is in other cycles than the host's."""
    if saved.offset is None or not vcpu.has_tsc_offset:
        return None
    return None if khz != vcpu.native_tsc_khz else base.moved_offset(saved.offset, saved.khz)


def _signed(cycles: int) -> int:
    cycles &= _MASK
    return cycles - (1 << 64) if cycles >> 63 else cycles


def load_tsc_deadline(vcpu: Vcpu, saved: Mapping[int, int], off: int, fidelity: Fidelity, where: str) -> None:
    """Arm the local APIC's timer, last of all MSRs: the write counts only once the local APIC is in deadline mode
    (Firecracker #4666). ``off`` moves the deadline along with a TSC that jumped, to keep the time left."""
    wanted = saved.get(msr.IA32_TSC_DEADLINE)
    if wanted is None:
        return
    name = f"{where}.MSR_IA32_TSC_DEADLINE"
    moved = (wanted + off) & _MASK if wanted and off else wanted
    taken = vcpu.set_msr(msr.IA32_TSC_DEADLINE, moved)
    held = vcpu.get_msr(msr.IA32_TSC_DEADLINE)
    if held == wanted:
        fidelity.exact(name)
    elif not taken or held is None:
        if wanted:
            fidelity.refused(name, wanted, held, "this host has no such timer")
        else:
            fidelity.dropped(name, wanted, "this host has no such timer, and it was not armed")
    elif held == moved:
        fidelity.adjusted(name, wanted, held, "moved along with the TSC that jumped")
    elif held == 0:
        fidelity.adjusted(name, wanted, held, "the timer was due, and has fired")
    else:
        fidelity.refused(name, wanted, held, "the host took the value and holds another")
