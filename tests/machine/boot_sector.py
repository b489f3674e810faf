"""Machines that run a few bytes of real-mode code, for tests of single exits."""

from __future__ import annotations

import struct
from pathlib import Path

from kvmigrate.config import BootConfig, DiskConfig, MachineConfig, NetConfig
from kvmigrate.contract import RunState
from kvmigrate.machine.machine import Machine

MULTIBOOT_MAGIC, HAS_ADDRESSES, LOAD_GPA, HEADER_BYTES = 0x1BADB002, 1 << 16, 1 << 20, 32
HANG = bytes([0xEB, 0xFE])
POWER_OFF = bytes.fromhex("ba0406 b80020 ef".replace(" ", ""))


def machine_with(
    directory: Path, code: bytes, *, memory_bytes: int = 4 << 20, nr_cpus: int = 1, reboot: bool = False
) -> Machine:
    """A machine that starts ``code`` at 0x7c00 in real mode and writes its serial port to ``directory``/serial."""
    image = directory / "image"
    image.write_bytes(code.ljust(510, b"\0") + b"\x55\xaa")
    boot = BootConfig(image, "flat", 0x7C00)
    serial = f"file:{directory / 'serial'}"
    return Machine.create(MachineConfig("test", memory_bytes, nr_cpus, serial, boot, reboot=reboot))


def runstate_of(machine: Machine) -> RunState:
    """Read by a call: a type checker takes a property for what it was last compared with."""
    return machine.runstate


def out_byte(port: int, value: int) -> bytes:
    """``mov dx, port; mov al, value; out dx, al``"""
    return b"\xba" + port.to_bytes(2, "little") + bytes([0xB0, value, 0xEE])


def protected_mode_machine(
    directory: Path, code: bytes, disks: tuple[DiskConfig, ...] = (), nets: tuple[NetConfig, ...] = ()
) -> Machine:
    """A machine that starts ``code`` in 32-bit protected mode without paging, at 1 MiB + 32."""
    header = struct.pack(
        "<IIIIIIII",
        MULTIBOOT_MAGIC,
        HAS_ADDRESSES,
        -(MULTIBOOT_MAGIC + HAS_ADDRESSES) & 0xFFFFFFFF,
        LOAD_GPA,
        LOAD_GPA,
        0,
        0,
        LOAD_GPA + HEADER_BYTES,
    )
    image = directory / "image"
    image.write_bytes(header + code)
    return Machine.create(MachineConfig("test", 4 << 20, 1, "null", BootConfig(image, "multiboot"), disks, nets))
