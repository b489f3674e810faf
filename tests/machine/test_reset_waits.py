"""A reset that cannot be carried out at once, or not at all: it waits, goes with the guest, or ends it and says why."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from kvmigrate.config import HostSide
from kvmigrate.contract import RunState
from kvmigrate.devices import i8042
from kvmigrate.devices.end import GuestEnd
from kvmigrate.errors import ConfigError, StateError, StreamError
from kvmigrate.machine.machine import Machine
from kvmigrate.machine.reset import SECTION, take_pending
from kvmigrate.state.section import Section
from tests.cli.command import wait_until

from .boot_sector import HANG, machine_with, runstate_of
from .resets import (
    BY_ACPI,
    counting,
    received,
    start,
    wait_for_boots,
    wait_for_end,
)

pytestmark = [pytest.mark.kvm, pytest.mark.timeout(120)]


def test_a_guest_that_has_moved_is_reset_where_it_is(tmp_path: Path, stack: ExitStack) -> None:
    machine = start(stack, machine_with(tmp_path, counting(HANG, 9), reboot=True))
    wait_for_boots(tmp_path / "serial", b"1")
    there, _ = received(stack, machine, tmp_path, lambda: None)
    there.resume()
    there.reset()
    wait_for_boots(tmp_path / "there", b"2")


def ask(machine: Machine) -> None:
    """As the guest does in the moment in which its vCPUs are stopped."""
    machine.platform.pio.write(i8042.COMMAND_PORT, 1, 0xFE)


@pytest.mark.parametrize("reason", [RunState.FINISH_MIGRATE, RunState.SAVE_VM, RunState.PAUSED])
def test_a_reset_asked_for_while_the_guest_is_stopped_waits_until_it_goes_on(
    tmp_path: Path, stack: ExitStack, reason: RunState
) -> None:
    machine = start(stack, machine_with(tmp_path, counting(HANG), reboot=True))
    wait_for_boots(tmp_path / "serial", b"1")
    machine.pause(reason)
    before = machine.digest()["slots"]
    ask(machine)
    time.sleep(0.1)
    assert machine.digest()["slots"] == before
    assert machine.runstate is reason
    machine.resume()
    wait_for_boots(tmp_path / "serial", b"12")


def test_a_reset_that_waits_goes_with_the_guest(tmp_path: Path, stack: ExitStack) -> None:
    machine = start(stack, machine_with(tmp_path, counting(HANG), reboot=True))
    wait_for_boots(tmp_path / "serial", b"1")
    machine.pause(RunState.FINISH_MIGRATE)
    ask(machine)
    there = Machine.build(machine.describe(), HostSide(serial=f"file:{tmp_path / 'there'}"))
    stack.callback(there.close)
    for slot in machine.memory.slots:
        there.memory.write(slot.base_gfn << 12, machine.memory.read(slot.base_gfn << 12, slot.nr_pages << 12))
    there.load(machine.save()).require()
    assert SECTION in {section.name for section in there.save()}
    there.resume()
    wait_for_boots(tmp_path / "there", b"2")
    there.pause()
    assert SECTION not in {section.name for section in there.save()}


@pytest.mark.parametrize(
    "sections",
    [
        [Section(SECTION, 2, {})],
        [Section(SECTION, 1, {"x": 1})],
        [Section(SECTION, 1, {}), Section(SECTION, 1, {})],
    ],
)
def test_a_wrong_section_is_refused(sections: list[Section]) -> None:
    with pytest.raises(StreamError, match=SECTION):
        take_pending(sections)


def spoil(image: Path) -> None:
    image.write_bytes(image.read_bytes()[:-1] + b"x")


@pytest.mark.parametrize(
    ("harm", "text"), [(Path.unlink, "is not here"), (spoil, "not the file any more"), (Path.mkdir, "is not here")]
)
def test_what_is_not_there_to_boot_ends_the_guest_with_the_reason(
    tmp_path: Path, stack: ExitStack, harm: Callable[[Path], None], text: str
) -> None:
    machine = start(stack, machine_with(tmp_path, counting(HANG), reboot=True))
    wait_for_boots(tmp_path / "serial", b"1")
    if harm is Path.mkdir:
        (tmp_path / "image").unlink()
    harm(tmp_path / "image")
    # The operator is told, and nothing happens to the guest.
    with pytest.raises(ConfigError, match=text):
        machine.reset()
    assert runstate_of(machine) is RunState.RUNNING and machine.end is None
    ask(machine)
    end = wait_for_end(machine)
    assert (end.kind, end.exit_status) == ("reset", 10)
    assert str(tmp_path / "image") in end.text and text in end.text
    assert runstate_of(machine) is RunState.SHUTDOWN


def test_a_guest_of_which_nobody_knows_what_it_booted_ends_at_a_reset(tmp_path: Path, stack: ExitStack) -> None:
    machine = start(stack, machine_with(tmp_path, counting(HANG), reboot=True))
    wait_for_boots(tmp_path / "serial", b"1")
    machine.pause()
    description: dict[str, Any] = machine.describe()
    del description["boot"]
    there = Machine.build(description, HostSide())
    stack.callback(there.close)
    there.load(machine.save()).require()
    there.resume()
    ask(there)
    assert "without word of what it was booted from" in wait_for_end(there).text


def test_without_reboot_a_reset_ends_the_guest_whoever_asks(tmp_path: Path, stack: ExitStack) -> None:
    machine = start(stack, machine_with(tmp_path, counting(HANG)))
    wait_for_boots(tmp_path / "serial", b"1")
    machine.reset()
    assert wait_for_end(machine) == GuestEnd.reset_button()
    with pytest.raises(StateError, match="shutdown"):
        machine.reset()


@pytest.mark.parametrize("reason", [RunState.FINISH_MIGRATE, RunState.SAVE_VM])
def test_the_button_is_refused_while_the_guest_is_in_other_hands(
    tmp_path: Path, stack: ExitStack, reason: RunState
) -> None:
    machine = start(stack, machine_with(tmp_path, HANG, reboot=True))
    machine.pause(reason)
    with pytest.raises(StateError, match=reason):
        machine.reset()


def test_a_guest_that_resets_itself_for_ever_can_be_paused_saved_sampled_reset_and_closed(
    tmp_path: Path, stack: ExitStack
) -> None:
    machine = machine_with(tmp_path, BY_ACPI + HANG, reboot=True)
    told: list[GuestEnd] = []
    machine.on_reset = told.append
    start(stack, machine)
    until = time.monotonic() + 3
    turns = 0
    while time.monotonic() < until:
        machine.pause(RunState.SAVE_VM if turns % 2 else RunState.PAUSED)
        machine.save()
        machine.resume()
        if turns % 3 == 0:
            machine.reset()
        if turns % 3 == 1:
            machine.sample()
        time.sleep(0.001 * (turns % 7))
        turns += 1
    assert machine.end is None
    assert machine.runstate is RunState.RUNNING
    before = len(told)
    assert turns > 20 and before > 20
    wait_until(lambda: len(told) > before + 3, "it still resets itself")
    machine.close()


def test_a_vcpu_that_cannot_go_on_is_a_crash_even_during_a_reset(tmp_path: Path, stack: ExitStack) -> None:
    machine = start(stack, machine_with(tmp_path, HANG, reboot=True))
    machine.pause()
    ask(machine)
    machine.cpus._end(GuestEnd.crashed("the vCPU's thread died"))
    machine.cpus._end(GuestEnd.crashed("another"))
    assert wait_for_end(machine).text == "the vCPU's thread died"
    assert machine.runstate is RunState.INTERNAL_ERROR
