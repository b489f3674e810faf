"""A destination goes through a load before its guest comes: on the guest's own machine, but never of many vCPUs."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import pytest

from kvmigrate.config import HostSide
from kvmigrate.machine import machine as machine_module
from kvmigrate.machine.machine import Machine
from kvmigrate.machine.platform import Platform
from kvmigrate.machine.rehearsal import load_own

from .boot_sector import HANG, machine_with

pytestmark = pytest.mark.kvm


@pytest.fixture
def own_loads(monkeypatch: pytest.MonkeyPatch) -> list[Platform]:
    """The machines that loaded their own state."""
    found: list[Platform] = []

    def loading(platform: Platform, saved: Sequence[bytes]) -> None:
        load_own(platform, saved)
        found.append(platform)

    monkeypatch.setattr(machine_module, "load_own", loading)
    return found


@pytest.mark.parametrize("nr_cpus", [1, 2])
def test_a_machine_that_waits_is_as_it_was_after_any_number_of_warm_ups(
    tmp_path: Path, own_loads: list[Platform], nr_cpus: int
) -> None:
    with closing(machine_with(tmp_path, HANG, nr_cpus=nr_cpus)) as source:
        with closing(Machine.build(source.describe(), HostSide("there", "null"))) as target:
            for _ in range(3):
                target.warm_up()
            assert own_loads == ([target.platform] * 3 if nr_cpus == 1 else [])
            target.load(source.save()).require()
        source.warm_up()
        assert len(own_loads) == (3 if nr_cpus == 1 else 0), "a source leaves its own alone"


def test_a_pause_and_a_first_step_are_gone_through_with_another_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, Platform]] = []
    let_go, park = Platform.let_go, Platform.park

    def letting_go(platform: Platform) -> None:
        seen.append(("let go", platform))
        let_go(platform)

    def parking(platform: Platform, timeout_ms: int) -> None:
        park(platform, timeout_ms)
        seen.append(("parked", platform))

    monkeypatch.setattr(Platform, "let_go", letting_go)
    monkeypatch.setattr(Platform, "park", parking)
    with (
        closing(machine_with(tmp_path, HANG)) as source,
        closing(Machine.build(source.describe(), HostSide("there", "null"))) as target,
    ):
        for machine in (source, target):
            seen.clear()
            machine.warm_up()
            assert [what for what, _ in seen] == ["let go", "parked"]
            assert {platform for _, platform in seen}.isdisjoint({source.platform, target.platform})
            assert [vcpu.nr_entries for vcpu in target.platform.vm.vcpus] == [0]
