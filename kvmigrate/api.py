"""The public functions: one call each to send, receive, snapshot and restore a machine of this process.

The command line adds names, a control socket and a terminal to these; a program that embeds guests needs none of it.
:func:`rehearse` at its start, and whenever it has time: the next guest is as quick as can be then.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Self

from .config import (
    Address,
    ClockPolicy,
    DiskConfig,
    HostSide,
    MemoryBackend,
    MigrationParameters,
    NetConfig,
    SnapshotParameters,
)
from .control.runtime import open_runtime_dir
from .machine import rehearsal, spare_vm
from .machine.machine import Machine
from .machine.trial import TrialMachine
from .migration.address import Listener
from .migration.checker import Checker
from .migration.checks import CheckResult
from .migration.destination import Destination
from .migration.source import Source
from .migration.status import MigrationResult
from .record import dataclass
from .snapshot.load import restore as load_snapshot
from .snapshot.save import SnapshotResult, take
from .state.fidelity import Fidelity


def rehearse(memory_bytes: int = 0) -> None:
    """Do for the next :func:`restore` of this process what can be done before it: go through a load, once per process,
    and make a VM, of which one is kept, and its memory too when it is known that the guest has ``memory_bytes`` (of
    anonymous memory). About 20 ms the first time, 10 ms after a restore, nothing otherwise. Raises :class:`HostError`
    and :class:`ConfigError`."""
    spare_vm.set_aside(memory_bytes)
    rehearsal.rehearse()
    spare_vm.wait_until_rested()


def send(
    machine: Machine,
    address: str,
    parameters: MigrationParameters | None = None,
    *,
    journal_dir: Path | None = None,
    ask_for_ms: float | None = None,
) -> MigrationResult:
    """Migrate a running ``machine`` to who receives at ``address`` (``tcp://HOST:PORT`` or ``unix:///PATH``).

    Blocks until the guest runs there; ``machine`` is then paused for good: close it. On any error the guest runs on
    here, but for :class:`CommitUnknown`: then it is paused and its ownership in doubt, after ``ask_for_ms`` of asking.
    ``journal_dir`` holds the record of who owns the guest; by default the runtime directory.
    """
    directory = journal_dir or open_runtime_dir()
    source = Source(
        machine, Address.parse(address), parameters or MigrationParameters(), directory, ask_for_ms=ask_for_ms
    )
    return source.run()


def check(machine: Machine, address: str, *, timeout_ms: float = 10_000.0) -> CheckResult:
    """Have who receives at ``address`` try the state of ``machine`` on one that it throws away; the guest runs on here.

    ``checked`` of the result says whether it ``fits``, and which items would be lost. Raises :class:`KvmigrateError`
    when there is no answer."""
    return Checker(machine, Address.parse(address), timeout_ms).run()


@dataclass(frozen=True, slots=True)
class Received:
    """A guest that arrived and is owned by this process, running unless it was paused at its source.

    :meth:`close` ends it. Keep this object: it also answers a source that did not hear that its guest arrived.
    """

    machine: Machine
    fidelity: Fidelity
    destination: Destination

    def close(self) -> None:
        """End the guest and stop answering. Idempotent."""
        self.destination.close()
        self.machine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def receive(
    address: str,
    *,
    name: str | None = None,
    serial: str = "null",
    disks: Sequence[DiskConfig] = (),
    nets: Sequence[NetConfig] = (),
    console: str | None = None,
    journal_dir: Path | None = None,
    paused: bool = False,
    reboot: bool = True,
    memory_backend: MemoryBackend = MemoryBackend.ANONYMOUS,
) -> Received:
    """Wait at ``address`` for one guest and take it over; ``name``, ``serial`` and ``console`` are its own here, and
    so are the images and taps of those of its ``disks`` and ``nets`` that are given, and ``reboot`` and
    ``memory_backend`` as in :class:`MachineConfig`.

    Raises the reason when the guest did not arrive: then it still is at its source and nothing of it is here.
    """
    here = HostSide(name or "", serial, tuple(disks), tuple(nets), console, reboot, memory_backend)
    rehearse()
    destination = Destination(
        Listener(Address.parse(address)),
        partial(Machine.build, here=here),
        partial(TrialMachine.examine, here=here),
        journal_dir or open_runtime_dir(),
        name or "received",
        autostart=not paused,
    )
    arrived = destination.run()
    assert isinstance(arrived.machine, Machine)
    return Received(arrived.machine, arrived.fidelity, destination)


def take_snapshot(machine: Machine, directory: Path, parameters: SnapshotParameters | None = None) -> SnapshotResult:
    """Save a machine to ``directory``, which must not exist, while its guest runs; it runs on afterwards, whatever
    happened. (Not called ``snapshot``: that is the package's name.) See :func:`kvmigrate.snapshot.save.take`."""
    return take(machine, directory, parameters or SnapshotParameters())


@dataclass(frozen=True, slots=True)
class Restored:
    """A machine that holds what a snapshot held and has not run yet, and what became of each item of its state."""

    machine: Machine
    fidelity: Fidelity


def restore(
    directory: Path,
    *,
    name: str | None = None,
    serial: str = "null",
    disks: Sequence[DiskConfig] = (),
    nets: Sequence[NetConfig] = (),
    console: str | None = None,
    clone: bool = False,
    clock: ClockPolicy = ClockPolicy.CONTINUE,
    reboot: bool = True,
    memory_backend: MemoryBackend = MemoryBackend.ANONYMOUS,
) -> Restored:
    """Make the machine that ``directory`` holds; call :meth:`Machine.start` and :meth:`Machine.resume` to let it run.

    Other than the command, this does not hold the snapshot: see to it that a guest runs once, or take a ``clone``.
    The first restore of a process takes twice as long as the next, unless :func:`rehearse` was called before.

    Raises :class:`SnapshotError` or :class:`RestoreRefused`, naming what is wrong where.
    """
    here = HostSide(name or "", serial, tuple(disks), tuple(nets), console, reboot, memory_backend)
    loaded = load_snapshot(directory, partial(Machine.build, here=here, clone=clone, clock=clock))
    assert isinstance(loaded.machine, Machine)
    loaded.machine.new_generation()
    return Restored(loaded.machine, loaded.fidelity)
