"""A VM that is made before its guest: taken once, and no other than one that is made in time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from functools import partial
from pathlib import Path

import pytest

from kvmigrate.config import MIN_MEMORY_BYTES, HostSide, MemoryBackend
from kvmigrate.kvm.clocks import without_vcpu_clocks, without_vm_clocks
from kvmigrate.kvm.vm import Vm
from kvmigrate.machine import spare_vm
from kvmigrate.machine.machine import Machine
from kvmigrate.machine.trial import TrialMachine
from kvmigrate.memory.region import GuestMemory
from kvmigrate.state.section import Section
from tests.devices.conftest import wait_until

from .boot_sector import HANG, machine_with

pytestmark = pytest.mark.kvm
MEMFD = partial(GuestMemory, backend=MemoryBackend.MEMFD)


@pytest.fixture(autouse=True)
def none_left() -> Iterator[None]:
    """No VM is set aside before or after a test."""
    close_all()
    yield
    close_all()


def close_all() -> None:
    while spare_vm._spare:
        spare_vm._spare.pop().close()


@contextmanager
def taken(memory_bytes: int, make_memory: Callable[[int], GuestMemory] | None = None) -> Iterator[spare_vm.Base]:
    base = spare_vm.take(memory_bytes, make_memory)
    yield base
    base.vm.close()
    base.memory.close()


def set_aside(memory_bytes: int = 0) -> Vm:
    """Have a VM set aside, and look at it."""
    spare_vm.set_aside(memory_bytes)
    [spare] = spare_vm._spare
    return spare.vm


def nr_vms() -> int:
    """How many VMs this process has."""
    found = 0
    for link in Path("/proc/self/fd").iterdir():
        # One of them was for looking at the directory.
        with suppress(FileNotFoundError):
            found += link.readlink() == Path("anon_inode:kvm-vm")
    return found


def built(source: Machine) -> Machine:
    return Machine.build(source.describe(), HostSide("there", "null"))


def standing(sections: list[Section]) -> dict[str, object]:
    """All of a state but what goes on by itself."""
    without = {"vm": without_vm_clocks, "vcpu": without_vcpu_clocks}
    return {s.name: without.get(s.name.rstrip("0123456789"), dict)(s.body) for s in sections}


def test_one_is_kept_however_often_it_is_asked_for() -> None:
    vm, before = set_aside(), nr_vms()
    assert set_aside() is vm
    assert nr_vms() == before


@pytest.mark.parametrize("nr_cpus", [1, 3])
def test_the_next_machine_is_made_of_it_and_the_one_after_that_is_the_same_without(
    tmp_path: Path, nr_cpus: int
) -> None:
    with closing(machine_with(tmp_path, HANG, nr_cpus=nr_cpus)) as source:
        vm = set_aside()
        spare_vm.wait_until_rested()
        with closing(built(source)) as first, closing(built(source)) as second:
            assert first.platform.vm is vm
            assert second.platform.vm is not vm
            assert first.platform.held_cpuid() == second.platform.held_cpuid()
            assert standing(first.save()) == standing(second.save())
            counts = [machine.load(source.save()).counts() for machine in (first, second)]
            assert counts[0] == counts[1]
            assert counts[0]["refused"] == 0


def test_a_machine_does_not_wait_for_one_that_has_not_rested(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spare_vm, "RESTS_FOR_S", 60.0)
    vm = set_aside()
    with taken(MIN_MEMORY_BYTES) as base:
        assert base.vm is not vm
    assert set_aside() is vm, "it rests on"


def test_memory_that_was_set_aside_is_taken_by_a_machine_of_that_size_and_is_the_vms_already(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with closing(machine_with(tmp_path, HANG)) as source:
        size_bytes = source.memory.size_bytes
        vm = set_aside(size_bytes)
        [spare] = spare_vm._spare
        spare_vm.wait_until_rested()
        # Once more would be no error, but take as long again.
        monkeypatch.setattr(GuestMemory, "attach", pytest.fail)
        with closing(built(source)) as target:
            assert (target.platform.vm, target.memory) == (vm, spare.memory)
            assert target.load(source.save()).counts()["refused"] == 0
            target.start()
            target.resume()
            wait_until(lambda: target.platform.vm.vcpus[0].nr_entries > 0, "it runs")


@pytest.mark.parametrize(("memory_bytes", "make_memory"), [(2 * MIN_MEMORY_BYTES, None), (MIN_MEMORY_BYTES, MEMFD)])
def test_memory_of_another_size_or_kind_is_left_alone(
    memory_bytes: int, make_memory: Callable[[int], GuestMemory] | None
) -> None:
    vm = set_aside(MIN_MEMORY_BYTES)
    spare_vm.wait_until_rested()
    with taken(memory_bytes, make_memory) as base:
        assert base.vm is not vm
        assert base.memory.size_bytes == memory_bytes
        assert not base.is_attached
    assert set_aside(MIN_MEMORY_BYTES) is vm


def test_another_size_takes_the_place_of_the_one_before() -> None:
    set_aside(MIN_MEMORY_BYTES)
    before = nr_vms()
    set_aside(2 * MIN_MEMORY_BYTES)
    [spare] = spare_vm._spare
    assert spare.memory is not None
    assert spare.memory.size_bytes == 2 * MIN_MEMORY_BYTES
    assert nr_vms() == before


def test_only_a_guests_own_machine_takes_it(tmp_path: Path) -> None:
    with closing(machine_with(tmp_path, HANG)) as source:
        vm = set_aside()
        spare_vm.wait_until_rested()
        TrialMachine.examine(source.describe(), HostSide("there", "null")).close()
        assert set_aside() is vm


def test_a_vm_that_cannot_be_furnished_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(vm: object) -> None:
        raise OSError

    before = nr_vms()
    monkeypatch.setattr(spare_vm, "furnish", refused)
    with pytest.raises(OSError):
        spare_vm.set_aside()
    assert nr_vms() == before
    assert not spare_vm._spare
