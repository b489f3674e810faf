"""Save → load into a second VM → save is equal but for the named clocks; what a load leaves out is noticed."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from kvmigrate._core import lib
from kvmigrate.errors import BadField, RestoreRefused
from kvmigrate.kvm import vcpu_state
from kvmigrate.kvm.clocks import without_vcpu_clocks, without_vm_clocks
from kvmigrate.kvm.vm_state import load_state, save_state
from kvmigrate.state.fidelity import Fidelity, Verdict
from kvmigrate.state.section import pack, unpack

from .tiny import CODE, TinyVm, tiny

pytestmark = pytest.mark.kvm

# loop: inc rcx; jmp loop, 64-bit
SPIN64 = "48ffc1 ebfb"
# vector 0x30, unmasked; modes in bits 17 and 18
TIMER_VECTOR, ONE_SHOT, DEADLINE = 0x30, 0, 2 << 17

State = tuple[dict[str, Any], list[dict[str, Any]]]


def set_register_page(regs: bytearray, offset: int, value: int) -> None:
    regs[offset : offset + 4] = value.to_bytes(4, "little")


def with_timer(vm: TinyVm, mode: int, initial_count: int) -> None:
    regs = bytearray(vm.cpu.get_lapic()["regs"])
    set_register_page(regs, 0xF0, 0x1FF)
    set_register_page(regs, 0x320, TIMER_VECTOR | mode)
    set_register_page(regs, 0x3E0, 0xB)
    set_register_page(regs, 0x380, initial_count)
    set_register_page(regs, 0x390, initial_count)
    vm.cpu.set_lapic({"regs": bytes(regs)})


def set_vectors(vm: TinyVm, xmm: list[bytes]) -> None:
    """XMM, x87 and MXCSR through the XSAVE area: KVM_SET_FPU does not say in XSTATE_BV that they are in use."""
    area = bytearray(vm.cpu.get_xsave())
    area[24:28] = (0x1F80 | 1 << 13).to_bytes(4, "little")
    area[32:160] = b"".join(bytes([0x40 + n] * 10 + [0] * 6) for n in range(8))
    area[160:416] = b"".join(xmm)
    area[512] |= 3
    vm.cpu.set_xsave(bytes(area))


def make_unlike_reset(vm: TinyVm) -> None:
    """Give every part of the state a value that no fresh VM has."""
    cpu = vm.cpu
    vm.long_mode_ring3(SPIN64)
    names = ("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", *(f"r{n}" for n in range(8, 16)))
    cpu.set_regs(cpu.get_regs() | {name: 0x1111 * n + 7 for n, name in enumerate(names)})
    set_vectors(vm, [bytes([n] * 16) for n in range(16)])
    cpu.set_debugregs({"db": [0x1000, 0x2000, 0x3000, 0x4000], "dr6": 0xFFFF0FF1, "dr7": 0x400, "flags": 0})
    assert not cpu.set_msrs({0xC0000081: 0x23001000000000, 0xC0000082: 0xFFFF800000001000, 0x174: 0x10, 0x2FF: 0xC06})
    assert not cpu.set_msrs({0xC0000102: 0x7FFF00001000, 0x200: 0x80000006, 0x201: 0xFF80000800, 0x3B: 0x1234})
    with_timer(vm, ONE_SHOT, 0xFFFFFFFF)
    cpu.set_vcpu_events(cpu.get_vcpu_events() | {"nmi": {"injected": 0, "pending": 0, "masked": 1}})
    pic = vm.vm.get_irqchip(0) | {"irq_base": 0x20, "imr": 0xFB, "init4": 1}
    vm.vm.set_irqchip(0, pic)
    ioapic = vm.vm.get_irqchip(2)
    ioapic["redirtbl"][4] = {"bits": 0x10034}
    vm.vm.set_irqchip(2, ioapic)
    pit = vm.vm.get_pit2()
    pit["channels"][2] |= {"mode": 3, "count": 0x4A9, "rw_mode": 3}
    vm.vm.set_pit2(pit)


@pytest.fixture
def pair() -> Iterator[tuple[TinyVm, TinyVm]]:
    with ExitStack() as stack:
        source = stack.enter_context(tiny(2))
        target = stack.enter_context(tiny(2))
        make_unlike_reset(source)
        yield source, target


def over_the_wire(state: State) -> State:
    """As the target gets it: through msgpack, nothing shared with the source."""
    vm, vcpus = unpack(pack([state[0], state[1]]), "state")
    return vm, vcpus


def transfer(source: TinyVm, target: TinyVm) -> tuple[State, Fidelity]:
    saved = save_state(source.vm)
    vm, vcpus = over_the_wire(saved)
    return saved, load_state(target.vm, vm, vcpus)


def differences(one: Any, other: Any, where: str = "") -> list[str]:
    if isinstance(one, dict) and isinstance(other, dict):
        keys = sorted(one.keys() | other.keys())
        return [d for key in keys for d in differences(one.get(key), other.get(key), f"{where}.{key}")]
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        pairs = enumerate(zip(one, other, strict=True))
        return [d for n, (a, b) in pairs for d in differences(a, b, f"{where}[{n}]")]
    return [] if one == other else [where]


def oracle(saved: State, target: TinyVm) -> list[str]:
    """Where the target's state differs from the saved one, clocks left out."""
    vm, vcpus = save_state(target.vm)
    found = differences(without_vm_clocks(saved[0]), without_vm_clocks(vm), "vm")
    for n, (one, other) in enumerate(zip(saved[1], vcpus, strict=True)):
        found += differences(without_vcpu_clocks(one), without_vcpu_clocks(other), f"vcpu{n}")
    return found


