"""A machine that is reset starts as it did when it was made, wherever it is and whoever copies it meanwhile."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from kvmigrate.api import restore, take_snapshot
from kvmigrate.boot import acpi
from kvmigrate.config import BootConfig, DiskConfig, MachineConfig
from kvmigrate.contract import RunState
from kvmigrate.devices.end import GuestEnd
from kvmigrate.devices.virtio import registers as reg
from kvmigrate.machine.machine import Machine
from tests.boot.images import pvh_kernel
from tests.cli.command import wait_until
from tests.devices.virtio.driver import Driver
from tests.oracle.digest import compare_pages, is_clock, require_equal, state_differences
from tests.oracle.heartbeat import judge
from tests.oracle.recorder import SerialLog

from .boot_sector import machine_with
from .resets import (
    LEDGER,
    WAYS,
    counting,
    ledger,
    received,
    start,
    wait_for_beats,
    wait_for_end,
)

pytestmark = [pytest.mark.kvm, pytest.mark.timeout(120)]

LOW_GPA, HIGH_GPA = 0x8000, 6 << 20


@pytest.mark.parametrize("way", sorted(WAYS))
def test_each_way_to_ask_for_a_reset_boots_anew(tmp_path: Path, stack: ExitStack, way: str) -> None:
    machine = machine_with(tmp_path, counting(WAYS[way]), reboot=True)
    told: list[GuestEnd] = []
    machine.on_reset = told.append
    assert wait_for_end(start(stack, machine)) == GuestEnd.powered_off()
    assert (tmp_path / "serial").read_bytes() == b"123"
    assert [reset.text.startswith("the guest asked for a reset") for reset in told] == [True, True]


def test_where_a_pcs_firmware_starts_a_guest_with_acpi_tables_finds_a_reset(tmp_path: Path, stack: ExitStack) -> None:
    other = tmp_path / "pvh"
    other.mkdir()
    with_tables = Machine.create(MachineConfig("pvh", 8 << 20, 1, "null", BootConfig(pvh_kernel(other))))
    firmware = with_tables.memory.read(acpi.RESET_VECTOR_GPA, 16)
    with_tables.close()
    jump = bytes.fromhex("ea f0ff 00f0")
    machine = machine_with(tmp_path, counting(jump, 2), reboot=True)
    machine.memory.write(acpi.RESET_VECTOR_GPA, firmware)
    assert wait_for_end(start(stack, machine)) == GuestEnd.powered_off()
    assert (tmp_path / "serial").read_bytes() == b"12"


def test_a_machine_that_was_reset_is_as_it_was_before_it_ran(tmp_path: Path, stack: ExitStack) -> None:
    """Every page and every item of state but the clocks, and what KVM itself says of its clock once a vCPU has run."""
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(1 << 16))
    machine = ledger(stack, tmp_path, LEDGER, DiskConfig("root", image))
    machine.pause()
    before = machine.digest()
    machine.resume()
    wait_for_beats(tmp_path)
    disk = machine.platform.virtio.devices[1]
    Driver(machine.memory, disk).start()
    machine.press_power_button()
    machine.pause()
    ran = machine.digest()
    machine.reset()
    after = machine.digest()
    assert machine.runstate is RunState.PAUSED
    assert disk.read(reg.STATUS, 4) == 0
    assert sum(compare_pages(before, after)) == 32 << 8
    assert unlike(before, after) == []
    assert len(unlike(ran, after)) > 20
    with pytest.raises(AssertionError):
        sum(compare_pages(ran, after))


def unlike(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    texts = state_differences(one, other)
    return [text for text in texts if not is_clock(text) and not text.startswith("vm.clock.flags:")]


def test_the_acpi_tables_are_as_new_and_the_generation_stays(tmp_path: Path, stack: ExitStack) -> None:
    boot = BootConfig(pvh_kernel(tmp_path))
    machine = Machine.create(MachineConfig("pvh", 8 << 20, 2, "null", boot))
    stack.callback(machine.close)
    machine.start()
    machine.pause()
    new, uuid = machine.digest()["slots"], machine.description.uuid
    generation = machine.memory.read(acpi.GENERATION_GPA, 16)
    for gpa in (acpi.TABLES_GPA + 64, LOW_GPA, HIGH_GPA):
        machine.memory.write(gpa, b"scribble" * 64)
    machine.reset()
    assert machine.digest()["slots"] == new
    assert machine.memory.read(acpi.GENERATION_GPA, 16) == generation != bytes(16)
    assert machine.description.uuid == uuid


def test_a_guest_of_two_vcpus_is_reset_again_and_again(tmp_path: Path, stack: ExitStack) -> None:
    machine = ledger(stack, tmp_path)
    machine.resume()
    seen = 0
    for _ in range(4):
        wait_for_beats(tmp_path, seen)
        seen = (tmp_path / "serial").stat().st_size
        machine.reset()
    wait_for_beats(tmp_path, seen)
    assert machine.runstate is RunState.RUNNING


def test_a_reset_guest_is_saved_and_restored(tmp_path: Path, stack: ExitStack) -> None:
    machine = ledger(stack, tmp_path)
    machine.resume()
    seen = wait_for_beats(tmp_path)
    machine.reset()
    wait_for_beats(tmp_path, seen)
    take_snapshot(machine, tmp_path / "saved")
    machine.close()
    other = tmp_path / "other"
    other.mkdir()
    restored = restore(tmp_path / "saved", serial=f"file:{other / 'serial'}").machine
    start(stack, restored)
    wait_until(lambda: (other / "serial").exists() and (other / "serial").read_bytes().count(b"H ") > 4, "heartbeats")
    seen = (other / "serial").stat().st_size
    # Mapped from the snapshot, which must not come back.
    restored.reset()
    wait_for_beats(other, seen)


@pytest.mark.parametrize("after_s", [0.0, 0.1, 0.2])
def test_a_guest_that_is_reset_while_its_pages_travel_arrives_whole(
    tmp_path: Path, stack: ExitStack, after_s: float
) -> None:
    machine = ledger(stack, tmp_path)
    machine.resume()
    seen = wait_for_beats(tmp_path)

    def reset() -> None:
        wait_until(lambda: machine.dirty_log.active, "the first round")
        time.sleep(after_s)
        machine.reset()

    there, result = received(stack, machine, tmp_path, reset)
    cleared = sum(one.pages_cleared for one in result.rounds)
    assert after_s == 0 or cleared > 0, "what had been sent was not made zero there"
    assert require_equal(machine.digest(), there.digest()) == 32 << 8
    there.resume()
    wait_until(lambda: (tmp_path / "there").read_bytes().count(b"H ") > 20, "heartbeats at the destination")
    there.pause()
    both = (tmp_path / "serial").read_bytes()[seen:] + (tmp_path / "there").read_bytes()
    booted = both[min(both.index(b"H %d 1 " % cpu) for cpu in range(2)) :]
    assert judge([SerialLog("both", [(0.0, booted)])]).beats.keys() == {0, 1}
