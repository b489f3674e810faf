"""A guest that is moved again and again by real processes loses nothing: all three witnesses agree at every hop."""

from __future__ import annotations

from pathlib import Path

import pytest

from .digest import load_pairs, require_equal
from .heartbeat import judge, require_progress
from .world import MOVED, POWERED_OFF, Process, World, wait_job

LEDGER = "beat=10 pages=2000 fill=4 rate=20 irq=1 state=1 ymm=1"
QUICK_HOPS = 10

pytestmark = pytest.mark.timeout(400)


def watch(world: World) -> Path:
    """Let every process that starts from now on write digests; where they lie."""
    directory = world.directory / "witness"
    directory.mkdir()
    world.environment["KVMIGRATE_TEST_WITNESS"] = str(directory)
    return directory


def travel(world: World, guest: Process, hops: int, *, unix: bool = False, **parameters: str) -> Process:
    """Move ``guest`` on, ``hops`` times, each time as soon as it has shown that it runs."""
    for _ in range(hops):
        guest = world.hop(guest, world.unix() if unix else world.tcp(), **parameters)
        require_progress(guest.log, 3)
    return guest


def finish(world: World, guest: Process, hops: int) -> None:
    """The guest runs on at its last place, and nothing on the way was wrong."""
    require_progress(guest.log, 10)
    verdict = judge(world.logs)
    assert len(verdict.blackouts_ms) == hops
    print(f"blackouts in ms: {', '.join(f'{ms:.1f}' for ms in verdict.blackouts_ms)}")


@pytest.mark.parametrize(
    ("cpus", "compression", "unix", "log_mode"),
    [
        pytest.param(1, "none", False, "CLEAR", id="tcp"),
        pytest.param(2, "none", True, "CLEAR", id="two-vcpus-unix"),
        pytest.param(2, "zstd", False, "GET", id="two-vcpus-zstd-get-dirty-log"),
    ],
)
def test_ping_pong_loses_nothing(world: World, cpus: int, compression: str, unix: bool, log_mode: str) -> None:
    world.environment["KVMIGRATE_TEST_LOG_MODE"] = log_mode
    hops = QUICK_HOPS if cpus == 1 else QUICK_HOPS // 2
    digests = watch(world)
    guest = world.run("ledger", LEDGER, cpus=cpus)
    guest = travel(world, guest, hops, unix=unix, **{"x-kvmigrate-compression": compression})
    finish(world, guest, hops)
    pairs = load_pairs(digests)
    assert len(pairs) == hops
    assert {require_equal(out, into) for out, into in pairs} == {32 << 8}


def test_a_guest_that_writes_as_fast_as_it_can_arrives_whole(world: World) -> None:
    digests = watch(world)
    guest = travel(world, world.run("ledger", LEDGER.replace("rate=20", "rate=0"), cpus=2), 2)
    finish(world, guest, 2)
    for out, into in load_pairs(digests):
        require_equal(out, into)


def test_memory_that_is_no_multiple_of_64_pages_arrives_whole(world: World) -> None:
    digests = watch(world)
    guest = travel(world, world.run("ledger", LEDGER, memory=str((8192 + 3) << 12)), 2)
    finish(world, guest, 2)
    assert {require_equal(out, into) for out, into in load_pairs(digests)} == {8195}


def test_memory_on_both_sides_of_the_hole_arrives_whole(world: World) -> None:
    guest = travel(world, world.run("ledger", LEDGER, memory="3700M"), 2)
    finish(world, guest, 2)


def test_a_paused_guest_stays_paused_and_is_equal_over_qmp(world: World) -> None:
    source = world.run("ledger", LEDGER)
    source.execute("stop")
    out = source.execute("x-digest")
    address = world.tcp()
    destination = world.receive(address)
    world.send(source, address)
    assert source.wait_end() == MOVED
    assert destination.wait_status("paused") == "paused"
    assert require_equal(out, destination.execute("x-digest")) == 32 << 8
    destination.execute("cont")
    finish(world, destination, 1)


def test_a_running_guest_is_equal_over_qmp_at_both_ends(world: World) -> None:
    """No hook in either process: the source is asked after the guest has left, the destination before it runs."""
    source = world.run("ledger", LEDGER, cpus=2)
    address = world.unix()
    destination = world.receive(address, "--paused")
    with source.client() as client:
        client.execute("migrate", {"uri": address})
        assert wait_job(client)["status"] == "completed"
        out = client.execute("x-digest")
    assert require_equal(out, destination.execute("x-digest")) == 32 << 8
    destination.execute("cont")
    finish(world, destination, 1)


def test_a_destination_told_to_wait_holds_the_guest_until_cont(world: World) -> None:
    source = world.run("ledger", LEDGER)
    address = world.tcp()
    destination = world.receive(address, "--paused")
    world.send(source, address)
    assert source.wait_end() == MOVED
    assert destination.wait_status("paused") == "paused"
    assert not destination.log.chunks
    destination.execute("cont")
    finish(world, destination, 1)


def test_the_guest_ends_where_it_is_with_its_books_balanced(world: World) -> None:
    guest = travel(world, world.run("ledger", LEDGER, cpus=2), 2)
    guest.log.send("stop\n")
    assert guest.wait_end() == POWERED_OFF
    assert judge(world.logs).ended


def test_interrupts_arrive_after_a_hop(world: World) -> None:
    guest = world.run("ledger", LEDGER)
    for number in range(3):
        guest = world.hop(guest, world.tcp())
        guest.log.send(f"hop {number}\n")
        guest.log.wait_for(f"E hop {number}\n")
    judge(world.logs)


def test_who_asked_for_the_move_and_says_quit_does_not_keep_the_source(world: World) -> None:
    source = world.run("ledger", "beat=10 pages=10", memory="16M")
    destination = world.receive(address := world.tcp())
    with source.client() as client:
        client.execute("migrate", {"uri": address})
        assert wait_job(client)["status"] == "completed"
        client.execute("quit")
        assert source.wait_end(5.0) == MOVED, "it waits for a client that has no more to ask"
    require_progress(destination.log, 3)
