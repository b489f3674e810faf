"""State in one piece: what the short way of a load takes is what the long way takes, and a loss is seen on either."""

from __future__ import annotations

import errno
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvmigrate._core import ffi, lib
from kvmigrate.errors import BadField
from kvmigrate.kvm import msr_table, vm_state
from kvmigrate.kvm.lists import MAX_MSRS_PER_CALL, _get_msrs_call, read_msrs, readable_msrs
from kvmigrate.kvm.msr_table import MsrTable
from kvmigrate.kvm.msrs import in_write_order
from kvmigrate.kvm.vcpu_image import STRUCTS, VcpuImage, image_of
from kvmigrate.kvm.vcpu_state import ORDER, parse_vcpu
from kvmigrate.kvm.vm_state import load_state, pack_state
from kvmigrate.state.fidelity import Fidelity, Verdict
from kvmigrate.state.section import pack, unpack

from .moving import make_unlike_reset, not_exact, oracle
from .tiny import TinyVm, tiny

STAR, CR4_RESERVED, NEITHER_ALL_NOR_NONE = 0xC0000081, 1 << 30, 0x1234


@pytest.fixture
def source() -> Iterator[TinyVm]:
    with tiny(1) as vm:
        make_unlike_reset(vm)
        yield vm


@pytest.fixture
def target() -> Iterator[TinyVm]:
    with tiny(1) as vm:
        yield vm


def loaded(vm: TinyVm, body: bytes, vcpu: Any, cpuid: Any) -> Fidelity:
    return load_state(vm.vm, body, [vcpu], [cpuid])


def test_packed_state_arrives_whole_and_takes_the_short_way(source: TinyVm, target: TinyVm) -> None:
    body, [vcpu] = pack_state(source.vm)
    assert image_of(target.cpu).take(vcpu)
    saved = vm_state.save_state(source.vm)
    fidelity = loaded(target, body, vcpu, source.cpu.cpuid)
    fidelity.require()
    assert oracle(saved, target) == []


def test_a_host_with_other_msrs_loads_the_same_the_long_way(source: TinyVm, target: TinyVm) -> None:
    body, [vcpu] = pack_state(source.vm)
    one_less = [index for index in image_of(target.cpu).msrs.values(target_table(target)) if index != 0x1D9]
    target.cpu.image = VcpuImage(target.cpu, one_less)
    assert not target.cpu.image.take(vcpu)
    saved = vm_state.save_state(source.vm)
    long_way = loaded(target, body, vcpu, source.cpu.cpuid)
    long_way.require()
    target.cpu.image = None
    assert oracle(saved, target) == []
    with tiny(1) as other:
        short_way = loaded(other, body, vcpu, source.cpu.cpuid)
    assert sorted(long_way.exact_names()) == sorted(short_way.exact_names())
    assert not_exact(long_way) == not_exact(short_way)


def target_table(vm: TinyVm) -> Any:
    return image_of(vm.cpu).memory.saved("msrs")


def test_what_the_long_way_took_lies_where_the_short_way_puts_it(source: TinyVm, target: TinyVm) -> None:
    _, [vcpu] = pack_state(source.vm)
    image = image_of(target.cpu)
    parse_vcpu(target.cpu, vcpu, target.cpu.cpuid)
    short = {key: image.memory.saved_bytes(key) for key in image.memory.parts}
    body = unpack(vcpu, "a vCPU")
    # A length that no host has: the rest is zero, so that it is the same state.
    body["xsave"] += bytes(4)
    parsed = parse_vcpu(target.cpu, pack(body), target.cpu.cpuid)
    long = {key: image.memory.saved_bytes(key) for key in image.memory.parts}
    apart = {"tsc_khz", "tsc_offset", "nested_state"}
    assert {key: long[key] for key in long.keys() - apart} == {key: short[key] for key in short.keys() - apart}
    assert parsed.tsc.khz == int.from_bytes(short["tsc_khz"], "little")


