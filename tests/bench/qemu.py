"""QEMU as the bench runs it: the same guest, the same kind of serial port, no other device."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .qmp import Qmp, QmpError
from .samples import Sample
from .vm import Guest, Vm

UNLIMITED_BYTES_S = 1 << 40
DEFAULT_LIMIT_MS = 300
XBZRLE_CACHE_BYTES = 512 << 20
# Under some KVM back-ends IA32_ARCH_CAPABILITIES reads but cannot be set, and QEMU aborts on that.
CPU = "host,-arch-capabilities"


@dataclass(frozen=True)
class QemuVariant:
    """How QEMU is set up for one row of the table."""

    channels: int = 0
    """Multifd channels; 0 is the single stream."""
    limit_ms: int = DEFAULT_LIMIT_MS
    prealloc: bool = True
    """Whether the destination's memory is touched before the migration begins; the time for it is not counted."""
    memfd: bool = False
    xbzrle: bool = False
    zstd: bool = False

    def __str__(self) -> str:
        words = ["QEMU", f"multifd {self.channels}" if self.channels else "single stream"]
        words += [word for word in ("xbzrle", "zstd", "memfd") if getattr(self, word)]
        words += [] if self.limit_ms == DEFAULT_LIMIT_MS else [f"limit {self.limit_ms} ms"]
        return ", ".join(words + (["prealloc"] if self.prealloc else []))

    @property
    def key(self) -> str:
        """Rows with equal keys move the same guest on."""
        return "qemu memfd" if self.memfd else "qemu"

    def boot(self, directory: Path, guest: Guest, prefix: Sequence[str]) -> Vm:
        """A process that boots the guest."""
        return Qemu(directory, guest, memory=self.memory(guest, prealloc=False), prefix=prefix)

    def receive(self, directory: Path, guest: Guest, prefix: Sequence[str], uri: str) -> Vm:
        """A process that waits for a guest."""
        memory = self.memory(guest, prealloc=self.prealloc)
        destination = Qemu(directory, guest, memory=memory, incoming="defer", prefix=prefix)
        self.prepare(destination)
        destination.qmp.execute("migrate-incoming", uri=uri)
        return destination

    def memory(self, guest: Guest, *, prealloc: bool) -> str:
        """QEMU's words for guest RAM of this kind."""
        kind = "memory-backend-memfd,share=on" if self.memfd else "memory-backend-ram"
        return f"{kind},id=ram,size={guest.memory_mib}M,prealloc={'on' if prealloc else 'off'}"

    def prepare(self, vm: Vm) -> None:
        """Capabilities and parameters; a multifd migration needs them on both sides."""
        wanted = {"events": True, "multifd": self.channels > 0, "xbzrle": self.xbzrle}
        vm.qmp.execute(
            "migrate-set-capabilities",
            capabilities=[{"capability": name, "state": state} for name, state in wanted.items()],
        )
        parameters: dict[str, Any] = {"max_bandwidth": UNLIMITED_BYTES_S, "downtime_limit": self.limit_ms}
        parameters["multifd_compression"] = "zstd" if self.zstd else "none"
        parameters["multifd_channels"] = self.channels or 2
        if self.xbzrle:
            parameters["xbzrle_cache_size"] = XBZRLE_CACHE_BYTES
        vm.qmp.execute("migrate-set-parameters", **parameters)

    def details(self, source: Vm) -> Sample:
        """QEMU tells no more than query-migrate does."""
        return Sample({})


class Qemu(Vm):
    """One QEMU process."""

    def __init__(
        self, directory: Path, guest: Guest, *, memory: str, incoming: str = "", prefix: Sequence[str] = ()
    ) -> None:
        super().__init__(directory, guest, prefix)
        command = [qemu_binary(), "-accel", "kvm", "-cpu", CPU, "-machine", "pc,memory-backend=ram"]
        command += ["-object", memory, "-m", f"{guest.memory_mib}M", "-nodefaults", "-no-user-config"]
        command += ["-display", "none", "-kernel", str(guest.image), "-append", guest.cmdline]
        command += ["-serial", f"unix:{directory}/serial", "-qmp", f"unix:{directory}/qmp,server=on,wait=off"]
        command += ["-incoming", incoming] if incoming else []
        self.spawn(command)
        self.qmp = Qmp(directory / "qmp")

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