def not_exact(fidelity: Fidelity) -> dict[str, Verdict]:
    return {item.name: item.verdict for item in fidelity}


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


def test_one_refused_msr_does_not_hide_those_after_it(pair: tuple[TinyVm, TinyVm]) -> None:
    _, target = pair
    cpu = target.cpu
    assert cpu.set_msrs({0xDEAD: 1, 0xC0000081: 0x10 << 32, 0xDEAE: 1, 0x175: 0x77}) == [0xDEAD, 0xDEAE]
    assert cpu.get_msrs([0xDEAD, 0xC0000081, 0xDEAE, 0x175]) == {0xC0000081: 0x10 << 32, 0x175: 0x77}


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


def damage(body: dict[str, Any], path: tuple[Any, ...], value: Any) -> None:
    for key in path[:-1]:
        body = body[key]
    if value is KeyError:
        del body[path[-1]]  # type: ignore[arg-type]
    else:
        body[path[-1]] = value


HOSTILE: list[tuple[tuple[Any, ...], Any]] = [
    (("id",), 1),
    (("regs",), []),
    (("regs", "rip"), KeyError),
    (("regs", "r16"), 0),
    (("regs", "rax"), 1 << 64),
    (("regs", "rax"), -1),
    (("regs", "rax"), 1.0),
    (("regs", "rax"), True),
    (("regs", "rax"), "1"),
    (("sregs2", "cs", "dpl"), 256),
    (("sregs2", "pdptrs"), [0, 0, 0]),
    (("sregs2", "gdt"), None),
    (("debugregs", "db"), [0] * 5),
    (("lapic", "regs"), bytes(1023)),
    (("lapic", "regs"), bytes(1025)),
    (("xcrs", "nr_xcrs"), 17),
    (("xcrs", "nr_xcrs"), 2),
    (("xcrs", "xcrs"), [{"xcr": 0}]),
    (("xsave",), bytes(575)),
    (("xsave",), bytes(70000)),
    (("xsave",), "text"),
    (("cpuid",), []),
    (("cpuid",), [{"function": 1}]),
    (("msrs", "MSR_LSTAR"), 1 << 64),
    (("msrs", "MSR_LSTAR"), True),
    (("msrs", "MSR_NONSENSE"), 1),
    (("msrs", "0xc0000082"), 1),
    (("msrs",), {f"0x{n:x}": 0 for n in range(5000)}),
    (("tsc_khz",), 0),
    (("tsc_offset",), 1 << 64),
    (("unknown",), 1),
    (("vcpu_events", "exception", "nr"), KeyError),
]


