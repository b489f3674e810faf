"""What several hosts have in common is what each of them can run, and no more is asked of any."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmigrate.errors import ConfigError
from kvmigrate.kvm.baseline import BASELINE_FEATURES, REGISTERS, baseline_cpuid, common_cpuid, lost_features
from kvmigrate.kvm.cpu_files import choose_cpu, read_cpu_file
from kvmigrate.kvm.cpuid import compare_cpuid, guest_cpuid
from kvmigrate.kvm.cpuid_names import WORDS, bit_name
from kvmigrate.kvm.system import System
from kvmigrate.state.fidelity import Verdict

Table = list[dict[str, Any]]


def entry(function: int, index: int = 0, **registers: int) -> dict[str, Any]:
    return {"function": function, "index": index, "flags": 0, "eax": 0, "ebx": 0, "ecx": 0, "edx": 0} | registers


VENDOR = {"ebx": 0x68747541, "edx": 0x69746E65, "ecx": 0x444D4163}
HIGH_WORD = st.integers(0, 0xFFFFFFFF)


def host(ecx: int = 0, xcr0: int = 7, **more: int) -> Table:
    """A made-up host with AVX state of 256 bytes at 576."""
    table = [entry(0, eax=0xD, **VENDOR), entry(1, ecx=ecx, edx=0x178BFBFF), entry(7, ebx=more.get("leaf7", 0))]
    table += [entry(0xD, 0, eax=xcr0, ebx=832, ecx=832), entry(0xD, 1)]
    table += [entry(0xD, 2, eax=256, ebx=576)] if xcr0 & 4 else []
    return [*table, entry(0x80000008, eax=more.get("bits", 0x3030))]


@pytest.fixture(scope="module")
def here() -> Table:
    with System.open() as system:
        return system.supported_cpuid()


@given(HIGH_WORD, HIGH_WORD, HIGH_WORD, HIGH_WORD)
def test_every_host_can_run_what_all_have_in_common(one: int, other: int, seven: int, also: int) -> None:
    hosts = {"a": host(one, leaf7=seven), "b": host(other, leaf7=also)}
    common = common_cpuid(hosts)
    for table in hosts.values():
        assert [item for item in compare_cpuid(common, table) if item.verdict is Verdict.REFUSED] == []
    words = {(e["function"], "ecx" if e["function"] == 1 else "ebx"): e for e in common}
    assert words[1, "ecx"]["ecx"] == one & other and words[7, "ebx"]["ebx"] == seven & also


def test_limits_are_those_of_the_weakest_host() -> None:
    common = {e["function"]: e for e in common_cpuid({"a": host(bits=0x3930), "b": host(bits=0x302E)})}
    assert common[0x80000008]["eax"] == 0x302E


def test_a_component_that_one_host_lacks_takes_no_room() -> None:
    common = {(e["function"], e["index"]): e for e in common_cpuid({"a": host(xcr0=7), "b": host(xcr0=3)})}
    assert (0xD, 2) not in common
    assert (common[0xD, 0]["eax"], common[0xD, 0]["ecx"]) == (3, 576)


def test_two_vendors_are_refused_by_name() -> None:
    other = host()
    other[0] |= {"ebx": 0x756E6547, "edx": 0x49656E69, "ecx": 0x6C65746E}
    with pytest.raises(ConfigError, match="a is AuthenticAMD, b is GenuineIntel"):
        common_cpuid({"a": host(), "b": other})


def test_what_a_host_loses_is_named() -> None:
    rich, poor = host(1 << 23 | 1 << 20), host(1 << 20)
    common = common_cpuid({"rich": rich, "poor": poor})
    assert lost_features(rich, common) == ["popcnt"] and lost_features(poor, common) == []


def test_this_host_has_everything_in_common_with_itself(here: Table) -> None:
    common = common_cpuid({"a": here, "b": copy.deepcopy(here)})
    assert lost_features(here, common) == []
    assert [item for item in compare_cpuid(common, here) if item.verdict is Verdict.REFUSED] == []


def full_host() -> Table:
    """Every feature bit that has a name, and the leaves that a guest's CPUID is made from."""
    leaves = sorted({(function, index) for function, index, _ in WORDS})
    table = [entry(0, eax=0xD, **VENDOR)]
    for function, index in leaves:
        named = {register: WORDS.get((function, index, register), {}) for register in REGISTERS}
        words = {register: sum(1 << bit for bit in bits) for register, bits in named.items()}
        table.append(entry(function, index, **words))
    return table


def test_the_baseline_has_no_other_features() -> None:
    names = set()
    for one in baseline_cpuid(full_host()):
        for register in REGISTERS:
            word = (one["function"], one["index"], register)
            names |= {bit_name(word, bit) for bit in range(32) if word in WORDS and one[register] >> bit & 1}
    assert names == BASELINE_FEATURES
    assert guest_cpuid(baseline_cpuid(full_host()), 0, 2)


def test_a_host_below_the_baseline_is_refused_by_name() -> None:
    lacking = full_host()
    next(one for one in lacking if one["function"] == 1)["ecx"] &= ~(1 << 23)
    with pytest.raises(ConfigError, match="lacks popcnt,"):
        baseline_cpuid(lacking)


def test_a_file_that_asks_for_more_than_this_host_has_is_refused_by_name(here: Table, tmp_path: Path) -> None:
    more = copy.deepcopy(here)
    next(one for one in more if one["function"] == 7 and one["index"] == 0)["ecx"] |= 1 << 16
    path = tmp_path / "cpu.json"
    path.write_text(json.dumps({"format": 1, "cpuid": more}))
    if any(one["function"] == 7 and one["ecx"] >> 16 & 1 for one in here):
        assert choose_cpu(str(path), here)
    else:
        with pytest.raises(ConfigError, match="this host lacks la57"):
            choose_cpu(str(path), here)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "is not JSON"),
        ("[1]", "tells no CPU"),
        ('{"format": 2, "cpuid": []}', "tells no CPU"),
        ('{"format": 1, "cpuid": []}', "1 to 256 entries"),
        ('{"format": 1, "cpuid": [{"function": 0}]}', "cpuid"),
        (json.dumps({"format": 1, "cpuid": [entry(-1)]}), "cpuid"),
        ("[" * 100000, "is not JSON"),
        (" " * (5 << 20), "over 4 MiB"),
    ],
)
def test_a_bad_file_is_refused_in_one_line(tmp_path: Path, text: str, why: str) -> None:
    path = tmp_path / "cpu.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=why) as refused:
        read_cpu_file(path)
    assert "cpu.json" in str(refused.value) and "\n" not in str(refused.value)
