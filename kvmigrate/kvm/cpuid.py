"""What CPUID tells the guest: made from what the host supports, and checked against another host's."""

from __future__ import annotations

from collections.abc import Iterable

from ..errors import BadField
from ..state.fidelity import Fidelity
from ..state.section import Value
from .cpuid_names import WORDS, Word, bit_name
from .host import CpuidEntry
from .lists import MAX_CPUID_ENTRIES, pack_cpuid

_VMX = 1 << 5
_SVM = 1 << 2
_TSC_DEADLINE = 1 << 24
_HYPERVISOR = 1 << 31
_X2APIC = 1 << 21
_HT = 1 << 28

# Bits that say what the guest itself turned on, or what we and the in-kernel chips add, not what the host supports.
_NOT_THE_HOSTS: dict[Word, int] = {
    (1, 0, "ecx"): 1 << 3 | 1 << 27 | _TSC_DEADLINE | _HYPERVISOR | _X2APIC,
    (1, 0, "edx"): 1 << 9 | _HT,
    (7, 0, "ecx"): 1 << 4,
    (0x80000001, 0, "ecx"): 1 << 1,
}


def guest_cpuid(supported: Iterable[CpuidEntry], apic_id: int, nr_cpus: int) -> list[CpuidEntry]:
    """The CPUID of the vCPU with ``apic_id`` in a machine of one package with ``nr_cpus`` cores of one thread each:
    all that the host supports, but for nested virtualisation and performance counters, which are not migrated."""
    entries = [dict(entry) for entry in supported if entry["function"] not in (0xB, 0x1F)]
    for entry in entries:
        patch = _PATCHES.get(entry["function"])
        if patch is not None:
            patch(entry, apic_id, nr_cpus)
    highest = next((entry["eax"] for entry in entries if entry["function"] == 0), 0)
    if highest >= 0xB:
        entries += _topology(apic_id, nr_cpus)
    return entries


def _core_bits(nr_cpus: int) -> int:
    return (nr_cpus - 1).bit_length()


def _patch_basic(entry: CpuidEntry, apic_id: int, nr_cpus: int) -> None:
    entry["ebx"] = entry["ebx"] & 0xFFFF | (1 << _core_bits(nr_cpus)) << 16 | apic_id << 24
    entry["ecx"] = entry["ecx"] & ~_VMX | _HYPERVISOR | _TSC_DEADLINE | _X2APIC
    entry["edx"] = entry["edx"] | _HT if nr_cpus > 1 else entry["edx"] & ~_HT


def _patch_caches(entry: CpuidEntry, apic_id: int, nr_cpus: int) -> None:
    if entry["eax"] & 0x1F == 0:
        return
    shared = 1 << _core_bits(nr_cpus) if entry["eax"] >> 5 & 7 >= 3 else 1
    entry["eax"] = entry["eax"] & 0x3FFF | (shared - 1) << 14 | ((1 << _core_bits(nr_cpus)) - 1) << 26


def _patch_counters(entry: CpuidEntry, apic_id: int, nr_cpus: int) -> None:
    entry.update(eax=0, ebx=0, ecx=0, edx=0)


def _patch_amd(entry: CpuidEntry, apic_id: int, nr_cpus: int) -> None:
    entry["ecx"] &= ~_SVM


def _patch_amd_cores(entry: CpuidEntry, apic_id: int, nr_cpus: int) -> None:
    entry["ecx"] = entry["ecx"] & ~0xF0FF | _core_bits(nr_cpus) << 12 | nr_cpus - 1


def _patch_amd_topology(entry: CpuidEntry, apic_id: int, nr_cpus: int) -> None:
    entry.update(eax=apic_id, ebx=apic_id & 0xFF, ecx=0)


_PATCHES = {
    1: _patch_basic,
    4: _patch_caches,
    0xA: _patch_counters,
    0x80000001: _patch_amd,
    0x80000008: _patch_amd_cores,
    0x8000001E: _patch_amd_topology,
}


def _topology(apic_id: int, nr_cpus: int) -> list[CpuidEntry]:
    """Leaf 0xB: one thread per core, all cores in one package (Intel SDM volume 2A, CPUID)."""
    significant_index = 1
    levels = [(0, 1, 1 << 8), (_core_bits(nr_cpus), nr_cpus, 2 << 8 | 1), (0, 0, 2)]
    return [
        {
            "function": 0xB,
            "index": n,
            "flags": significant_index,
            "eax": shift,
            "ebx": count,
            "ecx": kind,
            "edx": apic_id,
        }
        for n, (shift, count, kind) in enumerate(levels)
    ]


def parse_cpuid(value: Value, held: list[CpuidEntry], where: str) -> tuple[list[CpuidEntry], bytes]:
    """Check saved CPUID entries, which are hostile: as dicts, and as :func:`pack_cpuid` makes them, or nothing when
    ``held`` is the same already. Raises :class:`BadField`."""
    if held and value == held:
        return held, b""
    if not isinstance(value, list) or not 1 <= len(value) <= MAX_CPUID_ENTRIES:
        raise BadField(f"{where}: expected a list of 1 to {MAX_CPUID_ENTRIES} entries")
    packed = pack_cpuid(value, where)
    leaves = [(item["function"], item["index"]) for item in value]
    if len(set(leaves)) != len(leaves):
        raise BadField(f"{where}: an entry comes twice")
    return value, packed


def _words_by_leaf() -> dict[tuple[int, int], list[Word]]:
    leaves = dict.fromkeys(word[:2] for word in WORDS)
    return {leaf: [word for word in WORDS if word[:2] == leaf] for leaf in leaves}


_WORDS_OF = _words_by_leaf()


def compare_cpuid(wanted: Iterable[CpuidEntry], supported: Iterable[CpuidEntry], where: str = "cpuid") -> Fidelity:
    """Whether a guest with ``wanted`` can run where ``supported`` is all there is: a feature bit that it sees and that
    the host lacks is refused by its name. KVM_SET_CPUID2 itself takes nearly anything."""
    fidelity = Fidelity()
    have = {(entry["function"], entry["index"]): entry for entry in supported}
    for entry in wanted:
        leaf = entry["function"], entry["index"]
        for word in _WORDS_OF.get(leaf, ()):
            missing = entry[word[2]] & ~(have[leaf][word[2]] if leaf in have else 0) & ~_NOT_THE_HOSTS.get(word, 0)
            for bit in range(32) if missing else ():
                if missing >> bit & 1:
                    fidelity.refused(f"{where}.{bit_name(word, bit)}", 1, 0, "this host's CPU or KVM lacks the feature")
    if not any(True for _ in fidelity):
        fidelity.exact(f"{where}.features")
    return fidelity
