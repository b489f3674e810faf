"""Names of CPUID feature bits as /proc/cpuinfo has them, for refusals that a person understands.

Bits: Intel SDM volume 2A, CPUID; AMD APM volume 3, appendix E; Linux, arch/x86/include/asm/cpufeatures.h.
"""

from __future__ import annotations

Word = tuple[int, int, str]
"""Function, index and register of a word of feature bits."""

_WORDS: dict[Word, str] = {
    (1, 0, "ecx"): "pni pclmulqdq dtes64 monitor ds_cpl vmx smx est tm2 ssse3 cid sdbg fma cx16 xtpr pdcm - pcid dca "
    "sse4_1 sse4_2 x2apic movbe popcnt tsc_deadline_timer aes xsave osxsave avx f16c rdrand hypervisor",
    (1, 0, "edx"): "fpu vme de pse tsc msr pae mce cx8 apic - sep mtrr pge mca cmov pat pse36 pn clflush - dts acpi "
    "mmx fxsr sse sse2 ss ht tm ia64 pbe",
    (6, 0, "eax"): "dtherm ida arat",
    (7, 0, "ebx"): "fsgsbase tsc_adjust sgx bmi1 hle avx2 fdp_excptn_only smep bmi2 erms invpcid rtm cqm zero_fcs_fds "
    "mpx rdt_a avx512f avx512dq rdseed adx smap avx512ifma - clflushopt clwb intel_pt avx512pf avx512er avx512cd "
    "sha_ni avx512bw avx512vl",
    (7, 0, "ecx"): "prefetchwt1 avx512vbmi umip pku ospke waitpkg avx512_vbmi2 shstk gfni vaes vpclmulqdq "
    "avx512_vnni avx512_bitalg tme avx512_vpopcntdq - la57 - - - - - rdpid - bus_lock_detect cldemote - movdiri "
    "movdir64b enqcmd sgx_lc pks",
    (7, 0, "edx"): "- - avx512_4vnniw avx512_4fmaps fsrm uintr - - avx512_vp2intersect srbds_ctrl md_clear "
    "rtm_always_abort - tsx_force_abort serialize hybrid_cpu tsxldtrk - pconfig arch_lbr ibt - amx_bf16 avx512_fp16 "
    "amx_tile amx_int8 spec_ctrl intel_stibp flush_l1d arch_capabilities core_capabilities spec_ctrl_ssbd",
    (7, 1, "eax"): "sha512 sm3 sm4 - avx_vnni avx512_bf16 - cmpccxadd - - fzrm fsrs fsrc - - - - fred lkgs wrmsrns - "
    "amx_fp16 - avx_ifma - - lam",
    (7, 2, "edx"): "psfd intel_ipred_ctrl rrsba_ctrl ddpd_u bhi_ctrl mcdt_no",
    (0xD, 0, "eax"): "xstate_x87 xstate_sse xstate_avx xstate_bndregs xstate_bndcsr xstate_opmask xstate_zmm_hi256 "
    "xstate_hi16_zmm xstate_pt xstate_pkru xstate_pasid xstate_cet_u xstate_cet_s - - - - xstate_tilecfg "
    "xstate_tiledata",
    (0xD, 1, "eax"): "xsaveopt xsavec xgetbv1 xsaves xfd",
    (0x40000001, 0, "eax"): "kvm_clock kvm_nop_io_delay kvm_mmu_op kvm_clock2 kvm_async_pf kvm_steal_time kvm_pv_eoi "
    "kvm_pv_unhalt - kvm_pv_tlb_flush kvm_async_pf_vmexit kvm_pv_send_ipi kvm_poll_control kvm_pv_sched_yield "
    "kvm_async_pf_int kvm_msi_ext_dest_id kvm_hc_map_gpa_range kvm_migration_control - - - - - - kvm_clock_stable",
    (0x80000001, 0, "ecx"): "lahf_lm cmp_legacy svm extapic cr8_legacy abm sse4a misalignsse 3dnowprefetch osvw ibs "
    "xop skinit wdt - lwp fma4 tce - nodeid_msr - tbm topoext perfctr_core perfctr_nb - bpext ptsc perfctr_llc mwaitx",
    (0x80000001, 0, "edx"): "- - - - - - - - - - - syscall - - - - - - - mp nx - mmxext - - fxsr_opt pdpe1gb rdtscp - "
    "lm 3dnowext 3dnow",
    (0x80000007, 0, "edx"): "- - - - - - - - constant_tsc",
    (0x80000008, 0, "ebx"): "clzero irperf xsaveerptr - rdpru - - - - wbnoinvd - - amd_ibpb - amd_ibrs amd_stibp - "
    "amd_stibp_always_on - - - - - amd_ppin amd_ssbd virt_ssbd amd_ssb_no - amd_psfd btc_no",
}

WORDS: dict[Word, dict[int, str]] = {
    word: {bit: name for bit, name in enumerate(names.split()) if name != "-"} for word, names in _WORDS.items()
}
"""Every word of feature bits that is compared, with its bits' names."""


def bit_name(word: Word, bit: int) -> str:
    """The name of a feature bit, or where it lies."""
    function, index, register = word
    return WORDS[word].get(bit) or f"cpuid_{function:x}_{index}_{register}_bit{bit}"
