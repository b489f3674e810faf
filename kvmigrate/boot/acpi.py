"""The ACPI tables that a Linux guest reads (ACPI 6.5, chapter 5): RSDP, XSDT, FADT, MADT and a DSDT of our own.

The machine is hardware-reduced (4.1): all that a guest does not need to look for on it, from the 8259 to the PM timer,
it does not probe, and its devices need no word on its command line. All tables lie in one block from 0xE0000 on, which
the memory map has as reserved, and where a guest that is told no address looks for the RSDP (5.2.5.1).
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from ..errors import ConfigError
from . import aml
from .hardware import Hardware, VirtioSlot
from .plan import LoadPlan

TABLES_GPA = 0xE0000
TABLES_BYTES = 0x10000
GENERATION_GPA = TABLES_GPA + TABLES_BYTES
"""16 bytes in a page of their own: the generation of the machine, see :data:`GENERATION_BYTES`."""
GENERATION_BYTES = 16
OEM_ID, OEM_TABLE_ID, CREATOR_ID = b"KVMIGR", b"KVMIGRAT", b"KVMG"
HEADER = struct.Struct("<4sIBB6s8sI4sI")
LAPIC_GPA, IOAPIC_GPA = 0xFEE00000, 0xFEC00000
# FADT, 5.2.9: flags, boot architecture flags (table 5.10), and where its fields lie.
FADT_BYTES, FADT_REVISION, FADT_MINOR = 276, 6, 5
WBINVD, NO_FIXED_POWER_BUTTON, NO_FIXED_SLEEP_BUTTON, RESET_SUPPORTED, HARDWARE_REDUCED = (
    1 << 0, 1 << 4, 1 << 5, 1 << 10, 1 << 20,
)  # fmt: skip
LEGACY_DEVICES, VGA_ABSENT = 1 << 0, 1 << 2
SYSTEM_IO, BYTE_ACCESS = 1, 1
# Of devices/power.py, devices/serial.py and devices/pvpanic.py, which a loader does not import.
POWER_PORT, POWER_GSI = 0x608, 9
SLEEP_CONTROL, SLEEP_STATUS, RESET, EVENTS = 0, 1, 2, 4
POWER_BUTTON, NEW_GENERATION = 1 << 0, 1 << 1
SLEEP_TYPE_OFF = 5
SERIAL_PORT, NR_SERIAL_PORTS, SERIAL_GSI = 0x3F8, 8, 4
RTC_PORT, NR_RTC_PORTS = 0x70, 2
PANIC_PORT = 0x505
RESET_VECTOR_GPA = 0xFFFF0
"""Where a PC's firmware starts (0xf000:0xfff0). Linux jumps there to reboot a hardware-reduced machine without EFI: it
takes EFI for the only way, and this for what is left without (arch/x86/kernel/reboot.c, reboot_init)."""
_RESET_CODE = struct.pack("<BHBBBBH", 0xBA, POWER_PORT + RESET, 0xB0, 1, 0xEE, 0xF4, 0xFDEB)
"""``mov dx, 0x60a; mov al, 1; out dx, al; 1: hlt; jmp 1b``"""


def place_acpi(plan: LoadPlan) -> int:
    """Plan all tables for ``plan.hardware``; returns the address of the RSDP. Raises :class:`ConfigError`."""
    block = build_tables(plan.hardware)
    plan.place(TABLES_GPA, block, "the ACPI tables", TABLES_BYTES)
    plan.place(GENERATION_GPA, plan.hardware.generation, "the machine's generation", 4096)
    plan.place(RESET_VECTOR_GPA, _RESET_CODE, "the way to reset the machine", 16)
    return TABLES_GPA


def build_tables(hardware: Hardware) -> bytes:
    """All tables as they lie from :data:`TABLES_GPA` on, the RSDP first. Raises :class:`ConfigError`."""
    block = bytearray(64)

    def add(table: bytes) -> int:
        gpa = TABLES_GPA + len(block)
        block.extend(table + b"\0" * (-len(table) % 16))
        return gpa

    dsdt = add(_table(b"DSDT", 2, _dsdt(hardware.virtio)))
    entries = [add(_fadt(dsdt)), add(_madt(hardware.nr_cpus))]
    xsdt = add(_table(b"XSDT", 1, struct.pack(f"<{len(entries)}Q", *entries)))
    rsdp = _rsdp(xsdt)
    block[: len(rsdp)] = rsdp
    if len(block) > TABLES_BYTES:
        raise ConfigError(f"{len(block)} bytes of ACPI tables do not fit: take fewer devices")
    return bytes(block)


def _sum_to_zero(data: bytes, at: int) -> bytes:
    """``data`` with byte ``at``, which is 0, set so that all bytes add up to 0 modulo 256."""
    return data[:at] + bytes((-sum(data) & 0xFF,)) + data[at + 1 :]


def _rsdp(xsdt: int) -> bytes:
    """5.2.5.3: the first checksum is over the 20 bytes of version 1."""
    first = _sum_to_zero(struct.pack("<8sB6sBI", b"RSD PTR ", 0, OEM_ID, 2, 0), 8)
    return _sum_to_zero(first + struct.pack("<IQB3x", 36, xsdt, 0), 32)


def _table(signature: bytes, revision: int, body: bytes) -> bytes:
    header = HEADER.pack(signature, HEADER.size + len(body), revision, 0, OEM_ID, OEM_TABLE_ID, 1, CREATOR_ID, 1)
    return _sum_to_zero(header + body, 9)


def _port(offset: int) -> bytes:
    """A generic address structure (5.2.3.2) of one 8-bit port of the power device."""
    return struct.pack("<BBBBQ", SYSTEM_IO, 8, 0, BYTE_ACCESS, POWER_PORT + offset)


def _fadt(dsdt: int) -> bytes:
    table = bytearray(FADT_BYTES)
    flags = WBINVD | NO_FIXED_POWER_BUTTON | NO_FIXED_SLEEP_BUTTON | RESET_SUPPORTED | HARDWARE_REDUCED
    # No 8042 (bit 1 off): a guest that probes for a keyboard waits for seconds.
    struct.pack_into("<H", table, 109, LEGACY_DEVICES | VGA_ABSENT)
    struct.pack_into("<I", table, 112, flags)
    table[116:128] = _port(RESET)
    table[128] = 1
    table[131] = FADT_MINOR
    struct.pack_into("<Q", table, 140, dsdt)
    table[244:256] = _port(SLEEP_CONTROL)
    table[256:268] = _port(SLEEP_STATUS)
    return _table(b"FACP", FADT_REVISION, bytes(table[HEADER.size :]))


def _madt(nr_cpus: int) -> bytes:
    """5.2.12: a local APIC for each vCPU, one IOAPIC, no 8259 pair (flags 0)."""
    cpus = b"".join(struct.pack("<BBBBI", 0, 8, at, at, 1) for at in range(nr_cpus))
    ioapic = struct.pack("<BBBBII", 1, 12, 0, 0, IOAPIC_GPA, 0)
    return _table(b"APIC", 5, struct.pack("<II", LAPIC_GPA, 0) + cpus + ioapic)


def _dsdt(virtio: Sequence[VirtioSlot]) -> bytes:
    sleep = aml.name("\\_S5", aml.package(*[aml.integer(SLEEP_TYPE_OFF)] * 2, aml.integer(0), aml.integer(0)))
    devices = [_serial(), _clock(), _panic(), _generation(), _power_button(), _events()]
    devices += [_virtio(at, slot) for at, slot in enumerate(virtio)]
    return sleep + aml.scope("\\_SB", *devices)


def _serial() -> bytes:
    found = aml.resources(aml.ports(SERIAL_PORT, NR_SERIAL_PORTS), aml.interrupt(SERIAL_GSI))
    return aml.device("COM1", _hid("PNP0501"), aml.name("_UID", aml.integer(1)), aml.name("_CRS", found))


def _clock() -> bytes:
    return aml.device("RTC0", _hid("PNP0B00"), aml.name("_CRS", aml.resources(aml.ports(RTC_PORT, NR_RTC_PORTS))))


def _panic() -> bytes:
    found = aml.resources(aml.ports(PANIC_PORT, 1))
    present = aml.name("_STA", aml.integer(0xF))
    return aml.device("PEVT", aml.name("_HID", aml.string("QEMU0001")), present, aml.name("_CRS", found))


def _generation() -> bytes:
    """The generation ID, found by its compatible id (Microsoft, "Virtual Machine Generation ID", 2012)."""
    names = [aml.name("_HID", aml.string("KVMG0001")), aml.name("_CID", aml.string("VM_Gen_Counter"))]
    names.append(aml.name("_DDN", aml.string("VM_Gen_Counter")))
    address = aml.package(aml.integer(GENERATION_GPA), aml.integer(0))
    return aml.device("VGEN", *names, aml.name("ADDR", address))


def _power_button() -> bytes:
    return aml.device("PWRB", _hid("PNP0C0C"), aml.name("_UID", aml.integer(0)))


def _events() -> bytes:
    """The generic event device (5.6.9): its method reads what happened and passes it on."""
    seen = aml.LOCAL0
    evaluate = aml.method(
        "_EVT",
        1,
        aml.store(aml.path("ESEL"), seen),
        aml.if_(aml.bit_and(seen, aml.integer(POWER_BUTTON)), aml.notify("\\_SB.PWRB", 0x80)),
        aml.if_(aml.bit_and(seen, aml.integer(NEW_GENERATION)), aml.notify("\\_SB.VGEN", 0x80)),
        serialized=True,
    )
    return aml.device(
        "GED",
        aml.name("_HID", aml.string("ACPI0013")),
        aml.name("_UID", aml.integer(0)),
        aml.name("_CRS", aml.resources(aml.interrupt(POWER_GSI))),
        aml.operation_region("EREG", aml.SYSTEM_IO, POWER_PORT + EVENTS, 4),
        aml.field("EREG", "ESEL", 32),
        evaluate,
    )


def _virtio(number: int, slot: VirtioSlot) -> bytes:
    found = aml.resources(aml.memory32(slot.gpa, slot.size_bytes), aml.interrupt(slot.gsi))
    return aml.device(
        f"VR{number:02X}",
        aml.name("_HID", aml.string("LNRO0005")),
        aml.name("_UID", aml.integer(number)),
        aml.name("_CCA", aml.integer(1)),
        aml.name("_CRS", found),
    )


def _hid(identifier: str) -> bytes:
    return aml.name("_HID", aml.eisa_id(identifier))
