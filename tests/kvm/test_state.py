"""Save → load into a second VM → save is equal but for the named clocks; what a load leaves out is noticed."""

from __future__ import annotations

import time

import pytest

from kvmigrate._core import lib
from kvmigrate.errors import RestoreRefused
from kvmigrate.kvm import vcpu_state
from kvmigrate.kvm.vm_state import load_state, save_state
from kvmigrate.state.fidelity import Verdict

from .moving import DEADLINE, not_exact, oracle, over_the_wire, set_vectors, transfer, with_timer
from .tiny import CODE, TinyVm, tiny

pytestmark = pytest.mark.kvm


def test_save_load_save_is_equal_but_for_the_clocks(pair: tuple[TinyVm, TinyVm]) -> None:
    source, target = pair
    saved, fidelity = transfer(source, target)
    fidelity.require()
    assert oracle(saved, target) == []
    assert set(not_exact(fidelity)) <= {
        "clock.clock",
        "vcpu0.msrs.MSR_IA32_TSC",
        "vcpu1.msrs.MSR_IA32_TSC",
        "vcpu0.lapic.0x390",
        *(f"pit2.channels[{n}].count_load_time" for n in range(3)),
    }
    assert {"vcpu0.regs", "vcpu0.xsave", "vcpu0.msrs.MSR_LSTAR", "pic_master", "ioapic"} <= set(fidelity.exact_names())


def test_every_register_arrives_under_its_name(pair: tuple[TinyVm, TinyVm]) -> None:
    source, target = pair
    transfer(source, target)
    regs, fpu = target.cpu.get_regs(), target.cpu.get_fpu()
    assert regs["rax"] == 7 and regs["r15"] == 0x1111 * 14 + 7 and regs["rip"] == CODE
    assert fpu["xmm"][15] == bytes([15] * 16)
    assert int.from_bytes(target.cpu.get_xsave()[24:28], "little") == 0x1F80 | 1 << 13
    assert target.cpu.get_msrs([0xC0000082, 0x201]) == {0xC0000082: 0xFFFF800000001000, 0x201: 0xFF80000800}


def test_a_loaded_guest_goes_on_where_it_stopped(pair: tuple[TinyVm, TinyVm]) -> None:
    source, target = pair
    source.start()
    source.group.resume()
    time.sleep(0.05)
    source.group.pause()
    before = source.cpu.get_regs()["rcx"]
    target.memory.write(0, source.memory.read(0, source.memory.size_bytes))
    saved, fidelity = transfer(source, target)
    fidelity.require()
    assert [cpu.nr_entries for cpu in target.vm.vcpus] == [0, 0]
    target.start()
    target.group.resume()
    time.sleep(0.05)
    target.group.pause()
    after = target.cpu.get_regs()
    assert after["rcx"] > before > 0x2229 and after["rax"] == saved[1][0]["regs"]["rax"]
    assert target.cpu.get_fpu()["xmm"] == saved_xmm(source)


def saved_xmm(vm: TinyVm) -> list[bytes]:
    xmm: list[bytes] = vm.cpu.get_fpu()["xmm"]
    return xmm


@pytest.mark.parametrize(
    "left_out", [name for name in vcpu_state.ORDER if name not in ("cpuid", "tsc_khz", "xcrs", "nested_state")]
)
def test_an_item_that_is_left_out_is_noticed(
    pair: tuple[TinyVm, TinyVm], monkeypatch: pytest.MonkeyPatch, left_out: str
) -> None:
    source, target = pair
    source.vm.vcpus[1].set_mp_state({"mp_state": lib.KVM_MP_STATE_HALTED})
    monkeypatch.setattr(vcpu_state, "ORDER", tuple(name for name in vcpu_state.ORDER if name != left_out))
    saved, _ = transfer(source, target)
    assert oracle(saved, target), f"{left_out} was not loaded, and nobody saw it"


def test_a_stale_xmm_register_is_noticed(pair: tuple[TinyVm, TinyVm]) -> None:
    source, target = pair
    saved, _ = transfer(source, target)
    set_vectors(target, [bytes([n if n != 7 else 0] * 16) for n in range(16)])
    assert oracle(saved, target) == ["vcpu0.xsave"]


