"""A live migration costs a guest's clock no more than the blackout, and a generation stays what it was."""

from __future__ import annotations

import errno
import threading
import time
from pathlib import Path

import pytest

from kvmigrate.api import Received, receive, send
from kvmigrate.boot import acpi
from kvmigrate.errors import HostError
from kvmigrate.machine.machine import Machine

from .boot_sector import HANG, machine_with

pytestmark = pytest.mark.kvm

NR_MOVES = 4
NOISE_NS = 1_000_000
OF_PAGE = bytes(range(16))


def behind_ns(machine: Machine) -> int:
    """How far kvmclock is behind the host's own clock, by the closest pair of readings."""
    pairs: list[tuple[int, int]] = []
    for _ in range(20):
        before, clock, after = time.monotonic_ns(), machine.platform.vm.get_clock()["clock"], time.monotonic_ns()
        pairs.append((after - before, (before + after) // 2 - clock))
    return min(pairs)[1]


def sent(machine: Machine, address: str, directory: Path) -> float:
    """For how many milliseconds the guest stood when it was sent, as soon as somebody listens."""
    while True:
        try:
            return send(machine, address, journal_dir=directory).downtime_ms
        except HostError as error:
            if error.errno not in (errno.ENOENT, errno.ECONNREFUSED):
                raise
            time.sleep(0.01)


def move(machine: Machine, directory: Path, number: int) -> tuple[Machine, float]:
    """Where the guest is now, and for how many milliseconds it stood."""
    got: list[Received] = []
    address = f"unix://{directory}/{number}"

    def take() -> None:
        got.append(receive(address, name=f"x{number}", journal_dir=directory))

    thread = threading.Thread(target=take, daemon=True)
    thread.start()
    downtime_ms = sent(machine, address, directory)
    thread.join()
    machine.close()
    return got[0].machine, downtime_ms


def test_a_live_migration_costs_the_clock_at_most_the_blackout(tmp_path: Path) -> None:
    machine = machine_with(tmp_path, HANG, nr_cpus=2)
    machine.memory.write(acpi.TABLES_GPA, b"RSD PTR \0KVMIGR")
    machine.memory.write(acpi.GENERATION_GPA, OF_PAGE)
    machine.start()
    machine.resume()
    try:
        for number in range(NR_MOVES):
            before = behind_ns(machine)
            machine, downtime_ms = move(machine, tmp_path, number)
            assert -NOISE_NS <= behind_ns(machine) - before <= downtime_ms * 1e6 + NOISE_NS
        assert machine.memory.read(acpi.GENERATION_GPA, 16) == OF_PAGE
    finally:
        machine.close()
