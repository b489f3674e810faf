"""Save a running guest, look into what was saved, check it, and let a second machine go on from there.

python examples/snapshot_and_inspect.py
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

from kvmigrate import BootConfig, Machine, MachineConfig, guests, restore, take_snapshot
from kvmigrate.snapshot.inspect import inspect
from kvmigrate.snapshot.verify import verify


def save(directory: Path, serial: Path) -> None:
    """Boot a guest and save it while it runs; it runs on afterwards, until it is closed."""
    boot = BootConfig(guests.path("ledger"), cmdline="beats=150 fill=16 beat=10")
    machine = Machine.create(MachineConfig("saved", memory_bytes=64 << 20, serial=f"file:{serial}", boot=boot))
    try:
        machine.start()
        machine.resume()
        time.sleep(0.5)
        result = take_snapshot(machine, directory)
    finally:
        machine.close()
    print(f"saved in {result.total_ms:.0f} ms; the guest stood still for {result.pause_ms:.1f} ms of it")


def look(directory: Path) -> None:
    """Registers by the kernel's names, and an independent check of every byte."""
    vcpu = inspect(directory)["vcpus"]["vcpu0"]["body"]
    print(f"rip {vcpu['regs']['rip']:#x}, rsp {vcpu['regs']['rsp']:#x}, {len(vcpu['msrs'])} MSRs")
    report = verify(directory)
    print(f"verify: {'good' if report.ok else report.findings}, {report.nr_pages} pages")


def go_on(directory: Path, serial: Path) -> int:
    """A new machine, from the snapshot, to its end."""
    restored = restore(directory, name="restored", serial=f"file:{serial}")
    try:
        restored.machine.start()
        restored.machine.resume()
        end = restored.machine.wait_end(60)
    finally:
        restored.machine.close()
    print("restored:", serial.read_text().splitlines()[-1])
    return 2 if end is None else end.exit_status


def main() -> int:
    with tempfile.TemporaryDirectory() as directory:
        snapshot = Path(directory, "snapshot")
        save(snapshot, Path(directory, "first"))
        look(snapshot)
        return go_on(snapshot, Path(directory, "second"))


if __name__ == "__main__":
    sys.exit(main())
