"""A state tried on the very machine that is to have it: nothing of it is left when the trial is closed."""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from kvmigrate.config import DiskConfig, HostSide
from kvmigrate.errors import BadField
from kvmigrate.machine import room
from kvmigrate.machine.machine import Machine
from kvmigrate.state.fidelity import Fidelity
from kvmigrate.state.section import Section, decode, encode
from tests.devices.virtio.driver import Driver
from tests.oracle.digest import compare_pages

from .boot_sector import HANG, machine_with
from .resets import LEDGER, ledger, start, wait_for_beats
from .test_reset import unlike
from .test_trial import refused, sampled

pytestmark = [pytest.mark.kvm, pytest.mark.timeout(120)]
TIMER_TICKS_S = 0.1
"""A hundred ticks of the ledger's timers: what is left of one would be seen."""


def busy_guest(stack: ExitStack, directory: Path) -> Machine:
    """Two vCPUs with whatever state a guest may have, timers that tick, a disk in use and a power button pressed."""
    image = directory / "disk.img"
    image.write_bytes(bytes(1 << 16))
    machine = ledger(stack, directory, LEDGER, DiskConfig("root", image))
    machine.resume()
    wait_for_beats(directory)
    Driver(machine.memory, machine.platform.virtio.devices[1]).start()
    machine.press_power_button()
    return machine


def destination(stack: ExitStack, source: Machine, serial: str = "null") -> Machine:
    machine = Machine.build(source.describe(), HostSide("there", serial))
    stack.callback(machine.close)
    return machine


def tried(machine: Machine, sections: list[Section], resident_bytes: int = 0) -> Fidelity:
    trial = machine.trial()
    try:
        return trial.load(sections, resident_bytes)
    finally:
        time.sleep(TIMER_TICKS_S)
        trial.close()
        time.sleep(TIMER_TICKS_S)


def test_a_machine_is_as_it_was_built_after_a_busy_guests_state_was_tried_on_it(
    tmp_path: Path, stack: ExitStack
) -> None:
    source = busy_guest(stack, tmp_path)
    machine = destination(stack, source)
    before = machine.digest()
    for _ in range(3):
        assert refused(tried(machine, sampled(source))) == {}
        after = machine.digest()
        assert unlike(before, after) == []
        assert sum(compare_pages(before, after)) == 32 << 8
        assert after["entries"] == [0, 0], "a vCPU ran"


def test_a_state_that_is_being_tried_is_in_the_machine(tmp_path: Path, stack: ExitStack) -> None:
    """Else the test above could not fail."""
    source = busy_guest(stack, tmp_path)
    machine = destination(stack, source)
    before = machine.digest()
    trial = machine.trial()
    trial.load(sampled(source), 0)
    assert len(unlike(before, machine.digest())) > 20
    trial.close()
    trial.close()


def test_a_guest_goes_on_in_the_machine_on_which_its_state_was_tried(tmp_path: Path, stack: ExitStack) -> None:
    source = ledger(stack, tmp_path)
    source.resume()
    wait_for_beats(tmp_path)
    machine = destination(stack, source, f"file:{tmp_path / 'there'}")
    tried(machine, sampled(source))
    source.pause()
    for gpa in range(0, source.memory.size_bytes, 1 << 20):
        machine.memory.write(gpa, source.memory.read(gpa, 1 << 20))
    machine.load([decode(encode(section)) for section in source.save()]).require()
    assert unlike(source.digest(), machine.digest()) == []
    machine.resume()
    wait_for_more_beats(tmp_path / "there")


def wait_for_more_beats(serial: Path) -> None:
    deadline = time.monotonic() + 20
    while not (serial.exists() and min(serial.read_bytes().count(beat) for beat in (b"H 0 ", b"H 1 ")) > 5):
        assert time.monotonic() < deadline, "no heartbeats of both vCPUs"
        time.sleep(0.01)
    assert b"BAD" not in serial.read_bytes()


def test_what_a_guest_had_not_sent_yet_is_not_sent_by_a_trial(tmp_path: Path, stack: ExitStack) -> None:
    source = start(stack, machine_with(tmp_path, HANG))
    sections = sampled(source)
    (serial,) = (section for section in sections if section.name == "serial0")
    serial.body["tx"] = b"unsent"  # type: ignore[index]
    there = tmp_path / "there"
    machine = destination(stack, source, f"file:{there}")
    assert refused(tried(machine, sections)) == {}
    machine.close()
    assert there.read_bytes() == b""


def test_a_part_that_is_refused_is_taken_back_too(tmp_path: Path, stack: ExitStack) -> None:
    source = busy_guest(stack, tmp_path)
    machine = destination(stack, source)
    before = machine.digest()
    sections = sampled(source)
    (power,) = (section for section in sections if section.name == "power")
    power.body["later"] = 1  # type: ignore[index]
    assert refused(tried(machine, sections)).keys() == {"power"}
    with pytest.raises(BadField, match="comes twice"):
        tried(machine, [*sections, sections[0]])
    assert unlike(before, machine.digest()) == []


def test_memory_that_is_taken_for_the_guest_already_counts_as_room(
    tmp_path: Path, stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = start(stack, machine_with(tmp_path, HANG))
    machine, sections = destination(stack, source), sampled(source)
    monkeypatch.setattr(room, "available_bytes", lambda: 0)
    assert refused(tried(machine, sections, machine.memory.size_bytes)).keys() == {"memory"}
    for slot in machine.memory.slots:
        machine.memory.prefault(slot.base_gfn, slot.nr_pages)
    assert refused(tried(machine, sections, machine.memory.size_bytes)) == {}
    assert refused(tried(machine, sections, machine.memory.size_bytes + 1)).keys() == {"memory"}
