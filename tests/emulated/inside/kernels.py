"""Linux as people have it: each kernel of the distribution, by each way to boot it, with many vCPUs and much memory.

For a host with one processor: one of two that are emulated locks up by itself, now and then, under several vCPUs.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from tests.emulated.guest import FULL_INITRD, FULL_KERNEL, FULL_VMLINUX, INITRD, KERNEL
from tests.oracle import world as worlds
from tests.oracle.world import CRASHED, POWERED_OFF, Process, World, open_world

from .linux import APPEND, TROUBLE, said

MIB = 1 << 20
MEMORY_BYTES, KEPT_BYTES = 128 * MIB, 112 * MIB
GIVEN_BYTES = MEMORY_BYTES - KEPT_BYTES
PATIENCE_S = 60.0
MANY_CPUS = 8
BOOT_S = 240.0
# struct input_event (linux/input.h) is 24 bytes; behind the time stand type EV_KEY, KEY_POWER, and that it goes down.
BUTTON_FOUND = "grep -l 'Power Button' /sys/class/input/event*/device/name | cut -d/ -f5"
POWER_PRESSED = "0001 0074 0001 0000"


@pytest.fixture(scope="module")
def patient() -> Iterator[None]:
    """A Python that starts in an emulated processor takes seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worlds, "POLL_S", 0.1)
        patch.setattr(worlds, "READY_S", BOOT_S)
        patch.setattr(worlds, "END_S", BOOT_S)
        yield


@pytest.fixture
def world(patient: None) -> Iterator[World]:
    with open_world() as opened:
        yield opened


@pytest.fixture(scope="module")
def small(patient: None) -> Iterator[Process]:
    """A guest for all tests that do not need one of their own; the last of them ends it."""
    with open_world() as opened:
        yield boot(opened, KERNEL, INITRD, memory="128M")


def boot(
    world: World, kernel: str, initrd: str, *more: str, cpus: int = 1, memory: str, append: str = APPEND
) -> Process:
    """A guest whose init is through."""
    options = ["--initrd", initrd, "--memory", memory, "--cpus", str(cpus), "--append", append]
    guest = world.start("run", "vm0", kernel, *options, *more)
    guest.log.wait_for("READY", BOOT_S)
    return guest


def switch_off(guest: Process) -> None:
    assert not (trouble := said(guest, TROUBLE)), trouble
    guest.log.send("poweroff -f\n")
    assert guest.wait_end() == POWERED_OFF, guest.stderr


def meminfo(guest: Process, name: str) -> int:
    """What the guest's kernel says that it has, in bytes."""
    [line] = said(guest, f"grep ^{name}: /proc/meminfo")
    return int(line.split()[1]) << 10


def ask_to_keep(guest: Process, keep_bytes: int) -> None:
    """Set the balloon, and wait until its driver has done as it was asked."""
    guest.execute("balloon", value=keep_bytes)
    deadline = time.monotonic() + PATIENCE_S
    while (found := guest.execute("query-balloon"))["actual"] != keep_bytes:
        assert time.monotonic() < deadline, found
        time.sleep(0.1)


def test_the_kernel_for_real_machines_boots_and_drives_every_device(world: World) -> None:
    _, leads = world.recorder.listen("console")
    guest = boot(world, FULL_KERNEL, FULL_INITRD, "--console", leads, memory="192M")
    assert "cpus 1, clock kvm-clock\n" in guest.log.text
    devices = said(guest, "ls -1d /sys/bus/virtio/devices/*")
    assert len(devices) >= 3, devices
    assert len(said(guest, "ls -1d /sys/bus/virtio/devices/*/driver")) == len(devices)
    switch_off(guest)


def test_a_vmlinux_boots_by_its_pvh_note_on_4_cpus(world: World) -> None:
    # To look for a graphics bus on PCI, where there is none, takes an emulated host half a minute.
    guest = boot(world, FULL_VMLINUX, FULL_INITRD, cpus=4, memory="192M", append=f"{APPEND} pci=off")
    assert "cpus 4, clock kvm-clock\n" in guest.log.text
    switch_off(guest)


def test_linux_uses_the_memory_over_the_hole(world: World) -> None:
    guest = boot(world, KERNEL, INITRD, memory="5G")
    assert meminfo(guest, "MemTotal") > 4.5 * 2**30
    assert said(guest, "grep -E '^100000000-17fffffff : System RAM' /proc/iomem")
    # Linux gives the highest memory first.
    [before, after] = said(
        guest, "dd if=/dev/urandom of=/tmp/w bs=1M count=4 2>/dev/null; md5sum < /tmp/w; cat /tmp/w | md5sum"
    )
    assert before == after
    switch_off(guest)


def test_the_kernel_for_clouds_finds_all_of_8_cpus(world: World) -> None:
    guest = boot(world, KERNEL, INITRD, cpus=MANY_CPUS, memory="256M")
    assert f"cpus {MANY_CPUS}, clock kvm-clock\n" in guest.log.text
    found = said(guest, "grep ^apicid /proc/cpuinfo")
    assert [int(line.split()[-1]) for line in found] == list(range(MANY_CPUS))
    switch_off(guest)


def test_linux_draws_random_bytes_from_the_device(small: Process) -> None:
    assert "virtio_rng.0" in said(small, "cat /sys/class/misc/hw_random/rng_available")[0].split()
    assert said(small, "dd if=/dev/hwrng bs=64 count=4 iflag=fullblock 2>/dev/null | wc -c") == ["256"]


def test_linux_gives_memory_up_and_gets_it_back(small: Process) -> None:
    # Its total stays, since the driver may take the pages back when it needs them. Other things it does take few.
    before = meminfo(small, "MemFree")
    ask_to_keep(small, KEPT_BYTES)
    assert abs(before - GIVEN_BYTES - meminfo(small, "MemFree")) < GIVEN_BYTES // 4
    ask_to_keep(small, MEMORY_BYTES)
    assert abs(before - meminfo(small, "MemFree")) < GIVEN_BYTES // 4


def test_linux_hears_its_power_button(small: Process) -> None:
    [name] = said(small, BUTTON_FOUND)
    said(small, f"dd if=/dev/input/{name} bs=24 count=1 2>/dev/null | od -An -tx2 > /tmp/pressed & usleep 300000")
    small.execute("system_powerdown")
    said(small, "until [ -s /tmp/pressed ]; do usleep 100000; done")
    assert POWER_PRESSED in " ".join(" ".join(said(small, "cat /tmp/pressed")).split())


def test_a_panic_ends_the_guest_as_crashed_and_says_so(small: Process) -> None:
    assert not (trouble := said(small, TROUBLE)), trouble
    small.log.send("echo c > /proc/sysrq-trigger\n")
    assert small.wait_end() == CRASHED, small.stderr
    assert "kernel panicked" in small.stderr
