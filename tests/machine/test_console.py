"""The console of a machine: part of the guest when it was asked for, and where it leads is each host's own matter."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from kvmigrate.config import BootConfig, DiskConfig, HostSide, MachineConfig, NetConfig
from kvmigrate.contract import RunState
from kvmigrate.devices.virtio.console import TX, Console
from kvmigrate.errors import BadField, ConfigError
from kvmigrate.machine.description import Description
from kvmigrate.machine.machine import Machine
from kvmigrate.machine.specs import CONSOLE, read_specs, specs_for
from kvmigrate.machine.trial import TrialMachine

from ..devices.virtio.queues import QueuesDriver, wait_for
from .boot_sector import HANG
from .test_description import good

IN_THE_DESCRIPTION = {"kind": "console", "name": "console0"}
RINGS, TEXT = 0x10000, 0x80000
RNG, BALLOON = {"kind": "rng", "name": "rng0"}, {"kind": "balloon", "name": "balloon"}


def described(*virtio: dict[str, Any]) -> Description:
    return Description.from_value(good() | {"virtio": list(virtio)})


def test_it_comes_after_disks_and_networks_and_before_the_balloon() -> None:
    specs = specs_for((DiskConfig("d", Path("/d")),), (NetConfig("n", "tap0"),), "null")
    assert [spec.name for spec in specs] == ["rng0", "disk-d", "net-n", CONSOLE, "balloon"]


def test_a_guest_has_none_that_was_not_asked_for() -> None:
    specs = Description.new(MachineConfig("vm"), ()).virtio
    assert [spec.to_value() for spec in specs] == [RNG, BALLOON]


def test_where_it_leads_does_not_travel() -> None:
    description = Description.new(MachineConfig("vm", console="file:/here"), ())
    assert [spec.to_value() for spec in description.virtio] == [RNG, IN_THE_DESCRIPTION, BALLOON]
    assert [spec.backend for spec in described(IN_THE_DESCRIPTION).virtio] == ["null"]
    with pytest.raises(BadField, match="backend"):
        read_specs([IN_THE_DESCRIPTION | {"backend": "file:/there"}])


def test_a_destination_says_where_it_leads_or_it_leads_nowhere() -> None:
    guest = described(RNG, IN_THE_DESCRIPTION, BALLOON)
    assert [spec.backend for spec in guest.on(HostSide(console="pty")).virtio] == ["null", "pty", "null"]
    assert guest.on(HostSide()) == guest


def test_a_console_that_the_guest_does_not_have_is_refused() -> None:
    with pytest.raises(ConfigError, match="the guest has no console"):
        described(RNG, BALLOON).on(HostSide(console="pty"))
    assert described(RNG, BALLOON).on(HostSide()).virtio == described(RNG, BALLOON).virtio


@pytest.mark.parametrize(("kind", "name"), [("console", "console1"), ("rng", "console0"), ("console", "rng0")])
def test_a_console_of_another_name_is_refused(kind: str, name: str) -> None:
    with pytest.raises(BadField, match="no device of kind"):
        read_specs([{"kind": kind, "name": name}])


def test_serial_port_and_console_do_not_share_a_terminal() -> None:
    with pytest.raises(ConfigError, match="cannot both be stdio"):
        MachineConfig("vm", console="stdio")
    with pytest.raises(ConfigError, match="cannot both be stdio"):
        HostSide(serial="stdio", console="stdio")
    MachineConfig("vm", serial="null", console="stdio")
    HostSide(console="stdio")


def test_a_word_that_is_no_backend_is_refused_by_what_it_was_for(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'tcp:1' is not a console backend"):
        machine_with_console(tmp_path, "tcp:1")


def machine_with_console(directory: Path, console: str | None) -> Machine:
    image = directory / "image"
    image.write_bytes(HANG.ljust(510, b"\0") + b"\x55\xaa")
    boot = BootConfig(image, "flat", 0x7C00)
    return Machine.create(MachineConfig("test", 4 << 20, 1, "null", boot, console=console))


def console_of(machine: Machine) -> Console:
    (found,) = (device for device in machine.platform.virtio.devices if isinstance(device, Console))
    return found


@contextmanager
def closing(machine: Machine) -> Iterator[Machine]:
    try:
        yield machine
    finally:
        machine.close()


def say(driver: QueuesDriver, text: bytes) -> None:
    driver.memory.write(TEXT, text)
    driver.rings[TX].put((TEXT, len(text), 0))
    driver.kick(TX)


@pytest.mark.kvm
def test_a_console_goes_on_where_the_destination_says(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    with closing(machine_with_console(tmp_path, f"file:{here}")) as source:
        driver = QueuesDriver(source.memory, console_of(source), 0)
        driver.set_up()
        source.start()
        source.resume()
        say(driver, b"before ")
        driver.rings[TX].wait_used()
        wait_for(lambda: here.read_bytes() == b"before ", "it is written")
        source.pause(RunState.FINISH_MIGRATE)
        say(driver, b"during")
        with closing(Machine.build(source.describe(), HostSide("other", console=f"file:{there}"))) as target:
            target.memory.write(RINGS, source.memory.read(RINGS, TEXT + 4096 - RINGS))
            target.load(source.save()).require()
            target.resume()
            wait_for(lambda: there.read_bytes() == b"during", "the other side serves what was queued")
    assert here.read_bytes() == b"before "


@pytest.mark.kvm
def test_a_trial_opens_no_console_and_refuses_one_that_the_guest_has_not(tmp_path: Path) -> None:
    there = tmp_path / "there"
    with closing(machine_with_console(tmp_path, "null")) as source:
        trial = TrialMachine.examine(source.describe(), HostSide(console=f"file:{there}"))
        try:
            trial.load(source.save(), 0).require()
        finally:
            trial.close()
    assert not there.exists()
    with closing(machine_with_console(tmp_path, None)) as source, pytest.raises(ConfigError, match="has no console"):
        TrialMachine.examine(source.describe(), HostSide(console="null"))


@pytest.mark.kvm
def test_without_a_word_about_it_the_console_leads_nowhere_and_the_guest_goes_on(tmp_path: Path) -> None:
    with (
        closing(machine_with_console(tmp_path, "null")) as source,
        closing(Machine.build(source.describe(), HostSide("other"))) as target,
    ):
        target.load(source.save()).require()
        driver = QueuesDriver(target.memory, console_of(target), 0)
        target.resume()
        driver.set_up()
        say(driver, b"unheard")
        driver.rings[TX].wait_used()


@pytest.mark.kvm
def test_a_guest_without_a_console_is_taken_over_as_before_and_has_none_there(tmp_path: Path) -> None:
    with closing(machine_with_console(tmp_path, None)) as source:
        assert [device.name for device in source.platform.virtio.devices] == ["rng0", "balloon"]
        description = source.describe()
        with pytest.raises(ConfigError, match="the guest has no console"):
            Machine.build(description, HostSide("other", console="null"))
        with closing(Machine.build(description, HostSide("other"))) as target:
            target.load(source.save()).require()