def test_events_before_registers_lose_a_pending_exception(
    pair: tuple[TinyVm, TinyVm], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = pair
    page_fault = {"injected": 0, "nr": 14, "has_error_code": 1, "pending": 1, "error_code": 6}
    events = source.cpu.get_vcpu_events() | {"exception": page_fault}
    events |= {"exception_has_payload": 1, "exception_payload": 0xDEAD000}
    source.cpu.set_vcpu_events(events | {"flags": events["flags"] | lib.KVM_VCPUEVENT_VALID_PAYLOAD})
    saved, fidelity = transfer(source, target)
    fidelity.require()
    assert oracle(saved, target) == []
    held = target.cpu.get_vcpu_events()
    assert held["exception"] == page_fault and held["exception_payload"] == 0xDEAD000
    shuffled = ("vcpu_events", *(name for name in vcpu_state.ORDER if name != "vcpu_events"))
    monkeypatch.setattr(vcpu_state, "ORDER", shuffled)
    saved, _ = transfer(source, target)
    assert "vcpu0.vcpu_events.exception.pending" in oracle(saved, target)


def test_msrs_before_the_local_apic_lose_the_armed_deadline(
    pair: tuple[TinyVm, TinyVm], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = pair
    far_off = source.cpu.get_msrs([0x10])[0x10] + 10**15
    with_timer(source, DEADLINE, 0)
    assert not source.cpu.set_msrs({0x6E0: far_off})
    saved, fidelity = transfer(source, target)
    fidelity.require()
    # Where the host keeps its own TSC, the deadline has moved along with it.
    assert oracle(saved, target) == [] and 0 <= target.cpu.get_msrs([0x6E0])[0x6E0] - far_off < 10**12
    with tiny(2) as other:
        order = [name for name in vcpu_state.ORDER if name != "msrs"]
        order.insert(order.index("lapic"), "msrs")
        monkeypatch.setattr(vcpu_state, "ORDER", tuple(order))
        saved, fidelity = transfer(source, other)
        assert not_exact(fidelity)["vcpu0.msrs.MSR_IA32_TSC_DEADLINE"] is Verdict.ADJUSTED
        assert "vcpu0.msrs.MSR_IA32_TSC_DEADLINE" in oracle(saved, other)


def test_an_msr_that_this_host_lacks_is_refused_unless_it_was_at_reset(pair: tuple[TinyVm, TinyVm]) -> None:
    source, target = pair
    vm, vcpus = over_the_wire(save_state(source.vm))
    vcpus[0]["msrs"] |= {"0x4b564df0": 5, "0x4b564df1": 0}
    fidelity = load_state(target.vm, vm, vcpus)
    verdicts = not_exact(fidelity)
    assert verdicts["vcpu0.msrs.0x4b564df0"] is Verdict.REFUSED
    assert verdicts["vcpu0.msrs.0x4b564df1"] is Verdict.DROPPED
    assert "vcpu0.msrs.MSR_LSTAR" in fidelity.exact_names()
    with pytest.raises(RestoreRefused, match="0x4b564df0"):
        fidelity.require()


def test_loading_a_guest_that_asked_for_the_wall_clock_writes_no_memory(pair: tuple[TinyVm, TinyVm]) -> None:
    source, target = pair
    asked_at = 0x6000
    assert not source.cpu.set_msrs({lib.MSR_KVM_WALL_CLOCK_NEW: asked_at})
    assert source.memory.read(asked_at, 12) != bytes(12), "KVM answers at once"
    before = target.memory.read(0, target.memory.size_bytes)
    _, fidelity = transfer(source, target)
    fidelity.require()
    assert target.memory.read(0, target.memory.size_bytes) == before
    assert not_exact(fidelity)["vcpu0.msrs.MSR_KVM_WALL_CLOCK_NEW"] is Verdict.DROPPED


def test_one_refused_msr_does_not_hide_those_after_it(pair: tuple[TinyVm, TinyVm]) -> None:
    _, target = pair
    cpu = target.cpu
    assert cpu.set_msrs({0xDEAD: 1, 0xC0000081: 0x10 << 32, 0xDEAE: 1, 0x175: 0x77}) == [0xDEAD, 0xDEAE]
    assert cpu.get_msrs([0xDEAD, 0xC0000081, 0xDEAE, 0x175]) == {0xC0000081: 0x10 << 32, 0x175: 0x77}
    assert cpu.set_msr(0x175, 0x78) and not cpu.set_msr(0xDEAD, 1)
    assert (cpu.get_msr(0x175), cpu.get_msr(0xDEAD)) == (0x78, None)


def test_a_value_that_the_kernel_refuses_is_named(pair: tuple[TinyVm, TinyVm]) -> None:
    source, target = pair
    vm, vcpus = over_the_wire(save_state(source.vm))
    vcpus[0]["sregs2"]["cr4"] = 1 << 40
    vcpus[1]["mp_state"]["mp_state"] = 77
    verdicts = not_exact(load_state(target.vm, vm, vcpus))
    assert verdicts["vcpu0.sregs"] is verdicts["vcpu1.mp_state"] is Verdict.REFUSED


def test_a_feature_that_this_host_lacks_is_refused_by_its_name(pair: tuple[TinyVm, TinyVm]) -> None:
    source, target = pair
    vm, vcpus = over_the_wire(save_state(source.vm))
    leaf = next(entry for entry in vcpus[0]["cpuid"] if entry["function"] == 7 and entry["index"] == 0)
    leaf["ecx"] |= 1 << 16
    assert not_exact(load_state(target.vm, vm, vcpus))["vcpu0.cpuid.la57"] is Verdict.REFUSED


def test_another_number_of_vcpus_is_refused(pair: tuple[TinyVm, TinyVm]) -> None:
    source, target = pair
    vm, vcpus = over_the_wire(save_state(source.vm))
    assert not_exact(load_state(target.vm, vm, vcpus[:1])) == {"nr_vcpus": Verdict.REFUSED}


def test_kvmclock_goes_on_from_the_saved_value_and_not_from_the_wall_clock(pair: tuple[TinyVm, TinyVm]) -> None:
    source, target = pair
    vm, vcpus = over_the_wire(save_state(source.vm))
    vm["clock"]["clock"] = 10**15
    time.sleep(0.2)
    load_state(target.vm, vm, vcpus).require()
    assert 0 <= target.vm.get_clock()["clock"] - 10**15 < 150_000_000
