"""Disks of a whole machine on the real /dev/kvm: who may write them when, and how kicks and interrupts travel."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from kvmigrate.config import DiskConfig, HostSide
from kvmigrate.contract import RunState
from kvmigrate.devices.virtio.block import VirtioBlock
from kvmigrate.errors import ConfigError, HostError
from kvmigrate.kvm.vm import IOAPIC
from kvmigrate.machine.machine import Machine
from tests.devices.conftest import wait_until
from tests.devices.virtio.driver import DATA_GPA, WRITE, Driver, block_header

from .boot_sector import HANG, protected_mode_machine

pytestmark = pytest.mark.kvm

DISK_NUMBER, GSI = 1, 17
VECTOR, SPURIOUS, IRR = 0x50, 0xF0, 0x200
KICK_FOR_EVER = bytes.fromhex("c705 501000d0 00000000 ebf4")
"""Store 0 to QueueNotify of the disk, again and again."""


class Host:
    """Machines over one image; closes them all."""

    def __init__(self, directory: Path, stack: ExitStack) -> None:
        self.path = directory / "root.img"
        self.path.write_bytes(bytes(range(256)) * 256)
        self.directory, self.stack = directory, stack

    def create(self, code: bytes = HANG) -> Machine:
        disks = (DiskConfig("root", self.path),)
        machine = protected_mode_machine(self.directory, code, disks)
        self.stack.callback(machine.close)
        machine.start()
        return machine

    def build(self, source: Machine, disks: tuple[DiskConfig, ...] = ()) -> Machine:
        machine = Machine.build(source.describe(), HostSide("other", disks=disks))
        self.stack.callback(machine.close)
        return machine


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    with ExitStack() as stack:
        yield Host(tmp_path, stack)


def test_a_disk_belongs_to_one_vm(host: Host) -> None:
    first = host.create()
    with pytest.raises(ConfigError, match=r"disk root: .*root\.img is in use by another VM"):
        host.create()
    first.close()
    host.create()


def test_a_destination_gets_the_disks_only_when_the_source_gave_the_guest_up(host: Host) -> None:
    source = host.create()
    source.resume()
    destination = host.build(source)
    source.pause(RunState.SAVE_VM)
    with pytest.raises(ConfigError, match="disk root"):
        destination.load(source.save())
    source.resume()
    source.pause(RunState.FINISH_MIGRATE)
    destination.load(source.save()).require()
    destination.resume()


def test_a_source_goes_on_only_with_its_disks(host: Host) -> None:
    source = host.create()
    source.resume()
    destination = host.build(source)
    source.pause(RunState.FINISH_MIGRATE)
    destination.load(source.save()).require()
    for go_on in (source.resume, lambda: source.pause(RunState.PAUSED)):
        with pytest.raises(ConfigError, match="disk root"):
            go_on()
        assert source.runstate is RunState.FINISH_MIGRATE
    destination.close()
    source.resume()
    with pytest.raises(ConfigError, match="in use"):
        host.create()


def test_a_disk_that_is_not_there_is_refused_by_name(host: Host, tmp_path: Path) -> None:
    source = host.create()
    host.path.rename(tmp_path / "moved.img")
    with pytest.raises(HostError, match=r"disk root: .*root\.img: No such file"):
        host.build(source)
    host.build(source, (DiskConfig("root", tmp_path / "moved.img"),))
    with pytest.raises(ConfigError, match="the guest has no disk of this name, it has: root"):
        host.build(source, (DiskConfig("boot", tmp_path / "moved.img"),))


def test_another_image_than_the_guests_is_refused(host: Host, tmp_path: Path) -> None:
    source = host.create()
    source.pause(RunState.FINISH_MIGRATE)
    (tmp_path / "small.img").write_bytes(bytes(512))
    destination = host.build(source, (DiskConfig("root", tmp_path / "small.img"),))
    with pytest.raises(Exception, match="give it the same image"):
        destination.load(source.save())


def let_the_line_through(machine: Machine) -> None:
    """Unmask the disk's line in the IOAPIC, to vector 0x50 of vCPU 0, and enable that one's local APIC."""
    vm = machine.platform.vm
    chip = vm.get_irqchip(IOAPIC)
    chip["redirtbl"][GSI] = {"bits": VECTOR}
    vm.set_irqchip(IOAPIC, chip)
    regs = bytearray(vm.vcpus[0].get_lapic()["regs"])
    regs[SPURIOUS : SPURIOUS + 2] = (0x1FF).to_bytes(2, "little")
    vm.vcpus[0].set_lapic({"regs": bytes(regs)})


def is_pending(machine: Machine) -> bool:
    regs = machine.platform.vm.vcpus[0].get_lapic()["regs"]
    return bool(regs[IRR + VECTOR // 32 * 16 + VECTOR % 32 // 8] >> VECTOR % 8 & 1)


def test_a_guests_kick_is_served_and_the_interrupt_reaches_its_vcpu(host: Host) -> None:
    machine = host.create(KICK_FOR_EVER)
    device = machine.platform.virtio.devices[DISK_NUMBER]
    assert isinstance(device, VirtioBlock)
    let_the_line_through(machine)
    driver = Driver(machine.memory, device).start()
    driver.put(DATA_GPA, block_header(0, 3))
    driver.write_chain([(DATA_GPA, 16, 0), (DATA_GPA + 0x1000, 513, WRITE)])
    machine.resume()
    # Only now, without a kick of our own: the guest's brings the device here.
    driver.expose(0)
    assert driver.wait_used() == (0, 513)
    assert driver.take(DATA_GPA + 0x1000, 512) == host.path.read_bytes()[3 * 512 : 4 * 512]
    machine.pause()
    wait_until(lambda: is_pending(machine), "the interrupt of the disk is pending in the vCPU")
