"""QEMU as the bench runs it: the same guest, the same kind of serial port, no other device."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from .observer import Heartbeats
from .qmp import Qmp, QmpError
from .vm import Guest, Vm

UNLIMITED_BYTES_S = 1 << 40
# Under some KVM back-ends IA32_ARCH_CAPABILITIES reads but cannot be set, and QEMU aborts on that.
CPU = "host,-arch-capabilities"


@dataclass(frozen=True)
class QemuVariant:
    """How QEMU is set up for one row of the table."""

    channels: int = 0
    """Multifd channels; 0 is the single stream."""
    downtime_limit_ms: int | None = None
    """None leaves QEMU's default of 300 ms."""
    prealloc: bool = False
    """Whether the destination's memory is touched before the migration begins."""

    def __str__(self) -> str:
        stream = f"multifd {self.channels}" if self.channels else "single stream"
        limit = "default limit" if self.downtime_limit_ms is None else f"limit {self.downtime_limit_ms} ms"
        return f"QEMU, {stream}, {limit}" + (", destination preallocated" if self.prealloc else "")


class Qemu(Vm):
    """One QEMU process."""

    def __init__(self, directory: Path, guest: Guest, *, incoming: str = "", prealloc: bool = False) -> None:
        super().__init__(directory, guest)
        self.heartbeats = Heartbeats(directory / "serial")
        memory = f"memory-backend-ram,id=ram,size={guest.memory_mib}M,prealloc={'on' if prealloc else 'off'}"
        command = [qemu_binary(), "-accel", "kvm", "-cpu", CPU, "-machine", "pc,memory-backend=ram"]
        command += ["-object", memory, "-m", f"{guest.memory_mib}M", "-nodefaults", "-no-user-config"]
        command += ["-display", "none", "-kernel", str(guest.image), "-append", guest.cmdline]
        command += ["-serial", f"unix:{directory}/serial", "-qmp", f"unix:{directory}/qmp,server=on,wait=off"]
        command += ["-incoming", incoming] if incoming else []
        self.spawn(command)
        self.qmp = Qmp(directory / "qmp")

    def set_up(self, variant: QemuVariant) -> None:
        """Capabilities and parameters; a multifd migration needs them on both sides."""
        multifd = {"capability": "multifd", "state": variant.channels > 0}
        self.qmp.execute("migrate-set-capabilities", capabilities=[{"capability": "events", "state": True}, multifd])
        self.qmp.execute("migrate-set-parameters", max_bandwidth=UNLIMITED_BYTES_S)
        if variant.channels:
            self.qmp.execute("migrate-set-parameters", multifd_channels=variant.channels)
        if variant.downtime_limit_ms is not None:
            self.qmp.execute("migrate-set-parameters", downtime_limit=variant.downtime_limit_ms)

    def resume(self, timeout_s: float = 5.0) -> None:
        """Let the guest run on after a save; QEMU refuses for a moment after it has said completed."""
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                self.qmp.execute("cont")
                return
            except QmpError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.002)

    def save_to_fd(self, path: Path) -> None:
        """Migrate into a file that QEMU writes itself, without a pipe in between."""
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        self.qmp.execute("getfd", send_fd=fd, fdname="file")
        os.close(fd)
        self.qmp.execute("migrate", uri="fd:file")


def qemu_binary() -> str:
    """The path of qemu-system-x86_64. Raises FileNotFoundError."""
    found = shutil.which("qemu-system-x86_64")
    if found is None:
        raise FileNotFoundError("qemu-system-x86_64 is not installed: run make deps-test")
    return found


def qemu_version() -> str:
    """``7.2.22`` and what the distribution adds."""
    out = subprocess.run([qemu_binary(), "--version"], check=True, capture_output=True, text=True).stdout
    return out.splitlines()[0].removeprefix("QEMU emulator version ")