def test_who_looks_at_the_state_meanwhile_is_in_no_loads_way(source: TinyVm, target: TinyVm) -> None:
    body, [vcpu] = pack_state(source.vm)
    saved, over = vm_state.save_state(source.vm), threading.Event()

    def look() -> None:
        while not over.is_set():
            pack_state(target.vm)

    looking = threading.Thread(target=look)
    looking.start()
    try:
        for _ in range(200):
            loaded(target, body, vcpu, target.cpu.cpuid).require()
    finally:
        over.set()
        looking.join()
    assert oracle(saved, target) == []


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, 10**6), byte=st.integers(0, 255))
def test_damaged_state_that_is_taken_is_whole(source: TinyVm, target: TinyVm, at: int, byte: int) -> None:
    """Either it is refused, or what is to be set is, byte for byte, what the map says."""
    _, [vcpu] = pack_state(source.vm)
    damaged = bytearray(vcpu)
    damaged[at % len(damaged)] = byte
    image = image_of(target.cpu)
    if image.take(bytes(damaged)):
        assert unpack(image.memory.encode(), "a vCPU") == unpack(bytes(damaged), "a vCPU")


@pytest.mark.parametrize(
    ("key", "value"),
    [("id", 1), ("tsc_khz", 0), ("tsc_khz", 1 << 31), ("xcrs", {"flags": 1}), ("xcrs", {"nr_xcrs": 2})],
)
def test_what_the_struct_can_hold_and_no_vcpu_can_have_is_refused(target: TinyVm, key: str, value: Any) -> None:
    body = unpack(image_of(target.cpu).save() or b"", "a vCPU")
    body[key] = body[key] | value if isinstance(value, dict) else value
    with pytest.raises(BadField, match="vcpu0"):
        parse_vcpu(target.cpu, pack(body), target.cpu.cpuid)


def test_an_msr_that_the_kernel_does_not_take_is_named_and_the_others_are_set(source: TinyVm, target: TinyVm) -> None:
    body, [vcpu] = pack_state(source.vm)
    state = unpack(vcpu, "a vCPU")
    state["msrs"]["MSR_IA32_MC3_CTL"] = NEITHER_ALL_NOR_NONE
    fidelity = loaded(target, body, pack(state), source.cpu.cpuid)
    assert refused(fidelity) == {"vcpu0.msrs.MSR_IA32_MC3_CTL"}
    assert target.cpu.get_msrs([STAR]) == source.cpu.get_msrs([STAR]) != {STAR: 0}


