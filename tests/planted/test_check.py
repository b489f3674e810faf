"""Losses planted in a destination: ``check`` names each and moves nothing, ``send`` refuses before a page moves."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from ..oracle.heartbeat import judge, require_progress
from ..oracle.world import Process, World, migrate, open_world
from .examine import boot
from .faults import LOSSES

pytestmark = [pytest.mark.kvm, pytest.mark.timeout(300)]
NAMED = {"lose-msr": "vcpu0.msrs.MSR_IA32_CR_PAT", "lose-feature": "vcpu0.cpuid.sse2"}


@pytest.fixture
def world() -> Iterator[World]:
    with open_world() as opened:
        yield opened


def lossy(world: World, fault: str) -> tuple[Process, str]:
    """A destination that has ``fault``, and where it waits; other processes have none."""
    world.environment["KVMIGRATE_TEST_FAULT"] = fault
    address = world.tcp()
    try:
        return world.receive(address), address
    finally:
        del world.environment["KVMIGRATE_TEST_FAULT"]


@pytest.mark.parametrize("fault", NAMED)
def test_a_check_names_the_loss_in_a_table_and_by_its_exit_status(world: World, fault: str) -> None:
    source = boot(world)
    destination, address = lossy(world, fault)
    for _ in range(2):
        done = world.command("check", source.name, address)
        assert done.returncode == 1, done.stderr
        assert NAMED[fault] in done.stdout
        assert "this guest cannot go on: 1 item would be lost" in done.stdout
    done = world.command("check", source.name, address, "--json")
    assert done.returncode == 1, done.stderr
    found = json.loads(done.stdout)
    assert found["fits"] is False
    assert [(item[0], item[1]) for item in found["items"] if item[1] == "refused"] == [(NAMED[fault], "refused")]
    require_progress(source.log, 3)
    assert source.status() == "running"
    assert destination.status() == "inmigrate", "the one who waits for a guest does not any more"


def test_a_send_is_refused_before_a_page_moves(world: World) -> None:
    source = boot(world)
    destination, address = lossy(world, "lose-msr")
    job = migrate(source, address)
    assert job["status"] == "failed"
    assert NAMED["lose-msr"] in job["error"]["desc"]
    assert "\n" not in job["error"]["desc"]
    assert job["result"]["check"]["fits"] is False
    assert not job["result"].get("rounds")
    assert "ram" not in job["result"]
    require_progress(source.log, 3)
    assert destination.wait_end() == 2
    assert not destination.log.chunks
    judge(world.logs)


def test_a_guest_that_fits_is_checked_and_then_sent_to_the_same_destination(world: World) -> None:
    source = boot(world, cpus=2)
    address = world.tcp()
    destination = world.receive(address)
    for _ in range(3):
        done = world.command("check", source.name, address)
        assert done.returncode == 0, done.stderr + done.stdout
        assert "this guest can go on" in done.stdout
    assert migrate(source, address)["status"] == "completed"
    assert source.wait_end() == 6
    require_progress(destination.log, 10)
    judge(world.logs)


def test_every_loss_is_planted() -> None:
    assert LOSSES.keys() == NAMED.keys()
