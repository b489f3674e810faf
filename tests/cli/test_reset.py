"""Resets as a user and a management program meet them: the verb, the option, QMP's command and its events."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from qemu.qmp import QMPClient

from tests.qemu_qmp import next_event

from . import sectors
from .command import Host, wait_until
from .test_vm import SMALL, ended, running, waiting

pytestmark = [pytest.mark.kvm, pytest.mark.timeout(300)]

BOOTS_THEN_SLEEPS = bytes.fromhex("b042 baf803 ee f4 ebfd")
"""``mov al, 'B'; mov dx, 0x3f8; out dx, al; 1: hlt; jmp 1b``"""
RESETS_ONCE = bytes.fromhex("b040 e670 e471 3c00 7508 fec0 e671") + sectors.RESET + sectors.POWER_OFF
"""Set byte 0x40 of the clock's memory and reset, or power off when it is set already."""


async def events_of(socket: Path, command: str, nr_events: int) -> list[tuple[str, dict[str, Any]]]:
    """The first resets and ends after ``command``, with their data."""
    client = QMPClient("test")
    await client.connect(str(socket))
    with client.listener(("RESET", "SHUTDOWN")) as listener:
        assert await client.execute(command) == {}
        events = [await next_event(listener, 30) for _ in range(nr_events)]
    # The process may be gone already.
    with suppress(EOFError):
        await client.disconnect()
    return [(event["event"], event.get("data", {})) for event in events]


def boots(host: Host, name: str = "out") -> int:
    path = host.directory / name
    return len(path.read_bytes()) if path.exists() else 0


def test_a_guest_that_asks_for_a_reset_boots_again(host: Host) -> None:
    done = host("run", sectors.sector(host.directory, RESETS_ONCE), *SMALL)
    assert (done.status, done.out, done.err) == (0, "", "")
    assert host.left_behind == []


def test_the_verb_resets_a_guest_that_runs_or_is_paused(host: Host) -> None:
    serial = ("--serial", f"file:{host.directory / 'out'}")
    with running(host, "one", BOOTS_THEN_SLEEPS, *serial) as process:
        wait_until(lambda: boots(host) == 1, "the first boot")
        uuid = host.ask("one", "query-uuid")
        done = host("reset", "one")
        assert (done.status, done.out, done.err) == (0, "one: reset\n", "")
        wait_until(lambda: boots(host) == 2, "the second boot")
        host("pause", "one")
        assert host("reset", "one").status == 0
        assert host.ask("one", "query-status")["status"] == "paused"
        assert boots(host) == 2
        host("resume", "one")
        wait_until(lambda: boots(host) == 3, "the third boot")
        assert host.ask("one", "query-uuid") == uuid
        host("stop", "one")
        assert ended(process)[0] == 8


def test_a_reset_is_told_as_by_qemu(host: Host) -> None:
    with running(host, "one", BOOTS_THEN_SLEEPS):
        told = asyncio.run(events_of(host.socket("one"), "system_reset", 1))
        assert told == [("RESET", {"guest": False, "reason": "host-qmp-system-reset"})]
    with running(host, "two", RESETS_ONCE, "--paused"):
        told = asyncio.run(events_of(host.socket("two"), "cont", 2))
        assert told == [
            ("RESET", {"guest": True, "reason": "guest-reset"}),
            ("SHUTDOWN", {"guest": True, "reason": "guest-shutdown"}),
        ]


def test_without_reboot_a_reset_ends_the_guest_and_says_whose_it_was(host: Host) -> None:
    with running(host, "one", BOOTS_THEN_SLEEPS, "--no-reboot") as process:
        told = asyncio.run(events_of(host.socket("one"), "system_reset", 1))
        assert told == [("SHUTDOWN", {"guest": False, "reason": "host-qmp-system-reset"})]
        assert ended(process) == (10, "kvmigrate: the operator reset the guest\n")
    with running(host, "two", RESETS_ONCE, "--no-reboot", "--paused") as process:
        told = asyncio.run(events_of(host.socket("two"), "cont", 1))
        assert told == [("SHUTDOWN", {"guest": True, "reason": "guest-reset"})]
        assert ended(process)[0] == 10
    with running(host, "three", BOOTS_THEN_SLEEPS, "--no-reboot") as process:
        assert host("reset", "three").out == "three: reset\n"
        assert ended(process)[0] == 10
    assert host.left_behind == []


def test_a_reset_that_has_nothing_to_boot_is_refused_and_harms_nobody(host: Host) -> None:
    with running(host, "one", BOOTS_THEN_SLEEPS):
        image = sectors.sector(host.directory, BOOTS_THEN_SLEEPS)
        image.write_bytes(image.read_bytes() + b"newer")
        done = host("reset", "one")
        assert done.status == 2
        assert str(image) in done.err and "not the file any more" in done.err
        assert len(done.err.splitlines()) == 1
        assert host.ask("one", "query-status")["status"] == "running"


@pytest.mark.parametrize("option", [(), ("--no-reboot",)])
def test_a_guest_that_has_moved_is_reset_there(host: Host, option: tuple[str, ...]) -> None:
    there = ("--serial", f"file:{host.directory / 'there'}", *option)
    with running(host, "one", BOOTS_THEN_SLEEPS) as source, waiting(host, "two", *there) as (target, address):
        assert host("send", "one", address).status == 0
        assert ended(source)[0] == 6
        assert host("reset", "two").status == 0
        if option:
            assert ended(target)[0] == 10
        else:
            wait_until(lambda: boots(host, "there") == 1, "the boot there")
            host("stop", "two")
            assert ended(target)[0] == 8


@pytest.mark.parametrize("option", [(), ("--no-reboot",)])
def test_a_restored_guest_is_reset(host: Host, option: tuple[str, ...]) -> None:
    with running(host, "one", BOOTS_THEN_SLEEPS):
        assert host("snapshot", "one", host.directory / "saved").status == 0
    arguments = (host.directory / "saved", "--name", "two", "--serial", f"file:{host.directory / 'out'}")
    with host.start("restore", *arguments, *option) as process:
        wait_until(lambda: (host.ask("two", "query-status") or {}).get("status") == "running", "the restored guest")
        assert host("reset", "two").status == 0
        if option:
            assert ended(process)[0] == 10
        else:
            wait_until(lambda: boots(host) == 1, "the boot")


def test_a_guest_that_waits_for_a_guest_has_none_to_reset(host: Host) -> None:
    with waiting(host, "two"):
        done = host("reset", "two")
        assert done.status == 2 and "inmigrate" in done.err
