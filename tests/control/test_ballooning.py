"""The balloon of a real machine in QMP's terms; its driver's part is played on the device's registers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from kvmigrate.config import BootConfig, MachineConfig
from kvmigrate.control import ballooning
from kvmigrate.control.qmp import QmpError
from kvmigrate.devices.virtio import registers as reg
from kvmigrate.devices.virtio.balloon import VirtioBalloon
from kvmigrate.machine.machine import Machine

pytestmark = pytest.mark.kvm

MIB = 1 << 20
NUM_PAGES, ACTUAL = reg.CONFIG, reg.CONFIG + 4


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    image = tmp_path / "sector.bin"
    image.write_bytes(b"\xf4\xeb\xfd".ljust(510, b"\0") + b"\x55\xaa")
    made = Machine.create(MachineConfig("vm", memory_bytes=16 * MIB, serial="null", boot=BootConfig(image)))
    yield made
    made.close()


def balloon_of(machine: Machine) -> VirtioBalloon:
    found = machine.platform.virtio.balloon
    assert found is not None
    return found


def drive(balloon: VirtioBalloon) -> None:
    """Set the device up as far as DRIVER_OK."""
    balloon.write(reg.STATUS, 4, reg.ACKNOWLEDGE | reg.DRIVER)
    balloon.write(reg.DRIVER_FEATURES_SEL, 4, 1)
    balloon.write(reg.DRIVER_FEATURES, 4, reg.F_VERSION_1 >> 32)
    for status in (reg.FEATURES_OK, reg.FEATURES_OK | reg.DRIVER_OK):
        balloon.write(reg.STATUS, 4, reg.ACKNOWLEDGE | reg.DRIVER | status)


def test_a_guest_without_a_driver_that_is_ready_is_not_asked(machine: Machine) -> None:
    balloon = balloon_of(machine)
    for status in (0, reg.ACKNOWLEDGE | reg.DRIVER):
        balloon.write(reg.STATUS, 4, status)
        with pytest.raises(QmpError, match="has no balloon driver, or it is not ready yet") as refused:
            ballooning.resize(machine, 8 * MIB)
        assert refused.value.error_class == "DeviceNotActive"
    assert balloon.read(NUM_PAGES, 4) == 0
    whole = {"actual": 16 * MIB, "x-kvmigrate-target": 16 * MIB, "x-kvmigrate-driver": False}
    assert ballooning.facts(machine) == whole


def test_the_driver_is_told_how_many_pages_to_give_up_and_tells_how_far_it_is(machine: Machine) -> None:
    balloon = balloon_of(machine)
    drive(balloon)
    ballooning.resize(machine, 12 * MIB)
    assert balloon.read(NUM_PAGES, 4) == 4 * MIB // 4096
    assert balloon.read(reg.INTERRUPT_STATUS, 4) & 2
    balloon.write(ACTUAL, 4, 3 * MIB // 4096)
    assert ballooning.facts(machine) == {
        "actual": 13 * MIB,
        "x-kvmigrate-target": 12 * MIB,
        "x-kvmigrate-driver": True,
    }
    ballooning.resize(machine, 1 << 40)
    assert balloon.read(NUM_PAGES, 4) == 0


def test_a_driver_that_lies_makes_no_negative_number(machine: Machine) -> None:
    balloon = balloon_of(machine)
    drive(balloon)
    balloon.write(ACTUAL, 4, 0xFFFFFFFF)
    assert ballooning.facts(machine)["actual"] == 0
