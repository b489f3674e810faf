"""A restored guest has a new generation and is told of it; a guest without ACPI tables keeps its memory as it was."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from kvmigrate.api import restore, take_snapshot
from kvmigrate.boot import acpi
from kvmigrate.boot.hardware import Hardware
from kvmigrate.devices.power import EVENT_BYTES, EVENTS, NEW_GENERATION
from kvmigrate.machine import generation
from kvmigrate.machine.machine import Machine
from kvmigrate.memory.region import GuestMemory

from .boot_sector import HANG, machine_with

OLD = bytes(range(16))
PAST = 4096


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    memory = GuestMemory(2 << 20)
    yield memory
    memory.close()


def put_tables(memory: GuestMemory) -> None:
    memory.write(acpi.TABLES_GPA, acpi.build_tables(Hardware()))
    memory.write(acpi.GENERATION_GPA, OLD)


def test_the_generation_is_where_the_tables_say() -> None:
    assert (acpi.TABLES_GPA, acpi.GENERATION_GPA) == (generation.TABLES_GPA, generation.GENERATION_GPA)
    assert acpi.GENERATION_BYTES == generation.GENERATION_BYTES


def test_a_guest_with_tables_gets_a_new_one_each_time(memory: GuestMemory) -> None:
    put_tables(memory)
    found = [OLD]
    for _ in range(2):
        assert generation.write_generation(memory)
        found.append(memory.read(acpi.GENERATION_GPA, 16))
    assert len(set(found)) == 3
    assert memory.read(acpi.GENERATION_GPA + 16, PAST) == bytes(PAST)


def test_a_guest_without_tables_keeps_its_memory(memory: GuestMemory) -> None:
    memory.write(acpi.GENERATION_GPA, OLD)
    assert not generation.write_generation(memory)
    assert memory.read(acpi.GENERATION_GPA, 16) == OLD


@pytest.mark.kvm
def test_a_restore_renews_the_generation_and_tells_the_guest(tmp_path: Path) -> None:
    machine = machine_with(tmp_path, HANG)
    put_tables(machine.memory)
    machine.start()
    take_snapshot(machine, tmp_path / "snap")
    uuid = machine.description.uuid
    machine.close()
    seen = [restored(tmp_path / "snap"), restored(tmp_path / "snap", clone=True)]
    assert len({OLD, *(generation for _, generation in seen)}) == 3
    assert seen[0][0] == uuid != seen[1][0]


def restored(directory: Path, *, clone: bool = False) -> tuple[str, bytes]:
    """UUID and generation of what ``directory`` becomes, which has the event pending."""
    machine: Machine = restore(directory, clone=clone).machine
    try:
        assert machine.platform.power.read(EVENTS, EVENT_BYTES) == NEW_GENERATION
        return machine.description.uuid, machine.memory.read(acpi.GENERATION_GPA, 16)
    finally:
        machine.close()
