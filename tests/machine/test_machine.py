"""A machine on the real /dev/kvm: its exits, its ends, and pausing at any moment."""

from __future__ import annotations

import base64
import errno
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvmigrate.contract import RunState
from kvmigrate.devices.end import GuestEnd
from kvmigrate.devices.serial import Serial
from kvmigrate.errors import BadField, ConfigError, HostError, StateError
from kvmigrate.kvm.vm import Vm
from kvmigrate.machine.machine import Machine
from kvmigrate.memory.region import GuestMemory
from kvmigrate.state.section import Value, unpack

from .boot_sector import (
    HANG,
    HEADER_BYTES,
    LOAD_GPA,
    POWER_OFF,
    machine_with,
    out_byte,
    protected_mode_machine,
    runstate_of,
)

pytestmark = pytest.mark.kvm


CLOCK_MSRS = ("MSR_IA32_TSC", "MSR_IA32_TSC_ADJUST")


def without_clocks(name: str, packed: str) -> Value:
    body = unpack(base64.b64decode(packed), name)
    for msr in CLOCK_MSRS:
        body.get("msrs", {}).pop(msr, None)
    return body


def run_to_end(machine: Machine) -> GuestEnd:
    machine.start()
    machine.resume()
    end = machine.wait_end(20)
    machine.close()
    assert end is not None, "the guest did not end"
    return end


def test_the_first_part_of_a_state_is_what_the_kernel_keeps_and_all_of_it(tmp_path: Path) -> None:
    source, target = (machine_with(tmp_path, HANG) for _ in range(2))
    kernel, devices = source.save_parts()
    for wrong in (kernel[:-1], [*kernel, devices[0]], devices):
        with pytest.raises(BadField, match="section "):
            target.load(wrong, more=True)
    first = target.load(kernel, more=True).exact_names()
    both = target.load(devices).exact_names()
    assert "vcpu0.regs" in first and "port92" not in first
    assert {*first, "port92"} <= {*both}
    source.close()
    target.close()


@pytest.fixture
def hanging(tmp_path: Path) -> Iterator[Machine]:
    machine = machine_with(tmp_path, HANG)
    machine.start()
    yield machine
    machine.close()


def test_power_off_ends_with_status_0_after_the_serial_output(tmp_path: Path) -> None:
    end = run_to_end(machine_with(tmp_path, out_byte(0x3F8, ord("!")) + POWER_OFF))
    assert end == GuestEnd.powered_off()
    assert (tmp_path / "serial").read_bytes() == b"!"


@pytest.mark.parametrize(("code", "status"), [(0, 1), (3, 7), (0x7F, 0xFF), (0x80, 1)])
def test_debug_exit_gives_twice_the_code_plus_one(tmp_path: Path, code: int, status: int) -> None:
    assert run_to_end(machine_with(tmp_path, out_byte(0xF4, code))).exit_status == status


def test_string_output_delivers_every_byte_in_order(tmp_path: Path) -> None:
    text = b"0123456789abcdefghijklmnopqrstuvwxyz"
    # mov si, text; mov cx, len; mov dx, 0x3f8; cld; rep outsb
    head = 3 + 3 + 3 + 1 + 2 + len(POWER_OFF)
    code = b"\xbe" + (0x7C00 + head).to_bytes(2, "little") + b"\xb9" + len(text).to_bytes(2, "little")
    run_to_end(machine_with(tmp_path, code + b"\xba\xf8\x03\xfc\xf3\x6e" + POWER_OFF + text))
    assert (tmp_path / "serial").read_bytes() == text


@pytest.fixture
def closed(monkeypatch: pytest.MonkeyPatch) -> list[type]:
    """Whose ``close`` has been called, in order."""
    found: list[type] = []

    def watch(part: type, close: Callable[[Any], None]) -> None:
        def note(self: Any) -> None:
            if part not in found:
                found.append(part)
            close(self)

        monkeypatch.setattr(part, "close", note)

    for part in (Vm, Serial, GuestMemory):
        watch(part, part.close)
    return found


def test_the_serial_port_is_closed_before_the_vm_whose_line_it_drives(tmp_path: Path, closed: list[type]) -> None:
    machine_with(tmp_path, HANG).close()
    assert closed == [Serial, Vm, GuestMemory]


def test_a_vm_that_cannot_be_made_whole_leaves_nothing_open(
    tmp_path: Path, closed: list[type], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: Vm) -> None:
        raise HostError("KVM_CREATE_IRQCHIP", errno.ENOMEM)

    monkeypatch.setattr(Vm, "create_irqchip", refuse)
    with pytest.raises(HostError, match="IRQCHIP"):
        machine_with(tmp_path, HANG)
    assert closed == [Serial, Vm, GuestMemory]


