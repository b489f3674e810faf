"""The kernel's names of MSRs (asm/msr-index.h, asm/kvm_para.h); their numbers are the CPU makers'.

<linux/kvm.h> has no numbers of MSRs but the paravirtual ones, which are taken from it.
"""

from __future__ import annotations

import re

from .._core import lib
from ..errors import BadField

IA32_TSC = 0x10
IA32_TSC_ADJUST = 0x3B
IA32_FEAT_CTL = 0x3A
MTRR_CAP = 0xFE
IA32_MCG_CAP = 0x179
IA32_MISC_ENABLE = 0x1A0
MTRR_PHYS_BASE0 = 0x200
MTRR_DEF_TYPE = 0x2FF
CORE_PERF_FIXED_CTR_CTRL = 0x38D
CORE_PERF_GLOBAL_CTRL = 0x38F
IA32_MC0_CTL = 0x400
IA32_TSC_DEADLINE = 0x6E0
KVM_ASYNC_PF_INT: int = lib.MSR_KVM_ASYNC_PF_INT
KVM_ASYNC_PF_EN: int = lib.MSR_KVM_ASYNC_PF_EN

MTRR_FIXED = (0x250, 0x258, 0x259, *range(0x268, 0x270))
MCE_FIELDS = ("CTL", "STATUS", "ADDR", "MISC")
MAX_MCE_BANKS = 32
"""KVM_MAX_MCE_BANKS of arch/x86/include/asm/kvm_host.h: no host has more."""

