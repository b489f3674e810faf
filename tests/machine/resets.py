"""Guests that are reset, and what is waited for while they are."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from kvmigrate import guests
from kvmigrate.api import Received, receive, send
from kvmigrate.config import BootConfig, DiskConfig, MachineConfig, MigrationParameters
from kvmigrate.devices import i8042, port92, power
from kvmigrate.devices.end import GuestEnd
from kvmigrate.machine.machine import Machine
from kvmigrate.migration.status import MigrationResult
from tests.backends import ALL_STATE
from tests.cli.command import wait_until
from tests.oracle.world import wait_listening

from .boot_sector import HANG, POWER_OFF, out_byte

LEDGER = f"beat=20 pages=500 fill=2 rate=5 irq=1 {ALL_STATE} cpus=2"
BY_ACPI = out_byte(power.PORT + power.RESET, 1)
WAYS = {
    "ACPI": BY_ACPI,
    "i8042 command": out_byte(i8042.COMMAND_PORT, i8042.PULSE | 0xE),
    "i8042 output": out_byte(i8042.COMMAND_PORT, i8042.WRITE_OUTPUT) + out_byte(i8042.DATA_PORT, i8042.OUTPUT_A20),
    "port 92": out_byte(port92.PORT, port92.RESET),
}


def counting(reset: bytes, boots: int = 3) -> bytes:
    """Count the boots in the clock's memory, which has a battery, and write the number to the serial port; reset by
    ``reset`` until there were ``boots``, then power off."""
    # mov al, 0x40; out 0x70, al; in al, 0x71; inc al; mov bl, al; out 0x71, al; add al, '0'; mov dx, 0x3f8; out dx, al
    count = bytes.fromhex("b040 e670 e471 fec0 88c3 e671 0430 baf803 ee")
    # cmp bl, boots; jae over the reset
    return count + bytes([0x80, 0xFB, boots, 0x73, len(reset) + len(HANG)]) + reset + HANG + POWER_OFF


def wait_for_end(machine: Machine) -> GuestEnd:
    end = machine.wait_end(20)
    assert end is not None, "the guest did not end"
    return end


def wait_for_boots(serial: Path, boots: bytes) -> None:
    wait_until(lambda: serial.exists() and serial.read_bytes() == boots, f"{boots!r} on the serial port")


def start(stack: ExitStack, machine: Machine) -> Machine:
    stack.callback(machine.close)
    machine.start()
    machine.resume()
    return machine


def ledger(stack: ExitStack, directory: Path, parameters: str = LEDGER, *disks: DiskConfig) -> Machine:
    """A guest with two vCPUs and whatever state a guest may have."""
    boot = BootConfig(guests.path("ledger"), cmdline=parameters)
    machine = Machine.create(MachineConfig("ledger", 32 << 20, 2, f"file:{directory / 'serial'}", boot, disks))
    stack.callback(machine.close)
    machine.start()
    return machine


def wait_for_beats(directory: Path, after: int = 0) -> int:
    """Wait until each vCPU has sent a heartbeat since byte ``after`` of the serial output; returns where that ends."""
    serial = directory / "serial"

    def both() -> bool:
        text = serial.read_bytes()[after:] if serial.exists() else b""
        return b"H 0 5 " in text and b"H 1 5 " in text

    wait_until(both, "heartbeats of both vCPUs")
    assert b"BAD" not in serial.read_bytes()
    return serial.stat().st_size


def received(
    stack: ExitStack, source: Machine, directory: Path, meanwhile: Callable[[], None]
) -> tuple[Machine, MigrationResult]:
    """``source`` at its destination, paused; ``meanwhile`` runs while its pages travel."""
    got: list[Received] = []
    results: list[MigrationResult] = []
    address = f"unix://{directory}/socket"
    serial = f"file:{directory / 'there'}"

    def take() -> None:
        got.append(receive(address, name="there", serial=serial, journal_dir=directory, paused=True))

    taking = threading.Thread(target=take)
    taking.start()
    wait_listening(address)
    # On a busy machine the guest may write as fast as that.
    parameters = MigrationParameters(bandwidth_bytes_s=2 << 20, downtime_limit_ms=5000)
    sending = threading.Thread(target=lambda: results.append(send(source, address, parameters, journal_dir=directory)))
    sending.start()
    try:
        meanwhile()
    finally:
        sending.join()
        taking.join()
    stack.callback(got[0].close)
    return got[0].machine, results[0]
