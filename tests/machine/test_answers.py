"""Registers that a busy guest uses all the time are answered by the C core, as the device itself would answer them."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from kvmigrate.config import DiskConfig
from kvmigrate.devices import serial
from kvmigrate.errors import HostError, StateError
from kvmigrate.kvm import exits
from kvmigrate.kvm.vcpu import Vcpu
from kvmigrate.machine.machine import Machine
from kvmigrate.machine.virtio import slot_of

from ..devices.conftest import wait_until
from .boot_sector import POWER_OFF, machine_with, protected_mode_machine

pytestmark = pytest.mark.kvm

NR_BYTES = 30_000
# mov ecx,30000; mov dx,0x3f8; xor ax,ax; write: out dx,al; inc al; dec ecx; jnz write
WRITE = bytes.fromhex("66b930750000 baf803 31c0 ee fec0 6649 75f9")
# The same, but look: mov dx,0x3fd; in al,dx; test al,0x20; jz look; mov dx,0x3f8; mov al,bl; out dx,al; inc bl
LOOK_AND_WRITE = bytes.fromhex("66b930750000 30db bafd03 ec a820 74fb baf803 88d8 ee fec3 6649 75ec")
TEXT = bytes(n & 0xFF for n in range(NR_BYTES))
POWER_OFF_32 = bytes.fromhex("66ba0406 66b80020 66ef")
GPA, _ = slot_of(0)


@contextmanager
def counting(machine: Machine) -> Iterator[list[str]]:
    """The exits that leave the C core."""
    seen: list[str] = []
    handle = machine.cpus._handler.handle

    def count(vcpu: Vcpu) -> None:
        seen.append(exits.describe_exit(vcpu.run_area))
        handle(vcpu)

    machine.cpus._handler.handle = count  # type: ignore[method-assign]
    yield seen


def run(machine: Machine) -> list[str]:
    """Run to the end; the exits that left the C core."""
    with counting(machine) as seen:
        machine.start()
        machine.resume()
        assert machine.wait_end(60)
    return seen


def test_a_guest_that_looks_at_lsr_writes_all_without_leaving_the_core(tmp_path: Path) -> None:
    machine = machine_with(tmp_path, LOOK_AND_WRITE + POWER_OFF)
    try:
        assert len(run(machine)) == 1, "the power-off is the one exit"
        assert (tmp_path / "serial").read_bytes() == TEXT
    finally:
        machine.close()


def test_a_guest_that_does_not_look_loses_nothing_to_a_busy_interpreter(tmp_path: Path) -> None:
    machine = machine_with(tmp_path, WRITE + POWER_OFF)
    try:
        # Nobody sends for a moment: the queue runs full, and the vCPU comes out and waits with its byte.
        with counting(machine) as seen:
            machine.start()
            machine.resume()
            with machine.platform.serial._changed:
                wait_until(lambda: machine.platform.serial._nr_waiting() == serial.TX_QUEUE_BYTES, "the queue is full")
            assert machine.wait_end(60)
        assert len(seen) > 1
        assert (tmp_path / "serial").read_bytes() == TEXT
    finally:
        machine.close()


def test_output_over_many_pauses_comes_once_and_in_order(tmp_path: Path) -> None:
    machine = machine_with(tmp_path, WRITE + POWER_OFF)
    try:
        machine.start()
        while machine.end is None:
            machine.resume()
            if machine.wait_end(0.01) is None:
                pause(machine)
        assert (tmp_path / "serial").read_bytes() == TEXT
    finally:
        machine.close()


def pause(machine: Machine) -> None:
    """Pause, and check what a paused serial port promises: all that was written has left."""
    with suppress(StateError):
        machine.pause()
    assert machine.platform.serial.save()["tx"] == b""


def test_the_interrupt_registers_of_virtio_are_read_and_acknowledged(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(4096))
    # mov eax,[status]; mov [0x200000],eax; mov dword [ack],1; mov eax,[status]; mov [0x200004],eax
    # then what is no register access: mov ax,[status] (16 bits); mov [0x200008],ax
    read = b"\xa1" + struct.pack("<I", GPA + 0x60)
    code = read + bytes.fromhex("a300002000") + b"\xc7\x05" + struct.pack("<II", GPA + 0x64, 1)
    code += read + bytes.fromhex("a304002000") + b"\x66" + read + bytes.fromhex("66a308002000") + POWER_OFF_32
    machine = protected_mode_machine(tmp_path, code, (DiskConfig("d", disk),))
    try:
        machine.platform.virtio.devices[0].handle.isr = 3
        seen = run(machine)
        assert struct.unpack("<IIH", machine.memory.read(0x200000, 10)) == (3, 2, 0)
        assert machine.platform.virtio.devices[0].handle.isr == 2
        assert [text.split(":")[0] for text in seen] == ["MMIO", "IO"], "the 16-bit access and the power-off"
    finally:
        machine.close()


def test_what_is_answered_does_not_change_under_a_running_vcpu(tmp_path: Path) -> None:
    machine = machine_with(tmp_path, b"\xeb\xfe")
    try:
        group = machine.platform.vm.group
        with pytest.raises(HostError, match="exists"):
            group.answer_uart(0x2F8, machine.platform.serial.handle)
        machine.start()
        machine.resume()
        wait_until(lambda: machine.platform.vm.vcpus[0].nr_entries > 0, "the vCPU runs")
        with pytest.raises(HostError, match="busy"):
            group.answer_uart(0x2F8, machine.platform.serial.handle)
    finally:
        machine.close()
