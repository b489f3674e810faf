"""Which MSRs are saved, in which order they are written, and what becomes of one that the target lacks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache

from .._core import lib
from ..errors import BadField
from ..state.fidelity import Fidelity
from ..state.section import Value
from . import msr_names as msr
from .msr_names import msr_index, msr_name
from .vcpu import Vcpu

MAX_SAVED_MSRS = 1024

# Written first: FEAT_CTL and MISC_ENABLE decide what other MSRs and CPUID may say. ASYNC_PF_INT goes before
# ASYNC_PF_EN, which would otherwise start without a vector (QEMU, kvm_put_msrs).
_FIRST = (msr.IA32_FEAT_CTL, msr.IA32_MISC_ENABLE, msr.IA32_TSC_ADJUST, msr.KVM_ASYNC_PF_INT)
# Written last: the enables of the performance counters, so that none counts while it is being set.
_LAST = (msr.CORE_PERF_FIXED_CTR_CTRL, msr.CORE_PERF_GLOBAL_CTRL)
# Not written among the others: the TSC has its own step, and the deadline must follow the TSC and the local APIC,
# whose mode decides whether the write counts (Firecracker #4666). MCG_CAP is set by an ioctl of its own.
DEFERRED = (msr.IA32_TSC, msr.IA32_TSC_DEADLINE, msr.IA32_MCG_CAP)

# Hyper-V's synthetic MSRs (TLFS, appendix F). kvm_amd and kvm_intel list them, but a guest without Hyper-V's CPUID
# leaves, which kvmigrate offers to none, takes #GP from each (Linux, kvm_hv_set_msr_common). Two of them are clocks
# that no write sets, so that comparing them would refuse every guest.
_HYPER_V = range(0x40000000, 0x40000200)

# kvm_amd writes only the low half of these for a guest whose CPUID says AMD (Linux, svm_set_msr): there SYSENTER is for
# 32-bit code alone. Linux guests put 64-bit addresses into them all the same.
_LOW_HALF = (0x175, 0x176)  # IA32_SYSENTER_ESP, IA32_SYSENTER_EIP

# A write of these makes KVM write the time into guest memory, at once (Linux, kvm_write_wall_clock), behind the back of
# the dirty log and of everyone who has counted pages. A guest that wants to know the time writes them each time anew
# (KVM msr.rst), and may use the memory for something else in between.
WALL_CLOCKS = (lib.MSR_KVM_WALL_CLOCK, lib.MSR_KVM_WALL_CLOCK_NEW)

_RESET_VALUES = {
    msr.IA32_MISC_ENABLE: 1,
    0x9E: 0x30000,
    0xCE: 1 << 31,
    0x277: 0x0007040600070406,
    lib.MSR_KVM_POLL_CONTROL: 1,
}


def indices_to_save(vcpu: Vcpu) -> tuple[int, ...]:
    """Every MSR that this host keeps for the guest: KVM's own list, which is not enough (it lacks MTRRs and machine
    check banks: Cloud Hypervisor #7944), completed by what the vCPU's own MTRRcap and MCG_CAP announce."""
    caps = vcpu.get_msrs([msr.MTRR_CAP, msr.IA32_MCG_CAP])
    nr_var = min(caps.get(msr.MTRR_CAP, 0) & 0xFF, 16)
    nr_banks = min(caps.get(msr.IA32_MCG_CAP, 0) & 0xFF, msr.MAX_MCE_BANKS)
    return vcpu.readable_msrs(_candidates(vcpu.host.msr_indices, nr_var, nr_banks))


@lru_cache(8)
def _candidates(listed: tuple[int, ...], nr_var: int, nr_banks: int) -> tuple[int, ...]:
    extra = [
        *msr.MTRR_FIXED,
        msr.MTRR_DEF_TYPE,
        *range(msr.MTRR_PHYS_BASE0, msr.MTRR_PHYS_BASE0 + 2 * nr_var),
        msr.IA32_MCG_CAP,
        *range(msr.IA32_MC0_CTL, msr.IA32_MC0_CTL + 4 * nr_banks),
        *range(lib.MSR_KVM_WALL_CLOCK_NEW, lib.MSR_KVM_ASYNC_PF_ACK),
        msr.IA32_TSC,
        msr.IA32_TSC_DEADLINE,
    ]
    return tuple(dict.fromkeys([*(index for index in listed if index not in _HYPER_V), *extra]))