def test_a_guest_that_asked_for_the_time_takes_the_short_way_too(
    source: TinyVm, target: TinyVm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As every Linux does, once."""
    assert not source.cpu.set_msrs({lib.MSR_KVM_WALL_CLOCK_NEW: 0x1000})
    body, [vcpu] = pack_state(source.vm)
    monkeypatch.delattr("kvmigrate.kvm.vcpu_state.load_msrs")
    found = not_exact(loaded(target, body, vcpu, source.cpu.cpuid))
    assert found["vcpu0.msrs.MSR_KVM_WALL_CLOCK_NEW"] is Verdict.DROPPED


def test_a_struct_that_the_kernel_does_not_take_is_named_and_the_rest_is_set(source: TinyVm, target: TinyVm) -> None:
    body, [vcpu] = pack_state(source.vm)
    state = unpack(vcpu, "a vCPU")
    state["sregs2" if "sregs2" in state else "sregs"]["cr4"] |= CR4_RESERVED
    fidelity = loaded(target, body, pack(state), source.cpu.cpuid)
    assert "vcpu0.sregs" in refused(fidelity)
    assert target.cpu.get_debugregs() == source.cpu.get_debugregs()


def test_vcpus_of_one_kind_share_a_shape_and_no_memory() -> None:
    with tiny(2) as vm:
        one, other = (image_of(vcpu) for vcpu in vm.vm.vcpus)
        assert one.memory.parts is other.memory.parts
        bodies = [unpack(body, "a vCPU") for body in pack_state(vm.vm)[1]]
        assert [body["id"] for body in bodies] == [0, 1]
        one.memory.saved("regs", "struct kvm_regs *").rax = 0x5A
        assert other.memory.saved("regs", "struct kvm_regs *").rax == 0
        less = VcpuImage(vm.vm.vcpus[1], [*one.msrs.values(one.memory.saved("msrs"))][1:])
        assert less.memory.parts is not one.memory.parts


def refused(fidelity: Fidelity) -> set[str]:
    return {name for name, verdict in not_exact(fidelity).items() if verdict is Verdict.REFUSED}


def test_every_item_of_the_order_has_a_way_to_be_set() -> None:
    assert {*STRUCTS} | {"cpuid", "tsc_khz"} == {*ORDER}


def test_the_kernel_takes_one_msr_less_than_its_limit_says(target: TinyVm) -> None:
    assert _get_msrs_call(target.cpu.fd, (STAR,) * MAX_MSRS_PER_CALL)[0] == MAX_MSRS_PER_CALL
    assert _get_msrs_call(target.cpu.fd, (STAR,) * (MAX_MSRS_PER_CALL + 1))[0] == -errno.E2BIG
    assert read_msrs(target.cpu.fd, [STAR] * 3 * MAX_MSRS_PER_CALL) == {STAR: 0}


def test_which_msrs_can_be_read_is_told_across_those_that_cannot(target: TinyVm) -> None:
    no_msr = 0x5A5A
    asked = [no_msr, STAR, *[0x10] * MAX_MSRS_PER_CALL, no_msr, no_msr, 0x1B]
    assert readable_msrs(target.cpu.fd, asked) == tuple(index for index in asked if index != no_msr)
    assert [*read_msrs(target.cpu.fd, asked)] == [STAR, 0x10, 0x1B]


@pytest.fixture
def short_calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As if a call took 50 MSRs: no host here has as many as one call really takes."""
    monkeypatch.setattr(msr_table, "MAX_MSRS_PER_CALL", 50)
    msr_table.table_of.cache_clear()
    yield
    msr_table.table_of.cache_clear()


@pytest.mark.usefixtures("short_calls")
def test_more_msrs_than_fit_one_call_are_read_and_written_by_several(source: TinyVm, target: TinyVm) -> None:
    body, [vcpu] = pack_state(source.vm)
    assert len(image_of(source.cpu).msrs.chunks) > 3
    assert image_of(target.cpu).take(vcpu)
    saved = vm_state.save_state(source.vm)
    fidelity = loaded(target, body, vcpu, source.cpu.cpuid)
    fidelity.require()
    assert oracle(saved, target) == []


@pytest.mark.usefixtures("short_calls")
def test_an_msr_of_a_later_call_that_is_not_kept_is_named(source: TinyVm, target: TinyVm) -> None:
    body, [vcpu] = pack_state(source.vm)
    state = unpack(vcpu, "a vCPU")
    state["msrs"]["MSR_IA32_MC3_CTL"] = NEITHER_ALL_NOR_NONE
    assert refused(loaded(target, body, pack(state), source.cpu.cpuid)) == {"vcpu0.msrs.MSR_IA32_MC3_CTL"}


@given(indices=st.lists(st.sampled_from([*range(0xC0000080, 0xC0000200), 0x10, 0x6E0, 0x179, 0x11]), unique=True))
def test_a_table_has_each_msr_once_and_those_first_that_are_written_in_their_order(indices: list[int]) -> None:
    table = MsrTable(indices)
    memory = bytearray(table.size_bytes)
    at = ffi.cast("char *", ffi.from_buffer(memory))
    table.init(at)
    calls = [ffi.cast("struct kvm_msrs *", at + chunk.at).nmsrs for chunk in table.chunks]
    assert sum(calls) == len(indices) and all(count <= MAX_MSRS_PER_CALL for count in calls)
    assert table.fill(at, {index: index ^ 0x5A for index in indices})
    assert table.values(at) == {index: index ^ 0x5A for index in indices}
    written = [index for index in in_write_order(dict.fromkeys(indices, 0)) if index != lib.MSR_KVM_WALL_CLOCK]
    first = [*table.values(at)][: sum(chunk.nr_written for chunk in table.chunks)]
    assert first == written
