"""kvmigrate as the bench runs it: the command, as a user would, and its monitor, as QEMU's is used."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .qmp import Qmp
from .samples import Sample
from .vm import Guest, Vm

KVMIGRATE = [sys.executable, "-m", "kvmigrate"]
TOUCHED_S = 90.0
"""For the memory that a destination touches before it answers; a host may take seconds per gigabyte to come by it."""
DOWNTIME_PARTS = ("stop", "last-pages", "state", "send", "load", "resume")


@dataclass(frozen=True)
class OurVariant:
    """How kvmigrate is set up for one row of a table."""

    name: str = ""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    """Migration parameters that are not left as they are by default."""
    prefault: bool = False
    """Whether the destination has touched the guest's memory before it comes, as QEMU's with prealloc."""
    backend: str = ""
    """What its memory is made of on both sides, if not of what it is by default."""

    @property
    def key(self) -> str:
        """Rows with equal keys move the same guest on."""
        return f"kvmigrate {self.backend}".strip()

    def __str__(self) -> str:
        return "kvmigrate" + (f", {self.name}" if self.name else "")

    def boot(self, directory: Path, guest: Guest, prefix: Sequence[str]) -> Vm:
        """A process that boots the guest."""
        return Ours.run(directory, guest, prefix, *self._options)

    def receive(self, directory: Path, guest: Guest, prefix: Sequence[str], uri: str) -> Vm:
        """A process that waits for a guest."""
        prefault = ["--prefault", f"{guest.memory_mib}M"] if self.prefault else []
        return Ours(directory, guest, "receive", uri, *prefault, *self._options, prefix=prefix).connect()

    @property
    def _options(self) -> list[str]:
        return ["--memory-backend", self.backend] if self.backend else []

    def prepare(self, source: Vm) -> None:
        """Set the source's parameters."""
        defaults = {"x_kvmigrate_compression": "none"}
        source.qmp.execute("migrate-set-parameters", **{**defaults, **self.parameters})

    def details(self, source: Vm) -> Sample:
        """What the source says of its own rounds and of the parts of the blackout."""
        result = source.qmp.execute("x-kvmigrate-job").get("result", {})
        parts = result.get("downtime-parts", {})
        figures = {f"own {name} ms": float(parts[name]) for name in DOWNTIME_PARTS if name in parts}
        return Sample(figures, rounds=result.get("rounds", []))


class Ours(Vm):
    """One kvmigrate process: ``run``, ``receive`` or ``restore``, by what ``verb`` says."""

    def __init__(self, directory: Path, guest: Guest, *verb: str, prefix: Sequence[str] = ()) -> None:
        super().__init__(directory, guest, prefix)
        command = [*KVMIGRATE, *verb, "--name", "vm", "--serial", f"unix:{directory}/serial"]
        self.spawn(command, {"XDG_RUNTIME_DIR": str(directory)})

    @classmethod
    def run(cls, directory: Path, guest: Guest, prefix: Sequence[str] = (), *more: str) -> Ours:
        """A process that boots the guest, with ``more`` options."""
        options = ["--memory", f"{guest.memory_mib}M", "--append", guest.cmdline, *more]
        return cls(directory, guest, "run", str(guest.image), *options, prefix=prefix).connect()

    def connect(self) -> Ours:
        """Wait for the monitor; migration events on, as in QEMU's runs. Raises QmpError with the process ended."""
        try:
            self.qmp = Qmp(self.directory / "kvmigrate" / "vm.sock", TOUCHED_S)
        except BaseException:
            self.close()
            raise
        self.qmp.execute("migrate-set-capabilities", capabilities=[{"capability": "events", "state": True}])
        return self