def parse_msrs(value: Value, where: str) -> dict[int, int]:
    """Check saved MSRs, which are hostile. Raises :class:`BadField`."""
    if type(value) is not dict or len(value) > MAX_SAVED_MSRS:
        raise BadField(f"{where}: expected a map of at most {MAX_SAVED_MSRS} MSRs")
    indices = [msr_index(name, where) for name in value]
    values = list(value.values())
    if {*map(type, values)} - {int} or (values and not 0 <= min(values) <= max(values) < 1 << 64):
        raise BadField(f"{where}: expected integers of 64 bits")
    found = dict(zip(indices, values, strict=True))
    if len(found) < len(indices):
        raise BadField(f"{where}: an MSR comes twice under two names")
    return found


def in_write_order(values: Mapping[int, int]) -> dict[int, int]:
    """``values`` without the deferred ones, in the order in which they have to be written."""
    return {index: values[index] for index in _write_order(tuple(values))}


@lru_cache(8)
def _write_order(indices: tuple[int, ...]) -> tuple[int, ...]:
    edges = {*_FIRST, *_LAST, *DEFERRED}
    there = set(indices)
    order = [*_FIRST, *(index for index in indices if index not in edges), *_LAST]
    return tuple(index for index in order if index in there)


def load_msrs(vcpu: Vcpu, saved: Mapping[int, int], fidelity: Fidelity, where: str) -> None:
    """Write every MSR but the deferred ones and the wall clocks, read all back and give each its verdict."""
    _load_mcg_cap(vcpu, saved, fidelity, where)
    wanted = {index: value for index, value in in_write_order(saved).items() if index not in WALL_CLOCKS}
    refused = set(vcpu.set_msrs(wanted))
    compare_msrs(vcpu, wanted, refused, fidelity, where)


def drop_wall_clocks(saved: Mapping[int, int], fidelity: Fidelity, where: str) -> frozenset[str]:
    """Leave out a request for the time: KVM would answer it once more. Returns the names of those that were."""
    asked = {msr_name(index): value for index in WALL_CLOCKS if (value := saved.get(index))}
    for name, value in asked.items():
        fidelity.dropped(f"{where}.{name}", value, "a request that KVM answered when it was written")
    return frozenset(asked)


def load_wall_clocks(vcpu: Vcpu, saved: Mapping[int, int], fidelity: Fidelity, where: str) -> None:
    """The same, and take a request away that the vCPU has of its own."""
    drop_wall_clocks(saved, fidelity, where)
    none = {index: 0 for index, value in saved.items() if index in WALL_CLOCKS and not value}
    if none:
        compare_msrs(vcpu, none, set(vcpu.set_msrs(none)), fidelity, where)


def compare_msrs(vcpu: Vcpu, wanted: Mapping[int, int], refused: Iterable[int], fidelity: Fidelity, where: str) -> None:
    """Read ``wanted`` back. One that the kernel refused to write is exact all the same when it holds the value anyway
    (a read-only MSR of equal hosts), dropped when it is absent and was at its reset value, else refused."""
    held = vcpu.get_msrs(wanted)
    if held == wanted:
        fidelity.all_exact(where, [msr_name(index) for index in wanted])
        return
    for index, value in wanted.items():
        name = f"{where}.{msr_name(index)}"
        if held.get(index) == value:
            fidelity.exact(name)
        elif index in _LOW_HALF and held.get(index) == value & 0xFFFFFFFF:
            fidelity.adjusted(name, value, held[index], "kvm_amd keeps the low half, all that its SYSENTER reads")
        elif index in held:
            why = "the kernel refused to write it" if index in refused else "the host took the value and holds another"
            fidelity.refused(name, value, held[index], why)
        elif value == _RESET_VALUES.get(index, 0):
            fidelity.dropped(name, value, "this host has no such MSR, and it was at its reset value")
        else:
            fidelity.refused(name, value, None, "this host has no such MSR")


def _load_mcg_cap(vcpu: Vcpu, saved: Mapping[int, int], fidelity: Fidelity, where: str) -> None:
    """MCG_CAP says how many machine check banks there are: it is set before the banks, by KVM_X86_SETUP_MCE."""
    wanted = saved.get(msr.IA32_MCG_CAP)
    if wanted is None:
        return
    if vcpu.get_msrs([msr.IA32_MCG_CAP]).get(msr.IA32_MCG_CAP) != wanted:
        vcpu.setup_mce(wanted)
    compare_msrs(vcpu, {msr.IA32_MCG_CAP: wanted}, (), fidelity, where)
