"""An unmodified Linux kernel reboots in place on kvm_amd, moves, and reboots where it is then."""

from __future__ import annotations

import time

from tests.oracle.heartbeat import require_progress
from tests.oracle.world import POWERED_OFF, Process, World

from . import linux

world = linux.world


def reboot(guest: Process, nr_boots: int) -> None:
    """Let the guest's own system reset the machine, and wait until its init is through for the ``nr_boots``-th time in
    this process."""
    guest.log.send("reboot -f\n")
    deadline = time.monotonic() + linux.BOOT_S
    while guest.log.text.count("READY\n") < nr_boots:
        assert time.monotonic() < deadline, f"it did not boot again: {guest.log.text[-300:]!r} {guest.stderr}"
        time.sleep(0.1)


def test_debian_reboots_in_place_and_again_where_it_has_moved(world: World) -> None:
    guest = linux.boot(world, 1)
    reboot(guest, 2)
    assert guest.log.text.count("cpus 1, clock kvm-clock\n") == 2
    assert not (trouble := linux.said(guest, linux.TROUBLE)), trouble
    moved = world.hop(guest, world.tcp())
    require_progress(moved.log, 10, timeout_s=150)
    reboot(moved, 1)
    assert linux.said(moved, linux.CLOCK) == ["kvm-clock"]
    assert not (trouble := linux.said(moved, linux.TROUBLE)), trouble
    moved.log.send("poweroff -f\n")
    assert moved.wait_end() == POWERED_OFF, moved.stderr
