"""An unmodified Linux kernel is a guest on kvm_amd: it finds its machine by ACPI, moves, and switches itself off."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from tests.emulated.guest import INITRD, KERNEL
from tests.oracle import world as worlds
from tests.oracle.digest import compare_pages, is_clock, load_pairs, state_differences
from tests.oracle.heartbeat import judge, require_progress
from tests.oracle.test_migration import watch
from tests.oracle.world import POWERED_OFF, Process, World, open_world

BOOT_S, ANSWER_S = 300.0, 120.0
MEMORY_MIB = 128
APPEND = "console=ttyS0 quiet panic=-1"
# Looked for by the guest itself: all of its log over the serial port takes an emulated host many seconds.
# Its TSC may be found unstable, since an emulated host's own is: KVM sets it anew whenever a vCPU is loaded. The clock
# that the guest goes by must not.
TROUBLE = "dmesg | grep -E 'soft lockup|rcu.*stall|kvm-clock.*unstable|ACPI.*(Error|Warning)|hung task|Oops|BUG:'"
ADJUSTED = re.compile(r"vcpu\d+\.(msrs\.MSR_IA32_SYSENTER_E[SI]P|tsc_khz): (?P<left>\d+) -> (?P<right>\d+)$")
CLOCK = "cat /sys/devices/system/clocksource/clocksource0/current_clocksource"


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    # A Python that starts in an emulated processor takes seconds.
    monkeypatch.setattr(worlds, "POLL_S", 0.1)
    monkeypatch.setattr(worlds, "READY_S", 150.0)
    monkeypatch.setattr(worlds, "END_S", 150.0)
    with open_world() as opened:
        yield opened


def boot(world: World, cpus: int, *more: str) -> Process:
    """A guest with ``cpus`` processors whose init is through, and ``more`` options."""
    options = ["--initrd", INITRD, "--memory", f"{MEMORY_MIB}M", "--cpus", str(cpus), "--append", APPEND]
    guest = world.start("run", "vm0", KERNEL, *options, *more)
    guest.log.wait_for("READY", BOOT_S)
    return guest


def said(guest: Process, command: str) -> list[str]:
    """Type ``command``; the lines that it wrote, without the heartbeats between them."""
    before = guest.log.text.count("\nEND\n")
    guest.log.send(f"echo BEGIN; {command}\necho END\n")
    deadline = time.monotonic() + ANSWER_S
    while guest.log.text.count("\nEND\n") == before:
        assert time.monotonic() < deadline, f"no answer to {command!r}: {guest.log.text[-300:]!r}"
        time.sleep(0.1)
    lines = guest.log.text.split("\n")
    begin = max(at for at, line in enumerate(lines) if line == "BEGIN")
    answer = lines[begin + 1 : lines.index("END", begin)]
    return [line for line in answer if line and not line.startswith("H ")]


def unexplained(out: Mapping[str, Any], into: Mapping[str, Any]) -> list[str]:
    """What differs between a guest that left and the one that arrived, beside clocks and what two hosts of kvm_amd make
    of the same value: the low half of the SYSENTER registers, and the TSC's rate as each measured it, to 250 ppm."""
    texts = [text for text in state_differences(out, into) if not is_clock(text, unstable_tsc=True)]
    return [text for text in texts if not _is_adjusted(text)]


def _is_adjusted(text: str) -> bool:
    match = ADJUSTED.match(text)
    if match is None:
        return False
    left, right = int(match["left"]), int(match["right"])
    return right == left & 0xFFFFFFFF if "SYSENTER" in text else abs(left - right) * 4000 <= left


def test_debian_boots_finds_its_devices_and_powers_off(world: World) -> None:
    guest = boot(world, 1, "--no-reboot")
    assert "cpus 1, clock kvm-clock\n" in guest.log.text
    devices = {word for line in said(guest, "ls -1 /sys/bus/acpi/devices") for word in line.split()}
    assert {"ACPI0013:00", "PNP0501:00", "PNP0C0C:00", "QEMU0001:00"} <= devices
    assert not (trouble := said(guest, TROUBLE)), trouble
    guest.log.send("poweroff -f\n")
    assert guest.wait_end() == POWERED_OFF, guest.stderr


def test_a_running_debian_moves_with_every_page_and_never_notices(world: World) -> None:
    digests = watch(world)
    guest = boot(world, 1, "--no-reboot")
    require_progress(guest.log, 5, timeout_s=60)
    moved = world.hop(guest, world.tcp())
    require_progress(moved.log, 10, timeout_s=150)
    assert len(judge(world.logs).blackouts_ms) == 1
    [(out, into)] = load_pairs(digests)
    assert sum(compare_pages(out, into)) == MEMORY_MIB << 8
    assert unexplained(out, into) == []
    assert not (trouble := said(moved, TROUBLE)), trouble
    assert said(moved, CLOCK) == ["kvm-clock"]
    moved.log.send("poweroff -f\n")
    assert moved.wait_end() == POWERED_OFF, moved.stderr
