"""The state of a machine that runs on, tried on a machine that is thrown away, on the real /dev/kvm."""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from kvmigrate.config import DiskConfig, HostSide, NetConfig
from kvmigrate.contract import RunState
from kvmigrate.devices.end import GuestEnd
from kvmigrate.devices.virtio.image import open_disk
from kvmigrate.devices.virtio.net import FEATURES
from kvmigrate.errors import BadField
from kvmigrate.machine.machine import Machine
from kvmigrate.machine.room import available_bytes
from kvmigrate.machine.trial import TrialMachine
from kvmigrate.memory import huge
from kvmigrate.memory.layout import slots_for
from kvmigrate.state.fidelity import Fidelity, Item, Verdict
from kvmigrate.state.section import Section, decode, encode
from tests.backends import HUGETLBFS, room_for
from tests.devices.virtio.queues import QueuesDriver
from tests.devices.virtio.test_real_tap import Namespace
from tests.losing import msr_is_lost

from .boot_sector import HANG, POWER_OFF, machine_with, out_byte, protected_mode_machine
from .test_moved_network import MAC, card, namespace

pytestmark = pytest.mark.kvm
__all__ = ["namespace"]

TALKATIVE = out_byte(0x3F8, 0x41) + bytes([0xEB, 0xF9 - 1])
"""Writes to the serial port for ever."""


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def disk(tmp_path: Path) -> DiskConfig:
    path = tmp_path / "root.img"
    path.write_bytes(bytes(1 << 16))
    return DiskConfig("root", path)


def started(machine: Machine, stack: ExitStack) -> Machine:
    stack.callback(machine.close)
    machine.start()
    machine.resume()
    return machine


def sampled(machine: Machine) -> list[Section]:
    """As they arrive at a destination."""
    sections, pause_ms = machine.sample()
    assert pause_ms > 0
    return [decode(encode(section)) for section in sections]


def tried(description: Any, sections: list[Section], resident_bytes: int = 0, **given: Any) -> Fidelity:
    trial = TrialMachine.examine(description, HostSide(**given))
    try:
        return trial.load(sections, resident_bytes)
    finally:
        trial.close()


def refused(fidelity: Fidelity) -> dict[str, Item]:
    return {item.name: item for item in fidelity if item.verdict is Verdict.REFUSED}


def memory_of_size(size_bytes: int) -> dict[str, Any]:
    """What a description says of so much memory."""
    return {"memory_bytes": size_bytes, "slots": [list(slot) for slot in slots_for(size_bytes)]}


@pytest.mark.parametrize("nr_cpus", [1, 3])
def test_a_running_guest_fits_its_own_host_and_runs_on(tmp_path: Path, stack: ExitStack, nr_cpus: int) -> None:
    machine = started(machine_with(tmp_path, TALKATIVE, nr_cpus=nr_cpus), stack)
    states: list[RunState] = []
    machine.on_change(states.append)
    for _ in range(5):
        fidelity = tried(machine.describe(), sampled(machine))
        assert refused(fidelity) == {}
        assert fidelity.counts()["exact"] > 100
    assert states == [], "a sample is no pause for whoever watches the run state"
    entries = machine.platform.vm.vcpus[0].nr_entries
    time.sleep(0.05)
    assert machine.platform.vm.vcpus[0].nr_entries > entries, "the guest stands still"


@pytest.mark.parametrize("nr_cpus", [1, 3])
def test_a_sample_pauses_a_guest_once_for_each_vcpu_and_lets_it_run_between_those_pauses_only(
    tmp_path: Path, stack: ExitStack, monkeypatch: pytest.MonkeyPatch, nr_cpus: int
) -> None:
    machine = started(machine_with(tmp_path, TALKATIVE, nr_cpus=nr_cpus), stack)
    pauses: list[int] = []
    slept: list[float] = []
    pause = machine.platform.vm.group.pause

    def pausing(timeout_ms: int) -> None:
        pauses.append(timeout_ms)
        pause(timeout_ms)

    monkeypatch.setattr(machine.platform.vm.group, "pause", pausing)
    monkeypatch.setattr("kvmigrate.machine.sampling.time.sleep", slept.append)
    machine.sample()
    assert len(pauses) == nr_cpus
    assert sum(seconds > 0 for seconds in slept) == nr_cpus - 1


def test_a_trial_touches_no_memory(tmp_path: Path, stack: ExitStack, disk: DiskConfig) -> None:
    machine = started(protected_mode_machine(tmp_path, HANG, disks=(disk,)), stack)
    trial = TrialMachine.examine(machine.describe(), HostSide())
    stack.callback(trial.close)
    assert refused(trial.load(sampled(machine), 0)) == {}
    assert trial._platform is not None
    assert trial._platform.memory.resident_runs(8) == []


