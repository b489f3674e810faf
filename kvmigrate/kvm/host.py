"""What this host's KVM can give a guest, asked once: what a saved state is checked against before any of it is set."""

from __future__ import annotations

from functools import cached_property

from ..record import dataclass
from ..state.section import Value
from .lists import pack_cpuid

CpuidEntry = dict[str, Value]


@dataclass(frozen=True)
class Host:
    """The answers of /dev/kvm that matter to state. ``nested_state_bytes`` is 0 without KVM_CAP_NESTED_STATE."""

    vcpu_mmap_bytes: int
    supported_cpuid: tuple[CpuidEntry, ...]
    msr_indices: tuple[int, ...]
    has_sregs2: bool
    can_scale_tsc: bool
    has_tsc_deadline: bool
    nested_state_bytes: int
    mce_capabilities: int

    @cached_property
    def packed_cpuid(self) -> bytes:
        """The supported entries as KVM_SET_CPUID2 takes them."""
        return pack_cpuid(self.supported_cpuid, "the CPUID that this host supports")

    @cached_property
    def offered_cpuid(self) -> list[CpuidEntry]:
        """What the kernel makes of them when a vCPU is given all: filled by the process's first (:mod:`.vcpu`)."""
        return []

    @cached_property
    def cpuid_by_leaf(self) -> dict[tuple[int, int], CpuidEntry]:
        """The supported entries by (function, index)."""
        return {(entry["function"], entry["index"]): entry for entry in self.supported_cpuid}

    @cached_property
    def xstate_mask(self) -> int:
        """The XSAVE components that guests may have here: CPUID leaf 0xD, user (XCR0) and supervisor (IA32_XSS) ones.
        x87 and SSE exist on every CPU, even where the leaf is missing."""
        user = self.cpuid_by_leaf.get((0xD, 0), {})
        system = self.cpuid_by_leaf.get((0xD, 1), {})
        low = user.get("eax", 0) | system.get("ecx", 0) | 3
        high = user.get("edx", 0) | system.get("edx", 0)
        return int(low | high << 32)
