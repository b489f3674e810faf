"""All that migration and snapshot may ask of a machine; they import nothing else of it.

The tests run both against a fake machine that has memory and a dirty log but no /dev/kvm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import StrEnum
from typing import Protocol

from .memory.dirty import DirtyLog
from .memory.region import GuestMemory
from .state.fidelity import Fidelity
from .state.section import Section, Value


class RunState(StrEnum):
    """QEMU's run states (qapi/run-state.json), as far as they are reached here."""

    PRELAUNCH = "prelaunch"
    INMIGRATE = "inmigrate"
    RUNNING = "running"
    PAUSED = "paused"
    SAVE_VM = "save-vm"
    FINISH_MIGRATE = "finish-migrate"
    POSTMIGRATE = "postmigrate"
    INTERNAL_ERROR = "internal-error"
    SHUTDOWN = "shutdown"


class Migratable(Protocol):
    """A guest that can be moved or saved. All methods are called by one thread at a time."""

    @property
    def memory(self) -> GuestMemory:
        """Guest RAM: slots, host address space, page hashes."""
        ...

    @property
    def dirty_log(self) -> DirtyLog:
        """Which pages were written since the last sync, by the guest or by the VMM."""
        ...

    @property
    def runstate(self) -> RunState: ...

    def describe(self) -> Mapping[str, Value]:
        """What a destination needs to build an equal, empty machine: a msgpack map with the keys ``name``, ``uuid``,
        ``memory_bytes``, ``slots`` (a list of [id, base_gfn, nr_pages]) and whatever else the builder reads."""
        ...

    def rehearse(self) -> None:
        """Do what :meth:`save` and :meth:`load` will do in the blackout on something that is thrown away, if this
        process has not done it before: the first time takes twice as long as the second. The guest may run."""
        ...

    def warm_up(self) -> None:
        """Do so once more, whenever it is called, right before it is to be done in earnest: what was done a moment ago
        is still in the processor's caches. About a millisecond. The guest may run."""
        ...

    def pause(self, reason: RunState) -> None:
        """Stop every vCPU, with no half-done I/O left in the kernel, and enter ``reason``. Idempotent."""
        ...

    def resume(self) -> None:
        """Let every vCPU run (again) and enter RUNNING.

        A pause for FINISH_MIGRATE gives the guest's disks up. When one has not come back, this raises
        :class:`ConfigError` with the guest still paused, and so does a pause after that."""
        ...

    def save(self) -> Sequence[Section]:
        """The state of every part but RAM. The machine must be paused; saving may write guest memory."""
        ...

    def save_parts(self) -> Iterator[Sequence[Section]]:
        """The same in two parts, each saved when it is asked for: the first can be loaded while the second is saved."""
        ...

    def sample(self) -> tuple[Sequence[Section], float]:
        """The sections of :meth:`save` from a guest that goes on, for :class:`Trial`, and for how many milliseconds it
        was held up in the longest of the pauses which that takes. Not all values are of the same moment. The guest may
        end meanwhile, as ever."""
        ...

    def trial(self) -> Trial:
        """A trial on this machine, which has never run, and has nothing else to do until that is closed. Its close
        raises :class:`HostError` or :class:`RestoreRefused` when the state cannot be taken back; then this machine must
        not run."""
        ...

    def load(self, sections: Sequence[Section], *, more: bool = False) -> Fidelity:
        """Set the state of every part, read all of it back and compare. Never runs a vCPU. With ``more`` they are the
        first of two parts: the result of the second tells of both.

        Raises :class:`StreamError` for a section that is missing, unknown or wrong. Refused items are in the
        result, for the caller to judge with :meth:`Fidelity.require`.
        """
        ...

    def close(self) -> None:
        """Give everything back to the kernel. Idempotent."""
        ...


class Trial(Protocol):
    """Shows what would become of a guest here, on a machine that does not run and takes nothing others may need."""

    def load(self, sections: Sequence[Section], resident_bytes: int) -> Fidelity:
        """Set the state and read it back, and see whether there is room for so many bytes of memory. Whatever this host
        lacks is refused in the result. Raises :class:`StreamError` for sections that no machine saves."""
        ...

    def close(self) -> None:
        """Leave nothing of it. Idempotent."""
        ...


Builder = Callable[[Mapping[str, Value]], Migratable]
"""Builds the empty machine that :meth:`Migratable.describe` described, refusing what this host cannot give."""

Examiner = Callable[[Mapping[str, Value]], Trial]
"""Makes a trial on such a machine, which also tells whether what a builder would open for it on this host is there.
Raises :class:`StreamError` for what describes no machine."""
