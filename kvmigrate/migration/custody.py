"""Whether the guest may run at the destination: decided once, under a lock, and journalled before anybody is told."""

from __future__ import annotations

import threading
from enum import Enum

from ..errors import HostError, MigrationError
from .journal import Entry, Journal, Record
from .wire import Answer, Ownership, Query


class Custody:
    """Shared by the thread that migrates and the one that answers QUERY, so that exactly one of them decides.

    ::

        HELD ── commit() ──> COMMITTED ── ran() ──> RUNNING
          └──── discard() or a QUERY ──> DISCARDED        COMMITTED ── broke() ──> BROKEN
    """

    class State(Enum):
        HELD = "held"
        COMMITTED = "committed"
        RUNNING = "running"
        DISCARDED = "discarded"
        BROKEN = "broken"

    def __init__(self, journal: Journal, record: Record) -> None:
        self._journal = journal
        self._record = record
        self._lock = threading.Lock()
        self._state = Custody.State.HELD
        self._why = ""
        self.told = threading.Event()
        """The source knows the decision: nobody needs the journal or the answers any more."""
        # The decision to run is preceded by a journal that says it has not run: whoever finds that one may say so.
        journal.write(record)
        journal.expect(Entry.COMMITTED)

    @property
    def state(self) -> State:
        return self._state

    def commit(self) -> None:
        """The guest is ours, by COMMIT or by the operator's word. Raises :class:`MigrationError` when it was discarded
        before, :class:`HostError` when the journal cannot be put in place: then it is discarded."""
        with self._lock:
            if self._state is not Custody.State.HELD:
                raise MigrationError(f"the guest was given up here before COMMIT came: {self._why}")
            try:
                self._journal.advance(Entry.COMMITTED)
            except HostError as error:
                self._discard(str(error))
                raise
            self._state = Custody.State.COMMITTED

    def rehearse(self) -> None:
        """For :meth:`commit`: the journal says once more what it says. Raises :class:`HostError`."""
        with self._lock:
            if self._state is Custody.State.HELD:
                self._journal.rehearse()

    def ran(self) -> None:
        """The guest runs."""
        with self._lock:
            self._state = Custody.State.RUNNING

    def note_running(self) -> None:
        """Put it in the journal; not in the blackout, and no matter when it fails: `committed` says enough."""
        with self._lock:
            if self._state is Custody.State.RUNNING and not self.told.is_set():
                try:
                    self._journal.advance(Entry.RUNNING)
                except HostError:
                    return

    def broke(self, why: str) -> None:
        """It was committed, and then could not be run."""
        with self._lock:
            self._state, self._why = Custody.State.BROKEN, why

    def discard(self, why: str) -> bool:
        """It will never run here. False when it was committed before."""
        with self._lock:
            if self._state is Custody.State.HELD:
                self._discard(why)
            return self._state is Custody.State.DISCARDED

    def settle(self) -> None:
        """The source knows: the journal goes."""
        with self._lock:
            self._journal.remove()
            self.told.set()

    def answer(self, query: Query) -> Answer:
        """Decide if nothing is decided yet, and say who owns the guest."""
        if (query.uuid, query.epoch) != (self._record.uuid, self._record.epoch):
            return Answer(Ownership.UNKNOWN, "this process receives another guest, or another attempt of it")
        self.discard("the source asked for it over a new connection before COMMIT had come")
        with self._lock:
            return Answer(_ANSWERS[self._state], self._why)

    def _discard(self, why: str) -> None:
        self._state, self._why = Custody.State.DISCARDED, why
        # Should this write fail the journal goes on saying `receiving`, which says the same: it never ran here.
        try:
            self._journal.advance(Entry.DISCARDED)
        except HostError:
            return


_ANSWERS = {
    Custody.State.COMMITTED: Ownership.RUNNING,
    Custody.State.RUNNING: Ownership.RUNNING,
    Custody.State.DISCARDED: Ownership.DISCARDED,
    Custody.State.BROKEN: Ownership.BROKEN,
}

_FOUND = {
    Entry.RECEIVING: (Ownership.DISCARDED, "the process that received it ended before COMMIT: it never ran there"),
    Entry.DISCARDED: (Ownership.DISCARDED, "it was given up there before it ran"),
    Entry.COMMITTED: (Ownership.BROKEN, "the process that had taken it over is gone, and the guest with it"),
    Entry.RUNNING: (Ownership.BROKEN, "it ran there, and its process is gone, and the guest with it"),
}


def answer_of(found: Record | None, query: Query) -> Answer:
    """The answer of a journal that an earlier process of the same name left behind."""
    if found is None or (found.uuid, found.epoch) != (query.uuid, query.epoch):
        return Answer(Ownership.UNKNOWN, "this process knows nothing of that guest")
    return Answer(*_FOUND[found.state])
