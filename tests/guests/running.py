"""Run one of the package's guests in this process, and look into it."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kvmigrate import guests
from kvmigrate.config import BootConfig, MachineConfig
from kvmigrate.devices.end import GuestEnd
from kvmigrate.machine.machine import Machine

MIB = 1 << 20
HEADER = struct.Struct("<QQQQ")
HEADER_OFFSET = 64
LEDGER_ENTRY_BYTES = 16


@contextmanager
def running(guest: str, parameters: str, serial: str, *, mib: int = 32, cpus: int = 1) -> Iterator[Machine]:
    """The guest, running, for as long as the block lasts."""
    boot = BootConfig(guests.path(guest), cmdline=parameters)
    machine = Machine.create(MachineConfig("guest", mib * MIB, cpus, serial, boot))
    try:
        machine.start()
        machine.resume()
        yield machine
    finally:
        machine.close()


def run_to_end(guest: str, parameters: str, output: Path, *, mib: int = 32, cpus: int = 1) -> tuple[GuestEnd, str]:
    """How the guest ended, and all that it wrote."""
    with running(guest, parameters, f"file:{output}", mib=mib, cpus=cpus) as machine:
        end = machine.wait_end(30)
        assert end is not None, f"the guest goes on and on: {output.read_text()[-200:]!r}"
    return end, output.read_text()


def ledger_pages(machine: Machine) -> list[int]:
    """The addresses of the pages under the ledger: those whose header holds their own address."""
    found = []
    for slot in machine.memory.slots:
        for gpa in range(slot.base_gfn << 12, (slot.base_gfn + slot.nr_pages) << 12, 4096):
            if gpa and machine.memory.read(gpa + HEADER_OFFSET, 8) == gpa.to_bytes(8, "little"):
                found.append(gpa)
    return found


def ledger_entry(machine: Machine, pages: list[int]) -> int:
    """The address of the ledger's first entry. The ledger ends right before the first page."""
    first = (pages[0] - LEDGER_ENTRY_BYTES * len(pages)) & -4096
    assert machine.memory.read(first + 8, 8) == pages[0].to_bytes(8, "little")
    return first