def test_a_paused_guest_stays_paused_and_one_that_ended_stays_ended(tmp_path: Path, stack: ExitStack) -> None:
    machine = machine_with(tmp_path, HANG)
    started(machine, stack)
    machine.pause()
    machine.sample()
    assert machine.runstate is RunState.PAUSED
    other = machine_with(tmp_path, POWER_OFF)
    stack.callback(other.close)
    other.start()
    other.resume()
    # Some of these lie before the end, some in it, some after.
    while other.wait_end(0) is None:
        other.sample()
    other.sample()
    assert other.runstate is RunState.SHUTDOWN
    entries = other.platform.vm.vcpus[0].nr_entries
    time.sleep(0.05)
    assert other.platform.vm.vcpus[0].nr_entries == entries, "a guest that ended was let run"


def test_a_guest_that_ends_while_its_vcpus_park_is_not_let_run(
    tmp_path: Path, stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = started(machine_with(tmp_path, TALKATIVE), stack)
    group = machine.platform.vm.group
    pause = group.pause

    def last_exit(timeout_ms: int) -> None:
        machine._end_guest(GuestEnd.powered_off())
        pause(timeout_ms)

    monkeypatch.setattr(group, "pause", last_exit)
    machine.sample()
    entries = machine.platform.vm.vcpus[0].nr_entries
    time.sleep(0.05)
    assert machine.runstate is RunState.SHUTDOWN
    assert machine.platform.vm.vcpus[0].nr_entries == entries


def test_missing_cpu_features_are_named(tmp_path: Path, stack: ExitStack) -> None:
    machine = started(machine_with(tmp_path, HANG), stack)
    description = copy.deepcopy(machine.describe())
    (features,) = (row for row in description["cpuid"][0] if (row["function"], row["index"]) == (7, 0))
    features["ebx"] = 0xFFFFFFFF
    found = refused(tried(description, sampled(machine)))
    assert found
    assert all(name.startswith("vcpu0.cpuid.") for name in found), found


def test_an_msr_that_the_host_drops_is_named(tmp_path: Path, stack: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = started(machine_with(tmp_path, HANG), stack)
    sections = sampled(machine)
    (vcpu,) = (section for section in sections if section.name == "vcpu0")
    vcpu.body["msrs"]["MSR_LSTAR"] = 0xFFFFFFFF81000000
    for owner, name, value in msr_is_lost(0xC0000082):
        monkeypatch.setattr(owner, name, value)
    (item,) = refused(tried(machine.describe(), sections)).values()
    assert (item.name, item.saved, item.read_back) == ("vcpu0.msrs.MSR_LSTAR", 0xFFFFFFFF81000000, 0)


def test_each_part_that_cannot_be_loaded_is_named_and_the_others_are_tried(tmp_path: Path, stack: ExitStack) -> None:
    machine = started(machine_with(tmp_path, HANG), stack)
    sections = {section.name: section for section in sampled(machine)}
    sections["serial0"] = Section("serial0", 9, sections["serial0"].body)
    del sections["cmos"]
    sections["gpu0"] = Section("gpu0", 1, {})
    sections["power"].body["later"] = 1  # type: ignore[index]
    fidelity = tried(machine.describe(), list(sections.values()))
    found = refused(fidelity)
    assert found.keys() == {"sections", "serial0", "power"}
    assert "version 9" in found["serial0"].why
    assert "'later'" in found["power"].why
    assert fidelity.counts()["exact"] > 100


def test_a_section_that_comes_twice_is_no_state(tmp_path: Path, stack: ExitStack) -> None:
    machine = started(machine_with(tmp_path, HANG), stack)
    sections = sampled(machine)
    with pytest.raises(BadField, match="comes twice"):
        tried(machine.describe(), [*sections, sections[0]])


def test_a_guest_with_more_in_use_than_is_free_is_refused(tmp_path: Path, stack: ExitStack) -> None:
    machine = started(machine_with(tmp_path, HANG), stack)
    sections = sampled(machine)
    assert refused(tried(machine.describe(), sections, available_bytes() // 2)) == {}
    found = refused(tried(machine.describe(), sections, 1 << 50))
    assert found.keys() == {"memory"}
    assert found["memory"].saved == "1073741824 MiB"


def test_a_tsc_rate_that_the_host_cannot_give_is_told(tmp_path: Path, stack: ExitStack) -> None:
    machine = started(machine_with(tmp_path, HANG), stack)
    if machine.platform.can_scale_tsc:
        pytest.skip("this host can give a guest any rate")
    found = refused(tried(machine.describe() | {"tsc_khz": 1_000_000}, sampled(machine)))
    assert "tsc_khz" in found
    assert "cannot scale" in found["tsc_khz"].why


def test_huge_pages_are_counted_unless_the_guest_has_them(tmp_path: Path, stack: ExitStack) -> None:
    machine = started(machine_with(tmp_path, HANG), stack)
    sections, description = sampled(machine), machine.describe() | memory_of_size(1 << 33)
    stack.enter_context(room_for(HUGETLBFS, 2 << 20))
    needed, free = (1 << 33) // huge.HUGE_BYTES, huge.free_bytes() // huge.HUGE_BYTES
    found = refused(tried(description, sections, 1 << 60, memory_backend=HUGETLBFS))
    assert found.keys() == {"memory"}, "other memory does not matter"
    assert f"{needed} huge pages of 2 MiB are needed, {free} are free: sudo sysctl" in found["memory"].why
    trial = TrialMachine.examine(description, HostSide(memory_backend=HUGETLBFS), touched_bytes=1 << 33)
    stack.callback(trial.close)
    assert refused(trial.load(sections, 0)) == {}
    found = refused(tried(machine.describe() | memory_of_size((4 << 20) + 4096), sections, memory_backend=HUGETLBFS))
    assert "take a multiple of 2M" in found["memory"].why
    assert "is free here, with the swap" in refused(tried(description, sections, 1 << 60))["memory"].why


def test_a_disk_is_looked_at_and_not_locked(tmp_path: Path, stack: ExitStack, disk: DiskConfig) -> None:
    machine = started(protected_mode_machine(tmp_path, HANG, disks=(disk,)), stack)
    sections = sampled(machine)
    trial = TrialMachine.examine(machine.describe(), HostSide())
    stack.callback(trial.close)
    assert refused(trial.load(sections, 0)) == {}
    machine.close()
    image = open_disk("root", disk.path)
    image.lock()
    image.close()


def test_what_is_wrong_with_a_disk_is_told_once(tmp_path: Path, stack: ExitStack, disk: DiskConfig) -> None:
    machine = started(protected_mode_machine(tmp_path, HANG, disks=(disk,)), stack)
    sections, description = sampled(machine), machine.describe()
    found = refused(tried(description, sections, disks=(DiskConfig("root", tmp_path / "none"),)))
    assert found.keys() == {"disk-root"}
    assert "No such file" in found["disk-root"].why
    small = tmp_path / "small"
    small.write_bytes(bytes(512))
    found = refused(tried(description, sections, disks=(DiskConfig("root", small),)))
    assert found.keys() == {"disk-root"}
    assert "give it the same image" in found["disk-root"].why


def test_a_tap_is_looked_at_and_not_opened(tmp_path: Path, stack: ExitStack, namespace: Namespace) -> None:
    machine = namespace.run(
        lambda: protected_mode_machine(tmp_path, HANG, nets=(NetConfig("lan", "tap0", MAC),)),
    )
    QueuesDriver(machine.memory, card(machine), FEATURES).set_up()
    started(machine, stack)
    sections, description = sampled(machine), machine.describe()

    def at(interface: str) -> dict[str, Item]:
        nets = (NetConfig("lan", interface),)
        return refused(namespace.run(lambda: tried(description, sections, nets=nets)))

    assert at("tap1") == {}
    assert at("tap1") == {}, "the first trial kept it"
    assert at("tap0")["net-lan"].why == "it is in use by another VM"
    assert "no tap" in at("lo")["net-lan"].why
    assert "it does not exist: create it with ip tuntap add dev tap9" in at("tap9")["net-lan"].why
    machine.close()
    assert at("tap0") == {}


def test_a_guest_whose_disk_works_is_sampled_and_fits(tmp_path: Path, stack: ExitStack, disk: DiskConfig) -> None:
    """How far the device's thread is in its queue moves while that is read."""
    machine = started(protected_mode_machine(tmp_path, HANG, disks=(disk,)), stack)
    (block,) = (device for device in machine.platform.virtio.devices if device.name == "disk-root")
    stop = threading.Event()

    def move() -> None:
        number = 0
        while not stop.is_set():
            number = number + 7 & 0xFFFF
            block.handle.queue[0].last_avail, block.handle.queue[0].used_idx = number, number - 3 & 0xFFFF

    thread = threading.Thread(target=move)
    thread.start()
    try:
        for _ in range(10):
            assert refused(tried(machine.describe(), sampled(machine))) == {}
    finally:
        stop.set()
        thread.join()