_NAMES: dict[int, str] = {
    IA32_TSC: "MSR_IA32_TSC",
    lib.MSR_KVM_WALL_CLOCK: "MSR_KVM_WALL_CLOCK",
    lib.MSR_KVM_SYSTEM_TIME: "MSR_KVM_SYSTEM_TIME",
    lib.MSR_KVM_WALL_CLOCK_NEW: "MSR_KVM_WALL_CLOCK_NEW",
    lib.MSR_KVM_SYSTEM_TIME_NEW: "MSR_KVM_SYSTEM_TIME_NEW",
    KVM_ASYNC_PF_EN: "MSR_KVM_ASYNC_PF_EN",
    lib.MSR_KVM_STEAL_TIME: "MSR_KVM_STEAL_TIME",
    lib.MSR_KVM_PV_EOI_EN: "MSR_KVM_PV_EOI_EN",
    lib.MSR_KVM_POLL_CONTROL: "MSR_KVM_POLL_CONTROL",
    KVM_ASYNC_PF_INT: "MSR_KVM_ASYNC_PF_INT",
    lib.MSR_KVM_ASYNC_PF_ACK: "MSR_KVM_ASYNC_PF_ACK",
    lib.MSR_KVM_MIGRATION_CONTROL: "MSR_KVM_MIGRATION_CONTROL",
    0x34: "MSR_SMI_COUNT",
    IA32_FEAT_CTL: "MSR_IA32_FEAT_CTL",
    IA32_TSC_ADJUST: "MSR_IA32_TSC_ADJUST",
    0x48: "MSR_IA32_SPEC_CTRL",
    0x8B: "MSR_IA32_UCODE_REV",
    0x9E: "MSR_IA32_SMBASE",
    0xCE: "MSR_PLATFORM_INFO",
    0xE1: "MSR_IA32_UMWAIT_CONTROL",
    MTRR_CAP: "MSR_MTRRcap",
    0x10A: "MSR_IA32_ARCH_CAPABILITIES",
    0x122: "MSR_IA32_TSX_CTRL",
    0x140: "MSR_MISC_FEATURES_ENABLES",
    0x174: "MSR_IA32_SYSENTER_CS",
    0x175: "MSR_IA32_SYSENTER_ESP",
    0x176: "MSR_IA32_SYSENTER_EIP",
    IA32_MCG_CAP: "MSR_IA32_MCG_CAP",
    0x17A: "MSR_IA32_MCG_STATUS",
    0x17B: "MSR_IA32_MCG_CTL",
    IA32_MISC_ENABLE: "MSR_IA32_MISC_ENABLE",
    0x1C4: "MSR_IA32_XFD",
    0x1C5: "MSR_IA32_XFD_ERR",
    0x1D9: "MSR_IA32_DEBUGCTLMSR",
    0x1DB: "MSR_IA32_LASTBRANCHFROMIP",
    0x1DC: "MSR_IA32_LASTBRANCHTOIP",
    0x1DD: "MSR_IA32_LASTINTFROMIP",
    0x1DE: "MSR_IA32_LASTINTTOIP",
    0x1FC: "MSR_IA32_POWER_CTL",
    0x250: "MSR_MTRRfix64K_00000",
    0x258: "MSR_MTRRfix16K_80000",
    0x259: "MSR_MTRRfix16K_A0000",
    **{0x268 + n: f"MSR_MTRRfix4K_{0xC0000 + n * 0x8000:X}" for n in range(8)},
    0x277: "MSR_IA32_CR_PAT",
    MTRR_DEF_TYPE: "MSR_MTRRdefType",
    0x345: "MSR_IA32_PERF_CAPABILITIES",
    CORE_PERF_FIXED_CTR_CTRL: "MSR_CORE_PERF_FIXED_CTR_CTRL",
    0x38E: "MSR_CORE_PERF_GLOBAL_STATUS",
    CORE_PERF_GLOBAL_CTRL: "MSR_CORE_PERF_GLOBAL_CTRL",
    0x390: "MSR_CORE_PERF_GLOBAL_OVF_CTRL",
    0x3F1: "MSR_IA32_PEBS_ENABLE",
    0x4D0: "MSR_IA32_MCG_EXT_CTL",
    0x600: "MSR_IA32_DS_AREA",
    0x6A0: "MSR_IA32_U_CET",
    0x6A2: "MSR_IA32_S_CET",
    0x6A4: "MSR_IA32_PL0_SSP",
    0x6A5: "MSR_IA32_PL1_SSP",
    0x6A6: "MSR_IA32_PL2_SSP",
    0x6A7: "MSR_IA32_PL3_SSP",
    0x6A8: "MSR_IA32_INT_SSP_TAB",
    IA32_TSC_DEADLINE: "MSR_IA32_TSC_DEADLINE",
    0xD90: "MSR_IA32_BNDCFGS",
    0xDA0: "MSR_IA32_XSS",
    0xC0000081: "MSR_STAR",
    0xC0000082: "MSR_LSTAR",
    0xC0000083: "MSR_CSTAR",
    0xC0000084: "MSR_SYSCALL_MASK",
    0xC0000102: "MSR_KERNEL_GS_BASE",
    0xC0000103: "MSR_TSC_AUX",
    0xC0000104: "MSR_AMD64_TSC_RATIO",
    0xC0010015: "MSR_K7_HWCR",
    0xC0010117: "MSR_VM_HSAVE_PA",
    0xC001011F: "MSR_AMD64_VIRT_SPEC_CTRL",
    0xC0010140: "MSR_AMD64_OSVW_ID_LENGTH",
    0xC0010141: "MSR_AMD64_OSVW_STATUS",
    0xC0011029: "MSR_AMD64_DE_CFG",
    **{0x186 + n: f"MSR_P6_EVNTSEL{n}" for n in range(8)},
    **{0xC1 + n: f"MSR_P6_PERFCTR{n}" for n in range(8)},
    **{0x4C1 + n: f"MSR_IA32_PMC{n}" for n in range(8)},
    **{0x309 + n: f"MSR_CORE_PERF_FIXED_CTR{n}" for n in range(4)},
    **{0xC0010000 + n: f"MSR_K7_EVNTSEL{n}" for n in range(4)},
    **{0xC0010004 + n: f"MSR_K7_PERFCTR{n}" for n in range(4)},
    **{0xC0010200 + 2 * n: f"MSR_F15H_PERF_CTL{n}" for n in range(6)},
    **{0xC0010201 + 2 * n: f"MSR_F15H_PERF_CTR{n}" for n in range(6)},
}
for _n in range(16):
    _NAMES[MTRR_PHYS_BASE0 + 2 * _n] = f"MSR_MTRRphysBase{_n}"
    _NAMES[MTRR_PHYS_BASE0 + 2 * _n + 1] = f"MSR_MTRRphysMask{_n}"
for _n in range(MAX_MCE_BANKS):
    for _k, _field in enumerate(MCE_FIELDS):
        _NAMES[IA32_MC0_CTL + 4 * _n + _k] = f"MSR_IA32_MC{_n}_{_field}"
_INDICES = {name: index for index, name in _NAMES.items()}


def msr_name(index: int) -> str:
    """The kernel's name of an MSR, or its number in hexadecimal."""
    return _NAMES.get(index) or f"{index:#x}"


def msr_index(name: str, where: str) -> int:
    """The number that :func:`msr_name` gave ``name`` to. Raises :class:`BadField` for a name that is none."""
    index = _INDICES.get(name)
    if index is None:
        if type(name) is not str or not re.fullmatch("0x[0-9a-f]{1,8}", name):
            raise BadField(f"{where}: {str(name)[:40]!r} is not an MSR")
        index = int(name, 16)
    return index
