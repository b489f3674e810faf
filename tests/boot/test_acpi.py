"""The ACPI tables hold together: a reader that knows only the specification finds every one, with the right sums."""

from __future__ import annotations

import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from kvmigrate.boot import acpi, aml
from kvmigrate.boot.hardware import Hardware, VirtioSlot
from kvmigrate.devices import power, pvpanic, serial
from kvmigrate.errors import ConfigError

TWO_DISKS = (VirtioSlot(0xD0000000, 0x1000, 16), VirtioSlot(0xD0001000, 0x1000, 17))


class Tables:
    """The block of tables, read as a guest reads it."""

    def __init__(self, hardware: Hardware) -> None:
        self.block = acpi.build_tables(hardware)
        self.rsdp = self.block[:36]
        (xsdt,) = struct.unpack_from("<Q", self.rsdp, 24)
        entries = self.table(xsdt)[36:]
        self.entries = {t[:4]: t for t in (self.table(at) for (at,) in struct.iter_unpack("<Q", entries))}
        (dsdt,) = struct.unpack_from("<Q", self.entries[b"FACP"], 140)
        self.dsdt = self.table(dsdt)

    def table(self, gpa: int) -> bytes:
        at = gpa - acpi.TABLES_GPA
        (size,) = struct.unpack_from("<I", self.block, at + 4)
        table = self.block[at : at + size]
        assert len(table) == size and sum(table) % 256 == 0, table[:4]
        return table


def test_every_table_is_linked_and_sums_up_to_zero() -> None:
    tables = Tables(Hardware(2, TWO_DISKS))
    assert tables.rsdp[:8] == b"RSD PTR " and sum(tables.rsdp[:20]) % 256 == sum(tables.rsdp) % 256 == 0
    assert tables.entries.keys() == {b"FACP", b"APIC"}
    assert tables.dsdt[:4] == b"DSDT"


def test_the_fadt_is_hardware_reduced_and_names_the_power_registers() -> None:
    fadt = Tables(Hardware()).entries[b"FACP"]
    (flags,) = struct.unpack_from("<I", fadt, 112)
    assert flags & 1 << 20 and flags & 1 << 10
    where = [struct.unpack_from("<Q", fadt, at + 4)[0] for at in (244, 256, 116)]
    assert where == [power.PORT + power.SLEEP_CONTROL, power.PORT + power.SLEEP_STATUS, power.PORT + power.RESET]


@pytest.mark.parametrize("nr_cpus", [1, 2, 8, 64])
def test_the_madt_has_a_local_apic_for_each_vcpu(nr_cpus: int) -> None:
    madt = Tables(Hardware(nr_cpus)).entries[b"APIC"]
    found, at = [], 44
    while at < len(madt):
        if madt[at] == 0:
            found.append((madt[at + 3], struct.unpack_from("<I", madt, at + 4)[0]))
        at += madt[at + 1]
    assert found == [(apic_id, 1) for apic_id in range(nr_cpus)]


def test_the_dsdt_agrees_with_the_devices() -> None:
    """A loader imports no device, so that their ports stand twice."""
    assert (acpi.POWER_PORT, acpi.POWER_GSI) == (power.PORT, power.IRQ)
    assert (acpi.EVENTS, acpi.SLEEP_TYPE_OFF) == (power.EVENTS, power.SLEEP_TYPE_OFF)
    assert (acpi.POWER_BUTTON, acpi.NEW_GENERATION) == (power.POWER_BUTTON, power.NEW_GENERATION)
    assert (acpi.SERIAL_PORT, acpi.SERIAL_GSI, acpi.PANIC_PORT) == (serial.PORT, serial.IRQ, pvpanic.PORT)


def test_too_many_devices_are_refused() -> None:
    slots = tuple(VirtioSlot(0xD0000000 + at * 0x1000, 0x1000, 16) for at in range(2000))
    with pytest.raises(ConfigError, match="take fewer devices"):
        acpi.build_tables(Hardware(1, slots))


@pytest.mark.parametrize(
    ("value", "code"),
    [(0, "00"), (1, "01"), (2, "0a02"), (0x100, "0b0001"), (1 << 16, "0c00000100"), (1 << 32, "0e0000000001000000")],
)
def test_integers_take_as_many_bytes_as_they_need(value: int, code: str) -> None:
    assert aml.integer(value).hex() == code


@pytest.mark.parametrize(("size", "prefix"), [(10, "11 0d 0a0a"), (70, "11 4a04 0a46"), (5000, "11 8e 3801 0b8813")])
def test_package_lengths_count_themselves(size: int, prefix: str) -> None:
    assert aml.buffer(bytes(size)).hex().startswith(prefix.replace(" ", ""))


def test_the_reference_compiler_reads_the_dsdt_without_a_complaint(tmp_path: Path) -> None:
    iasl = shutil.which("iasl")
    assert iasl is not None, "iasl is not installed: run make deps-test"
    (tmp_path / "dsdt.aml").write_bytes(Tables(Hardware(2, TWO_DISKS)).dsdt)
    subprocess.run([iasl, "-d", "dsdt.aml"], cwd=tmp_path, check=True, capture_output=True)
    text = (tmp_path / "dsdt.dsl").read_text()
    assert "Device (VR01)" in text and "0xD0001000" in text and "Notify (\\_SB.PWRB, 0x80)" in text
    done = subprocess.run([iasl, "dsdt.dsl"], cwd=tmp_path, check=True, capture_output=True, text=True)
    assert "0 Errors, 0 Warnings" in done.stdout
