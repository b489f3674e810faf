"""Migrate a busy guest from this process to another one over TCP, with nothing but the Python interface.

    python examples/migrate_two_processes.py

This process starts a second one, which receives; then it boots a guest, sends it there while it runs, and prints where
the time went. The guest checks its own memory all the while and says ``OK`` at the destination, or ``BAD``.
"""

from __future__ import annotations

import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from kvmigrate import BootConfig, Machine, MachineConfig, MigrationParameters, guests, receive, send


def destination(address: str, directory: Path) -> int:
    """The second process: take over one guest, and stay until it has ended."""
    with receive(address, name="arrived", serial=f"file:{directory / 'arrived'}", journal_dir=directory) as guest:
        end = guest.machine.wait_end(60)
        print(f"destination: {guest.fidelity.counts()['exact']} items of state are exactly as they were")
    print("destination:", (directory / "arrived").read_text().splitlines()[-1])
    return 2 if end is None else end.exit_status


def source(address: str, directory: Path) -> None:
    """The first process: boot, send, say what happened."""
    boot = BootConfig(guests.path("ledger"), cmdline="seconds=3 fill=32 beat=10")
    config = MachineConfig("leaving", memory_bytes=128 << 20, serial=f"file:{directory / 'leaving'}", boot=boot)
    machine = Machine.create(config)
    try:
        machine.start()
        machine.resume()
        time.sleep(0.5)
        result = send(machine, address, MigrationParameters(downtime_limit_ms=100), journal_dir=directory)
    finally:
        machine.close()
    for record in result.rounds:
        print(f"source: round {record.round}: {record.pages_sent} pages in {record.time_ms:.1f} ms")
    print(f"source: {result.total_ms:.0f} ms in all, the guest stood still for {result.downtime_ms:.1f} ms")


def main(arguments: list[str]) -> int:
    if arguments:
        return destination(arguments[0], Path(arguments[1]))
    with tempfile.TemporaryDirectory() as both:
        here, there = Path(both, "source"), Path(both, "destination")
        here.mkdir()
        there.mkdir()
        address = f"tcp://localhost:{free_port()}"
        other = subprocess.Popen([sys.executable, __file__, address, str(there)])
        try:
            wait_listening(address, other)
            source(address, here)
            return other.wait(60)
        finally:
            other.kill()
            other.wait()


def free_port() -> int:
    """A port that nobody has at the moment."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return int(probe.getsockname()[1])


def wait_listening(address: str, process: subprocess.Popen[bytes], timeout_s: float = 20) -> None:
    """Until somebody listens at ``address``, as Linux's own table of sockets says: dialling would count as a source."""
    wanted = f":{int(address.rpartition(':')[2]):04X} "
    deadline = time.monotonic() + timeout_s
    while not any(wanted in line and " 0A " in line for name in ("tcp", "tcp6") for line in sockets(name)):
        if process.poll() is not None or time.monotonic() > deadline:
            raise SystemExit("the destination did not begin to listen")
        time.sleep(0.01)


def sockets(name: str) -> list[str]:
    """The lines of one of the kernel's tables; empty where it is missing."""
    table = Path("/proc/net", name)
    return table.read_text().splitlines() if table.exists() else []


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