def test_absent_ports_read_all_ones(tmp_path: Path) -> None:
    # in al, 0x80; mov dx, 0x3f8; out dx, al
    run_to_end(machine_with(tmp_path, bytes.fromhex("e480baf803ee") + POWER_OFF))
    assert (tmp_path / "serial").read_bytes() == b"\xff"


def test_absent_addresses_read_all_ones(tmp_path: Path) -> None:
    # mov ax, 0xffff; mov ds, ax; mov al, [0xfff0]: address 0x10ffe0, just over a guest of 1 MiB
    code = bytes.fromhex("b8ffff8ed8a0f0ffbaf803ee") + POWER_OFF
    run_to_end(machine_with(tmp_path, code, memory_bytes=1 << 20))
    assert (tmp_path / "serial").read_bytes() == b"\xff"


def test_the_reset_pulse_of_the_keyboard_controller_is_a_reset(tmp_path: Path) -> None:
    end = run_to_end(machine_with(tmp_path, out_byte(0x64, 0xFE)))
    assert (end.kind, end.exit_status) == ("reset", 10)


def test_port_92_bit_0_is_a_reset(tmp_path: Path) -> None:
    assert run_to_end(machine_with(tmp_path, out_byte(0x92, 1))).kind == "reset"


def test_a_triple_fault_is_a_crash_that_is_named(tmp_path: Path) -> None:
    # lidt of an empty table, then ud2
    lidt = bytes.fromhex("0f011d") + (LOAD_GPA + HEADER_BYTES + 9).to_bytes(4, "little")
    end = run_to_end(protected_mode_machine(tmp_path, lidt + bytes.fromhex("0f0b") + bytes(6)))
    assert end.exit_status == 4
    assert "SHUTDOWN" in end.text and "\n" not in end.text


def test_pause_and_resume_many_times_loses_no_output(tmp_path: Path) -> None:
    # mov cx, 20000; l: mov al, cl; mov dx, 0x3f8; out dx, al; loop l
    machine = machine_with(tmp_path, bytes.fromhex("b9204e88c8baf803eee2f8") + POWER_OFF)
    machine.start()
    machine.resume()
    pauses = 0
    while machine.end is None:
        try:
            machine.pause()
            pauses += 1
            machine.resume()
        except StateError:
            break
    assert machine.wait_end(20) == GuestEnd.powered_off()
    machine.close()
    assert pauses > 10
    assert (tmp_path / "serial").read_bytes() == bytes(n & 0xFF for n in range(20000, 0, -1))


def test_pause_is_idempotent_and_resume_goes_on(hanging: Machine) -> None:
    hanging.resume()
    hanging.pause()
    hanging.pause()
    assert runstate_of(hanging) is RunState.PAUSED
    hanging.resume()
    assert runstate_of(hanging) is RunState.RUNNING


def test_a_machine_that_never_ran_has_no_entries(hanging: Machine) -> None:
    assert [vcpu.nr_entries for vcpu in hanging.platform.vm.vcpus] == [0]
    hanging.pause()
    assert [vcpu.nr_entries for vcpu in hanging.platform.vm.vcpus] == [0]


def test_a_paused_guest_stands_still(hanging: Machine) -> None:
    hanging.resume()
    hanging.pause()
    first, second = hanging.digest(), hanging.digest()
    # The VM's own section holds kvmclock and the PIT, which go on; memory, vCPUs and devices do not.
    for digest in (first, second):
        assert digest["state"].pop("vm")
        digest["state"] = {name: without_clocks(name, packed) for name, packed in digest["state"].items()}
    assert first == second


def test_a_running_guest_has_no_digest(hanging: Machine) -> None:
    hanging.resume()
    with pytest.raises(StateError, match="running"):
        hanging.digest()


def test_an_ended_guest_can_be_neither_paused_nor_resumed(tmp_path: Path) -> None:
    machine = machine_with(tmp_path, POWER_OFF)
    machine.start()
    machine.resume()
    machine.wait_end(20)
    for call in (machine.pause, machine.resume):
        with pytest.raises(StateError, match="shutdown"):
            call()
    machine.close()


def test_run_state_changes_are_told_in_order(hanging: Machine) -> None:
    told: list[RunState] = []
    hanging.on_change(told.append)
    hanging.resume()
    hanging.pause(RunState.FINISH_MIGRATE)
    hanging.pause(RunState.POSTMIGRATE)
    assert told == [RunState.RUNNING, RunState.FINISH_MIGRATE, RunState.POSTMIGRATE]


def test_an_image_that_is_missing_is_one_line(tmp_path: Path) -> None:
    from kvmigrate.config import BootConfig, MachineConfig

    boot = BootConfig(tmp_path / "none")
    with pytest.raises((ConfigError, OSError), match="none"):
        Machine.create(MachineConfig("test", 4 << 20, 1, "null", boot))
