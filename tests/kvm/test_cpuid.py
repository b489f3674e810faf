"""The guest's CPUID, and the comparison of two hosts by feature."""

from __future__ import annotations

from typing import Any

import pytest

from kvmigrate.errors import BadField
from kvmigrate.kvm import lists
from kvmigrate.kvm.cpuid import compare_cpuid, guest_cpuid, parse_cpuid
from kvmigrate.kvm.cpuid_names import WORDS, bit_name
from kvmigrate.kvm.lists import CheckedCpuid, pack_cpuid
from kvmigrate.kvm.system import System
from kvmigrate.kvm.vcpu import Vcpu


def entry(function: int, index: int = 0, **registers: int) -> dict[str, Any]:
    return {"function": function, "index": index, "flags": 0, "eax": 0, "ebx": 0, "ecx": 0, "edx": 0} | registers


HOST = [
    entry(0, eax=0x1F),
    entry(1, ecx=1 << 5 | 1 << 26 | 1 << 28, edx=1 << 25),
    entry(4, 0, eax=0x121, flags=1),
    entry(4, 3, eax=0x163, flags=1),
    entry(7, 0, ebx=1 << 5 | 1 << 16, flags=1),
    entry(0xA, eax=0x7300805),
    entry(0x80000001, ecx=1 << 2 | 1 << 5),
]


def leaf(entries: list[dict[str, Any]], function: int, index: int = 0) -> dict[str, Any]:
    return next(e for e in entries if (e["function"], e["index"]) == (function, index))


@pytest.mark.parametrize("nr_cpus", [1, 2, 3, 8, 64])
def test_every_vcpu_sees_its_own_apic_id_and_one_package_of_cores(nr_cpus: int) -> None:
    for apic_id in range(nr_cpus):
        guest = guest_cpuid(HOST, apic_id, nr_cpus)
        assert leaf(guest, 1)["ebx"] >> 24 == apic_id
        smt, cores, end = (leaf(guest, 0xB, n) for n in range(3))
        assert [level["edx"] for level in (smt, cores, end)] == [apic_id] * 3
        assert smt["ebx"] == 1 and cores["ebx"] == nr_cpus and end["ebx"] == 0
        assert 1 << cores["eax"] >= nr_cpus and smt["eax"] == 0
        assert leaf(guest, 1)["edx"] >> 28 & 1 == (nr_cpus > 1)


def test_what_cannot_be_migrated_is_not_offered() -> None:
    guest = guest_cpuid(HOST, 0, 2)
    assert not leaf(guest, 1)["ecx"] & 1 << 5 and not leaf(guest, 0x80000001)["ecx"] & 1 << 2
    assert leaf(guest, 0xA) == entry(0xA)
    assert leaf(guest, 1)["ecx"] >> 31 and leaf(guest, 1)["ecx"] >> 26 & 1


def test_the_hosts_own_entries_stay_as_they_were() -> None:
    before = [dict(e) for e in HOST]
    guest_cpuid(HOST, 1, 4)
    assert before == HOST


def test_missing_features_are_refused_by_name_and_extra_ones_do_no_harm() -> None:
    poorer = [e if e["function"] != 7 else entry(7, 0, ebx=1 << 16) for e in HOST]
    assert [item.name for item in compare_cpuid(HOST, poorer)] == ["cpuid.avx2"]
    assert not list(compare_cpuid(poorer, HOST))
    without = [e for e in HOST if e["function"] != 7]
    assert {item.name for item in compare_cpuid(HOST, without)} == {"cpuid.avx2", "cpuid.avx512f"}


def test_bits_that_the_guest_turns_on_itself_are_not_the_hosts() -> None:
    osxsave = [entry(1, ecx=1 << 27), entry(7, 0, ecx=1 << 4)]
    assert not list(compare_cpuid(osxsave, [entry(1), entry(7)]))


