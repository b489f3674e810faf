"""Who owns a guest, in a small file that outlives the process: ``NAME.journal`` in the runtime directory.

It is put in place by one rename, and its state is changed by one write over it, of the same length and within a page:
whoever reads the file after this process died finds either the old or the new. A rename for each change would make some
file systems flush the file (5 ms measured on ext4), and changes lie in the blackout. There is no fsync either: a crash
of the host that could lose the file also loses the RAM that it speaks of.

What each state says to someone who finds the file, the process that wrote it being gone::

    source       committed   COMMIT was about to be sent to `peer`, or was: the guest may run there; the RAM that was
                             here went with the process
    destination  receiving   it never ran here
    destination  discarded   it never ran here, and the source may have been told so
    destination  committed   it was about to run here, or did
    destination  running     it ran here
"""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from enum import StrEnum
from pathlib import Path

from ..errors import BadField, HostError, StreamError
from ..record import asdict, dataclass, replace
from ..state.section import Fields

MAX_JOURNAL_BYTES = 64 << 10
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW


class Role(StrEnum):
    """Which side wrote the journal."""

    SOURCE = "source"
    DESTINATION = "destination"


class Entry(StrEnum):
    """The states of the module's docstring."""

    RECEIVING = "receiving"
    DISCARDED = "discarded"
    COMMITTED = "committed"
    RUNNING = "running"


_LONGEST_STATE = max(map(len, Entry))


@dataclass(frozen=True, slots=True)
class Record:
    """The content of a journal; ``epoch`` names the attempt and ``peer`` the other side's address."""

    name: str
    uuid: str
    epoch: int
    role: Role
    state: Entry
    peer: str
    pid: int


class Journal:
    """The journal of the guest ``name`` in ``directory``; :class:`HostError` where that cannot be read or written.

    Whoever wrote a journal may change and remove it only as long as it is still the one under that name: a guest that
    moved on has put a newer one there.
    """

    def __init__(self, directory: Path, name: str) -> None:
        self.path = directory / f"{name}.journal"
        self._temporary = directory / f".{name}.journal.tmp"
        self._record: Record | None = None
        self._fd = -1
        self._staged: Record | None = None
        self._staged_fd = -1
        self._next: tuple[Record, bytes] | None = None

    def write(self, record: Record) -> None:
        """Put ``record`` in place of what is there, whole or not at all."""
        self.stage(record)
        self.publish()

    def stage(self, record: Record) -> None:
        """Have ``record`` ready beside the journal, so that all that is left for the blackout is one rename."""
        self.unstage()
        data = _encode(record)
        try:
            self._staged_fd = os.open(self._temporary, _CREATE, 0o600)
            if os.write(self._staged_fd, data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            self.unstage()
            raise self._refused(error) from None
        self._staged = record

    def publish(self) -> None:
        """Put the staged record in place."""
        self._rename(self.path)
        self._fd = _replace(self._fd, self._staged_fd)
        self._record, self._staged, self._staged_fd, self._next = self._staged, None, -1, None

    def _rename(self, path: Path) -> None:
        """Give the staged record the name ``path``."""
        try:
            os.rename(self._temporary, path)  # noqa: PTH104 (in the blackout: the plainest call there is)
        except OSError as error:
            self.unstage()
            raise self._refused(error) from None

    def unstage(self) -> None:
        """Forget what is staged. Idempotent."""
        self._staged_fd = _replace(self._staged_fd, -1)
        self._staged = None
        with suppress(OSError):
            self._temporary.unlink(missing_ok=True)

    def withdraw(self) -> None:
        """Take back what was published, or staged: it has not come to that. Idempotent."""
        if self._record is None:
            self.unstage()
        else:
            self.remove()

    def _refused(self, error: OSError) -> HostError:
        return HostError(f"the journal {self.path}", error.errno or errno.EIO, "can its directory be written to?")

    def _require_ours(self) -> None:
        # A rename over it, or its removal, takes away the only name that it has.
        if not os.fstat(self._fd).st_nlink:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    def expect(self, state: Entry) -> None:
        """Have what :meth:`advance` to ``state`` will write ready: it is for the blackout."""
        if self._record is not None:
            record = replace(self._record, state=state)
            self._next = record, _encode(record)

    def advance(self, state: Entry) -> None:
        """The same record in another state, in place."""
        if self._record is None:
            return
        if self._next is None or self._next[0].state is not state:
            self.expect(state)
        assert self._next is not None, "there is a record"
        record, data = self._next
        self._put(data)
        self._record = record

    def rehearse(self) -> None:
        """Write the record that is there once more, and rename the staged one to its own name: what :meth:`advance` and
        :meth:`publish` do in the blackout is quicker after that. Raises :class:`HostError`."""
        if self._record is not None:
            self._put(_encode(self._record))
        if self._staged is not None:
            self._rename(self._temporary)

    def _put(self, data: bytes) -> None:
        try:
            self._require_ours()
            os.pwrite(self._fd, data, 0)
        except OSError as error:
            raise self._refused(error) from None

    def remove(self) -> None:
        """The matter is settled. Idempotent; a journal that cannot be removed is left, which only keeps old news."""
        self.unstage()
        with suppress(OSError):
            if self._fd >= 0:
                self._require_ours()
            self.path.unlink(missing_ok=True)
        self._fd = _replace(self._fd, -1)
        self._record = self._next = None

    def read(self) -> Record | None:
        """What is there, or None. Raises :class:`StreamError` for a file that is no journal."""
        try:
            with self.path.open("rb") as file:
                data = file.read(MAX_JOURNAL_BYTES + 1)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise HostError(f"the journal {self.path}", error.errno or errno.EIO) from None
        return _decode(data, str(self.path))


def _replace(fd: int, by: int) -> int:
    """Close ``fd`` if it is one; returns ``by``."""
    if fd >= 0:
        os.close(fd)
    return by


def _encode(record: Record) -> bytes:
    """As JSON, equally long in every state: blanks at the end make up for a shorter word."""
    import json

    return json.dumps(asdict(record)).encode() + b" " * (_LONGEST_STATE - len(record.state))


def _decode(data: bytes, where: str) -> Record:
    import json

    try:
        value = json.loads(data) if len(data) <= MAX_JOURNAL_BYTES else None
    except (ValueError, RecursionError):
        value = None
    if value is None:
        raise StreamError(f"{where} is not a journal: remove it if no guest of that name is in doubt")
    fields = Fields(value, where)
    role, state = fields.text("role", 16), fields.text("state", 16)
    if role not in list(Role) or state not in list(Entry):
        raise BadField(f"{where}: role {role!r} and state {state!r} are not those of a journal")
    record = Record(
        fields.text("name", 64),
        fields.text("uuid", 64),
        fields.integer("epoch"),
        Role(role),
        Entry(state),
        fields.text("peer", 512),
        fields.integer("pid", 0, 1 << 32),
    )
    fields.done()
    return record
