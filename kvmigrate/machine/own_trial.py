"""A state tried on the very machine that is to have it, and taken back."""

from __future__ import annotations

from collections.abc import Sequence

from ..config import PAGE_BYTES, MemoryBackend
from ..state.fidelity import Fidelity
from ..state.section import Section, decode_well_formed
from .platform import Platform
from .room import judge_room
from .sections import take_back, try_sections


class OwnTrial:
    """Implements :class:`kvmigrate.contract.Trial` for ``platform``, of which no vCPU has ever run, and whose state is
    ``new``, as it goes over the wire.

    A machine for the trial alone would take as long to build once more, and what this one has been through before it
    does faster in the blackout."""

    def __init__(self, platform: Platform, new: Sequence[bytes]) -> None:
        self._platform = platform
        self._new = new
        self._is_tried = False

    def load(self, sections: Sequence[Section], resident_bytes: int) -> Fidelity:
        """See :meth:`kvmigrate.contract.Trial.load`."""
        self._is_tried = True
        fidelity = try_sections(self._platform, sections)
        memory = self._platform.memory
        # Huge pages of the pool were set aside when the memory was made.
        if memory.backend is not MemoryBackend.HUGETLBFS:
            judge_room(fidelity, resident_bytes, memory.resident_pages() * PAGE_BYTES)
        return fidelity

    def close(self) -> None:
        """Leave nothing of what was loaded: the machine is what it was. Idempotent.

        Raises :class:`HostError` or :class:`RestoreRefused` when it cannot be; it must not run then."""
        if self._is_tried:
            self._is_tried = False
            take_back(self._platform, [decode_well_formed(section) for section in self._new])