def test_names_are_at_their_bits() -> None:
    for word, bit, name in [
        ((1, 0, "ecx"), 0, "pni"),
        ((1, 0, "ecx"), 21, "x2apic"),
        ((1, 0, "ecx"), 31, "hypervisor"),
        ((1, 0, "edx"), 28, "ht"),
        ((1, 0, "edx"), 31, "pbe"),
        ((7, 0, "ebx"), 31, "avx512vl"),
        ((7, 0, "ebx"), 20, "smap"),
        ((7, 0, "ecx"), 22, "rdpid"),
        ((7, 0, "ecx"), 31, "pks"),
        ((7, 0, "edx"), 24, "amx_tile"),
        ((7, 0, "edx"), 31, "spec_ctrl_ssbd"),
        ((7, 1, "eax"), 26, "lam"),
        ((0xD, 0, "eax"), 18, "xstate_tiledata"),
        ((0x40000001, 0, "eax"), 24, "kvm_clock_stable"),
        ((0x80000001, 0, "ecx"), 22, "topoext"),
        ((0x80000001, 0, "edx"), 29, "lm"),
        ((0x80000008, 0, "ebx"), 24, "amd_ssbd"),
    ]:
        assert bit_name(word, bit) == name
    assert all(max(bits) < 32 for bits in WORDS.values())
    assert bit_name((7, 2, "edx"), 30) == "cpuid_7_2_edx_bit30"


def test_cpuid_that_cannot_be_is_refused() -> None:
    hostile: Any
    for hostile in ([], [entry(1)] * 257, [entry(1), entry(1)], [{}], [entry(1, eax=-1)], "text", [entry(1, eax=True)]):
        with pytest.raises(BadField, match="cpuid"):
            parse_cpuid(hostile, [], "cpuid")
    assert parse_cpuid([entry(1)], [entry(1)], "cpuid") == ([entry(1)], b"")


@pytest.mark.kvm
def test_this_host_takes_back_what_it_offers() -> None:
    with System.open() as system, system.create_vm() as vm:
        vcpu = vm.create_vcpu(0)
        vcpu.set_cpuid2(guest_cpuid(system.supported_cpuid(), 0, 1))
        assert not list(compare_cpuid(vcpu.cpuid, vcpu.offered_cpuid))


@pytest.mark.kvm
def test_a_vcpu_that_is_given_its_cpuid_at_once_has_what_it_has_after_all_was_offered() -> None:
    with System.open() as system, system.create_vm() as vm:
        table = guest_cpuid(system.supported_cpuid(), 0, 2)
        late, at_once = vm.create_vcpu(0), vm.create_vcpu(1, cpuid=table)
        assert late.cpuid == late.offered_cpuid == at_once.offered_cpuid
        late.set_cpuid2(table)
        assert at_once.cpuid == late.cpuid != late.offered_cpuid


@pytest.mark.kvm
def test_the_kernel_is_asked_once_what_it_makes_of_all_that_it_supports(monkeypatch: pytest.MonkeyPatch) -> None:
    with System.open() as system, system.create_vm() as vm:
        table = guest_cpuid(system.supported_cpuid(), 0, 2)
        vm.create_vcpu(0)
        given: list[bytes] = []
        set_packed = Vcpu.set_cpuid2_packed

        def note(vcpu: Vcpu, packed: bytes) -> None:
            given.append(packed)
            set_packed(vcpu, packed)

        monkeypatch.setattr(Vcpu, "set_cpuid2_packed", note)
        vm.create_vcpu(1, cpuid=table)
        assert given == [pack_cpuid(table, "cpuid")]


@pytest.mark.kvm
def test_entries_that_were_checked_are_not_packed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    with System.open() as system, system.create_vm() as vm:
        table = guest_cpuid(system.supported_cpuid(), 0, 1)
        wanted, checked = vm.create_vcpu(0, cpuid=table).cpuid, CheckedCpuid(table, "cpuid")
        assert checked == table and checked.packed == pack_cpuid(table, "cpuid")
        monkeypatch.setattr(lists, "pack_cpuid", None)
        assert vm.create_vcpu(1, cpuid=checked).cpuid == wanted
        with pytest.raises(TypeError):
            vm.create_vcpu(2, cpuid=table)


def test_checked_entries_are_checked() -> None:
    with pytest.raises(BadField, match="cpuid"):
        CheckedCpuid([entry(1) | {"eax": -1}], "cpuid")
