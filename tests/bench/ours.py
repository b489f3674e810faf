"""kvmigrate as the bench runs it: the command, as a user would, and its monitor, as QEMU's is used."""

from __future__ import annotations

import sys
from pathlib import Path

from .observer import Heartbeats
from .qmp import Qmp
from .vm import Guest, Vm

KVMIGRATE = [sys.executable, "-m", "kvmigrate"]


class Ours(Vm):
    """One kvmigrate process: ``run``, ``receive`` or ``restore``, by what ``verb`` says."""

    def __init__(self, directory: Path, guest: Guest, *verb: str) -> None:
        super().__init__(directory, guest)
        self.heartbeats = Heartbeats(directory / "serial")
        command = [*KVMIGRATE, *verb, "--name", "vm", "--serial", f"unix:{directory}/serial"]
        self.spawn(command, {"XDG_RUNTIME_DIR": str(directory)})

    @classmethod
    def run(cls, directory: Path, guest: Guest) -> Ours:
        """A process that boots the guest."""
        options = ["--memory", f"{guest.memory_mib}M", "--append", guest.cmdline]
        return cls(directory, guest, "run", str(guest.image), *options).connect()

    def connect(self) -> Ours:
        """Wait for the monitor; migration events on, as in QEMU's runs."""
        self.qmp = Qmp(self.directory / "kvmigrate" / "vm.sock")
        self.qmp.execute("migrate-set-capabilities", capabilities=[{"capability": "events", "state": True}])
        return self
