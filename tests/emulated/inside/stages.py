"""A Linux guest is moved at the moments when it is least settled, on a host with one processor (see the package)."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from kvmigrate.control.client import Client
from tests.emulated.guest import INITRD, KERNEL
from tests.oracle.heartbeat import judge, require_progress
from tests.oracle.world import POWERED_OFF, Process, World, wait_job

from .linux import BOOT_S, MEMORY_MIB, TROUBLE, boot, said, world

__all__ = ["world"]

CPUS = 4
LOUD = "console=ttyS0 panic=-1 no_console_suspend"
EARLY, BRINGING_UP, ALL_UP = "Memory: ", "smp: Bringing up secondary CPUs", f"Brought up 1 node, {CPUS} CPUs"
SLOW = {"max-bandwidth": 8 << 20}


def everything(world: World) -> str:
    """What the guest wrote at all of its places: a line may begin at one and end at the next."""
    return b"".join(log.data for log in world.logs).decode("ascii", "replace")


def wait_for(world: World, text: str, count: int = 1) -> None:
    deadline = time.monotonic() + BOOT_S
    while everything(world).count(text) < count:
        assert time.monotonic() < deadline, f"no {text!r}: {everything(world)[-300:]!r}"
        time.sleep(0.005)


def move_at(world: World, guest: Process, text: str) -> Process:
    """Stop ``guest`` once it has written ``text``, and let it go on elsewhere."""
    wait_for(world, text)
    guest.execute("stop")
    moved = world.hop(guest, world.tcp())
    moved.execute("cont")
    return moved


def wait_for_pages(client: Client) -> None:
    """Return once the migration under way sends memory."""
    while (job := client.execute("x-kvmigrate-job"))["status"] in ("none", "setup"):
        time.sleep(0.05)
    assert job["status"] == "active", job


@contextmanager
def slow_move(world: World, guest: Process) -> Iterator[tuple[Client, Process]]:
    """Start to move ``guest``, so slowly that its memory is under way when the block begins: the client that knows of
    the migration, and the destination."""
    address = world.tcp()
    destination = world.receive(address)
    with guest.client() as client:
        client.execute("migrate-set-parameters", SLOW)
        client.execute("migrate", {"uri": address})
        wait_for_pages(client)
        yield client, destination


def test_a_guest_that_boots_is_moved_early_and_between_its_processors(world: World) -> None:
    options = ["--initrd", INITRD, "--memory", f"{MEMORY_MIB}M", "--cpus", str(CPUS), "--append", LOUD]
    guest = world.start("run", "vm0", KERNEL, *options)
    guest = move_at(world, guest, EARLY)
    wait_for(world, BRINGING_UP)
    guest.execute("stop")
    assert ALL_UP not in everything(world), "it was stopped in the middle"
    moved = world.hop(guest, world.tcp())
    moved.execute("cont")
    wait_for(world, "READY")
    assert f"cpus {CPUS}, clock kvm-clock\n" in everything(world)
    require_progress(moved.log, 5, timeout_s=60)
    judge(world.logs)
    assert not (trouble := said(moved, TROUBLE)), trouble


def test_a_guest_that_switches_itself_off_while_it_moves_is_off_at_both_ends(world: World) -> None:
    guest = boot(world, 2)
    with slow_move(world, guest) as (_, destination):
        guest.log.send("poweroff -f\n")
    assert guest.wait_end() == POWERED_OFF, guest.stderr
    assert destination.wait_end() != POWERED_OFF
    assert not destination.log.data


def test_a_guest_that_reboots_while_it_moves_comes_up_once(world: World) -> None:
    guest = boot(world, 2)
    with slow_move(world, guest) as (client, moved):
        guest.log.send("reboot -f\n")
        assert wait_job(client, BOOT_S)["status"] == "completed"
    wait_for(world, "READY", 2)
    require_progress(moved.log, 5, timeout_s=60)
    assert everything(world).count("READY") == 2
    assert not (trouble := said(moved, TROUBLE)), trouble
    moved.log.send("poweroff -f\n")
    assert moved.wait_end() == POWERED_OFF, moved.stderr
