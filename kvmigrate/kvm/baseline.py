"""The CPUID that several hosts have in common, so that a guest which is started with it can run on each of them.

Words of feature bits (:mod:`.cpuid_names`) are ANDed. What else stands in CPUID is no promise to a guest but a
description, so that each leaf has a rule: limits take the least of all hosts, identification must be the same vendor's
and is the first host's, and a leaf that differs in anything else is left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..errors import ConfigError
from .cpuid_names import WORDS, Word, bit_name
from .host import CpuidEntry

Leaf = tuple[int, int]
REGISTERS = ("eax", "ebx", "ecx", "edx")
VENDOR = ("ebx", "edx", "ecx")
# Family, model and brand; caches and TLBs; the hypervisor's signature. A guest reads them, and none decides what it may
# execute.
_FIRST_HOSTS = frozenset({1, 2, 4, 0x40000000, *range(0x80000002, 0x80000007), 0x8000001D, 0x8000001E, 0xB, 0x1F})
_HIGHEST_LEAF = frozenset({0, 0x80000000})
_ADDRESS_BITS: Leaf = (0x80000008, 0)
_XSAVE = 0xD
_LEGACY_XSAVE_BYTES = 576
_V2 = "fpu pse tsc msr pae cx8 apic sep pge cmov clflush mmx fxsr sse sse2 syscall nx lm pni ssse3 cx16 sse4_1 sse4_2 "
_V2 += "popcnt lahf_lm"
_USEFUL = "vme de mce mtrr mca pat pse36 x2apic tsc_deadline_timer hypervisor xsave xstate_x87 xstate_sse rdtscp "
_USEFUL += "constant_tsc "
_USEFUL += "kvm_clock kvm_clock2 kvm_clock_stable kvm_nop_io_delay kvm_pv_eoi kvm_pv_unhalt kvm_pv_send_ipi"
_NEEDED_FEATURES = frozenset(_V2.split(" "))
"""x86-64-v2 of the System V psABI (table 3.1), and what a 64-bit kernel cannot do without."""
BASELINE_FEATURES = _NEEDED_FEATURES.union(_USEFUL.split(" "))
"""With those that make a guest faster or its clock better, where the host has them."""


def common_cpuid(hosts: Mapping[str, Sequence[CpuidEntry]]) -> list[CpuidEntry]:
    """What all of ``hosts`` (name → what it supports) can give a guest. Raises :class:`ConfigError` when two of them
    are of different vendors."""
    tables = {name: {(entry["function"], entry["index"]): entry for entry in table} for name, table in hosts.items()}
    _require_one_vendor(tables)
    first, *others = tables.values()
    found = []
    for leaf, entry in first.items():
        entries = [entry, *(table[leaf] for table in others if leaf in table)]
        if len(entries) == len(tables) and (common := _common_entry(leaf, entries)) is not None:
            found.append(common)
    return _consistent_xsave(found)


def baseline_cpuid(supported: Sequence[CpuidEntry]) -> list[CpuidEntry]:
    """``supported`` with no more features than :data:`BASELINE_FEATURES`, which nearly every host since 2010 has.

    Raises :class:`ConfigError`, naming the features, when this host lacks any that such a guest needs."""
    found = [dict(entry) for entry in supported]
    names: set[str] = set()
    for entry in found:
        for register in REGISTERS:
            word = (entry["function"], entry["index"], register)
            kept = _bits_of(word, BASELINE_FEATURES)
            if word in WORDS:
                entry[register] &= kept
                names.update(bit_name(word, bit) for bit in range(32) if entry[register] >> bit & 1)
    if missing := sorted(_NEEDED_FEATURES - names):
        raise ConfigError(f"this host lacks {', '.join(missing)}, which the CPU baseline has: take --cpu host")
    return _consistent_xsave(found)


def lost_features(supported: Sequence[CpuidEntry], common: Sequence[CpuidEntry]) -> list[str]:
    """The names of the features of ``supported`` that ``common`` lacks."""
    kept = {(entry["function"], entry["index"]): entry for entry in common}
    lost = []
    for entry in supported:
        leaf = (entry["function"], entry["index"])
        for register in REGISTERS:
            word = (*leaf, register)
            if word in WORDS:
                gone = entry[register] & ~(kept[leaf][register] if leaf in kept else 0)
                lost += [bit_name(word, bit) for bit in range(32) if gone >> bit & 1]
    return lost


def _require_one_vendor(tables: Mapping[str, Mapping[Leaf, CpuidEntry]]) -> None:
    vendors = {name: _vendor(table) for name, table in tables.items()}
    if len(set(vendors.values())) > 1:
        listed = ", ".join(f"{name} is {vendor}" for name, vendor in vendors.items())
        raise ConfigError(f"no guest can run on CPUs of two vendors: {listed}")


def _vendor(table: Mapping[Leaf, CpuidEntry]) -> str:
    entry = table.get((0, 0), {})
    return b"".join(entry.get(name, 0).to_bytes(4, "little") for name in VENDOR).decode("ascii", "replace")


def _common_entry(leaf: Leaf, entries: Sequence[CpuidEntry]) -> CpuidEntry | None:
    """One leaf that all hosts have; None when it has no meaning that they share."""
    common = dict(entries[0])
    for register in REGISTERS:
        values = [entry[register] for entry in entries]
        if (*leaf, register) in WORDS:
            for value in values:
                common[register] &= value
        elif leaf[0] in _HIGHEST_LEAF and register == "eax":
            common[register] = min(values)
        elif leaf == _ADDRESS_BITS and register == "eax":
            # Physical, linear and guest-physical address bits, a byte each.
            common[register] = sum(min(value >> at & 0xFF for value in values) << at for at in (0, 8, 16))
        elif len(set(values)) > 1 and leaf[0] not in _FIRST_HOSTS and leaf[0] != _XSAVE:
            return None
    return common if leaf[0] != _XSAVE or leaf[1] < 2 or _same(entries) else None


def _same(entries: Sequence[CpuidEntry]) -> bool:
    return all(entry == entries[0] for entry in entries)


def _consistent_xsave(table: list[CpuidEntry]) -> list[CpuidEntry]:
    """Leaf 0xD tells only components that are left, and how much room they take (Intel SDM volume 1, 13.2)."""
    leaves = {entry["index"]: entry for entry in table if entry["function"] == _XSAVE}
    if 0 not in leaves:
        return table
    described = sum(1 << index for index in leaves if index >= 2) | 3
    leaves[0]["eax"] &= described
    components = leaves[0]["eax"] | leaves.get(1, {}).get("ecx", 0)
    sizes = [
        entry["eax"] + entry["ebx"] for index, entry in leaves.items() if index >= 2 and leaves[0]["eax"] >> index & 1
    ]
    leaves[0]["ebx"] = leaves[0]["ecx"] = max([_LEGACY_XSAVE_BYTES, *sizes])
    return [
        entry
        for entry in table
        if entry["function"] != _XSAVE or entry["index"] < 2 or components >> entry["index"] & 1
    ]


def _bits_of(word: Word, names: frozenset[str]) -> int:
    return sum(1 << bit for bit, name in WORDS.get(word, {}).items() if name in names)