@pytest.mark.parametrize(("path", "value"), HOSTILE, ids=lambda part: str(part)[:40])
def test_a_hostile_vcpu_body_is_refused_before_anything_is_set(
    pair: tuple[TinyVm, TinyVm], path: tuple[Any, ...], value: Any
) -> None:
    source, target = pair
    untouched = save_state(target.vm)
    vm, vcpus = over_the_wire(save_state(source.vm))
    damage(vcpus[0], path, value)
    with pytest.raises(BadField, match="vcpu0"):
        load_state(target.vm, vm, vcpus)
    assert oracle(untouched, target) == []


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("clock", "clock"), 1 << 63),
        (("clock", "flags"), 1 << 20),
        (("clock",), KeyError),
        (("host_tsc",), -1),
        (("pit2", "channels"), []),
        (("pit2", "channels", 0, "count"), 1 << 32),
        (("ioapic", "redirtbl"), [{"bits": 0}] * 23),
        (("pic_slave", "irr"), 256),
        (("pic_master",), KeyError),
        (("extra",), 1),
    ],
    ids=lambda part: str(part)[:40],
)
def test_a_hostile_vm_body_is_refused_before_anything_is_set(
    pair: tuple[TinyVm, TinyVm], path: tuple[Any, ...], value: Any
) -> None:
    source, target = pair
    untouched = save_state(target.vm)
    vm, vcpus = over_the_wire(save_state(source.vm))
    damage(vm, path, value)
    with pytest.raises(BadField, match="vm"):
        load_state(target.vm, vm, vcpus)
    assert oracle(untouched, target) == []


def test_an_xsave_area_with_foreign_components_is_refused(pair: tuple[TinyVm, TinyVm]) -> None:
    source, target = pair
    vm, vcpus = over_the_wire(save_state(source.vm))
    area = bytearray(vcpus[0]["xsave"])
    for at, bit, error in (
        (512 + 5, 1 << 7, RestoreRefused),
        (520, 1, BadField),
        (560, 1, BadField),
        (26, 2, BadField),
    ):
        broken = copy.deepcopy(vcpus)
        area_now = bytearray(area)
        area_now[at] |= bit
        broken[0]["xsave"] = bytes(area_now)
        with pytest.raises(error, match="xsave"):
            load_state(target.vm, vm, broken)
    longer = copy.deepcopy(vcpus)
    longer[0]["xsave"] = bytes(area) + bytes(4) + b"\1\0\0\0"
    with pytest.raises(RestoreRefused, match="xsave"):
        load_state(target.vm, vm, longer)
    longer[0]["xsave"] = bytes(area) + bytes(8)
    load_state(target.vm, vm, longer).require()


def test_kvmclock_goes_on_from_the_saved_value_and_not_from_the_wall_clock(pair: tuple[TinyVm, TinyVm]) -> None:
    source, target = pair
    vm, vcpus = over_the_wire(save_state(source.vm))
    vm["clock"]["clock"] = 10**15
    time.sleep(0.2)
    load_state(target.vm, vm, vcpus).require()
    assert 0 <= target.vm.get_clock()["clock"] - 10**15 < 150_000_000


def test_a_save_is_far_shorter_than_a_blackout(pair: tuple[TinyVm, TinyVm]) -> None:
    source, target = pair
    save_state(source.vm)
    times = []
    for _ in range(20):
        begin = time.perf_counter()
        vm, vcpus = save_state(source.vm)
        middle = time.perf_counter()
        load_state(target.vm, vm, vcpus)
        times.append((middle - begin, time.perf_counter() - middle))
    # Of two vCPUs and the chips. Ten times what an idle machine takes: only another order of magnitude fails.
    assert min(save for save, _ in times) < 0.010 and min(load for _, load in times) < 0.030
