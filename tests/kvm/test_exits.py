"""Every exit reason has its name, and those that stop a guest say why."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from kvmigrate._core import ffi, lib
from kvmigrate.kvm import exits
from kvmigrate.kvm.vcpu import Vcpu

from .tiny import TinyVm, tiny


def run_area(reason: int) -> Any:
    run = ffi.new("struct kvm_run *")
    run.exit_reason = reason
    return run


def test_fail_entry_tells_the_hardware_reason() -> None:
    run = run_area(lib.KVM_EXIT_FAIL_ENTRY)
    run.fail_entry.hardware_entry_failure_reason, run.fail_entry.cpu = 0x80000021, 3
    assert exits.describe_exit(run).startswith("FAIL_ENTRY: ")
    assert "0x80000021" in exits.describe_exit(run) and "CPU 3" in exits.describe_exit(run)


def test_an_emulation_failure_tells_the_instruction_bytes() -> None:
    run = run_area(lib.KVM_EXIT_INTERNAL_ERROR)
    failure = run.emulation_failure
    failure.suberror, failure.ndata = lib.KVM_INTERNAL_ERROR_EMULATION, 3
    failure.flags = lib.KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES
    failure.insn_size = 4
    failure.insn_bytes = bytes.fromhex("f30fb8c0") + bytes(11)
    assert "EMULATION" in exits.describe_exit(run) and "f3 0f b8 c0" in exits.describe_exit(run)
    failure.insn_size = 200
    assert exits.describe_exit(run).endswith("00)")
    failure.flags = 0
    assert "bytes" not in exits.describe_exit(run)


def test_other_internal_errors_tell_their_sub_error_and_data() -> None:
    run = run_area(lib.KVM_EXIT_INTERNAL_ERROR)
    run.internal.suberror, run.internal.ndata = lib.KVM_INTERNAL_ERROR_DELIVERY_EV, 1000
    run.internal.data = [0xABC] * 16
    assert "DELIVERY_EV" in exits.describe_exit(run) and exits.describe_exit(run).count("0xabc") == 16
    run.internal.suberror, run.internal.ndata = 77, 0
    assert "sub-error 77" in exits.describe_exit(run)


@pytest.mark.parametrize(
    ("reason", "field", "values", "text"),
    [
        ("SYSTEM_EVENT", "system_event", {"type": 3}, "SYSTEM_EVENT: CRASH"),
        ("X86_RDMSR", "msr", {"index": 0x123, "reason": 2}, "reads MSR 0x123 (unknown to KVM)"),
        ("X86_WRMSR", "msr", {"index": 0x123, "data": 0x55, "reason": 1}, "writes 0x55 to MSR 0x123 (invalid)"),
        ("HYPERCALL", "hypercall", {"nr": 12}, "HYPERCALL: number 12"),
        ("UNKNOWN", "hw", {"hardware_exit_reason": 0x42}, "0x42"),
        ("EXCEPTION", "ex", {"exception": 6, "error_code": 1}, "exception 6"),
        ("NOTIFY", "notify", {"flags": 1}, "flags 0x1"),
        ("MMIO", "mmio", {"phys_addr": 0xFEC0, "len": 4, "is_write": 1}, "write to 0xfec0, 4 bytes"),
        ("SHUTDOWN", "hw", {}, "triple fault"),
    ],
)
def test_exits_are_described(reason: str, field: str, values: dict[str, int], text: str) -> None:
    run = run_area(getattr(lib, f"KVM_EXIT_{reason}"))
    for name, value in values.items():
        setattr(getattr(run, field), name, value)
    assert exits.describe_exit(run).startswith(f"{reason}: ") and text in exits.describe_exit(run)


def test_an_exit_that_the_headers_do_not_know_keeps_its_number() -> None:
    assert exits.describe_exit(run_area(4711)) == "exit 4711"


def test_every_exit_of_the_headers_that_this_cpu_can_have_has_its_name() -> None:
    others = "HYPERV_|XEN_|S390|PAPR|OSI|DCR|EPR|WATCHDOG|ARM|RISCV|LOONGARCH|AP_RESET"
    header = Path("/usr/include/linux/kvm.h").read_text()
    found = re.findall(r"#define KVM_EXIT_(\w+)\s+(\d+)\b", header)
    reasons = {name: int(number) for name, number in found if not re.match(others, name)}
    del reasons["IO_IN"], reasons["IO_OUT"]
    assert len(reasons) >= 24
    assert {name: exits.exit_name(number) for name, number in reasons.items()} == {name: name for name in reasons}


def stop_with(vm: TinyVm) -> str:
    """Run until an exit that is no I/O, and describe that."""
    found: list[str] = []

    def answer(vcpu: Vcpu) -> None:
        found.append(exits.describe_exit(vcpu.run_area))
        vm.ended.set()
        vm.group.request_pause()

    vm.on_exit = answer
    vm.run_until_end()
    return found[0]


@pytest.mark.kvm
def test_a_triple_fault_is_a_shutdown() -> None:
    with tiny() as vm:
        # ud2 in ring 3 with an empty interrupt table
        vm.long_mode_ring3("0f0b")
        assert stop_with(vm).startswith("SHUTDOWN: triple fault")


@pytest.mark.kvm
def test_running_where_there_is_no_memory_is_an_internal_error_by_name() -> None:
    with tiny() as vm:
        # jmp 0x2000:0 after the base of cs was put where no RAM is
        vm.real_mode("90")
        sregs = vm.cpu.get_sregs()
        sregs["cs"].update(base=0x10000000)
        vm.cpu.set_sregs(sregs)
        assert stop_with(vm).startswith("INTERNAL_ERROR: EMULATION")


@pytest.mark.kvm
def test_hlt_without_an_irqchip_comes_back() -> None:
    with tiny(irqchip=False) as vm:
        vm.real_mode("f4")
        assert stop_with(vm) == "HLT"
