"""What the frames of a migration say, in which order they come, and what the receiver makes of each.

Frames are those of ``state/frame.py``, numbered in each direction from 0; payloads are msgpack maps, PAGES apart. All
integers are at most 64 bits wide, times are microseconds on the clock of the side that names them::

    source                                        destination
      | HELLO{format,features,uuid,epoch,name} ------> |
      | <------ HELLO{format,features,uuid,epoch,name} |   the same uuid and epoch come back
      | CONFIG{description} -------------------------> |   builds the machine: slots, vCPUs, memory
      | <-------------------------------------- ACCEPT |   or FAILED
      | CHECK{sections,…}, SECTION … ----------------> |   tries them on a machine that it throws away
      | <------------------------------ CHECKED{items} |   or the source gives up: a refused item
      | RESIDENT{runs} ------------------------------> |   a hint, optional: touches that memory ahead
      | OFFER{features} -----------------------------> |   optional (migration/delta.py), answered by OFFER
      | PAGES … ROUND{round,…}  (for every round) ---> |   the guest runs here -----
      | <----------------------------- ROUND, the same |   all of the round has been received
      | pause, save what the kernel keeps              |
      | ROUND{…,sections,…,more: true}, SECTION … ---> |   loads and reads it back; meanwhile the devices are saved
      | ROUND{…,sections,sections_bytes}, SECTION … -> |   loads and reads them back while the last pages travel
      | sync, PAGES … -------------------------------> |
      | END{pages,bytes,digest,nr_hashed,autostart} -> |   compares what it received
      | journal `committed`                            |
      | <------ READY{digest,nr_hashed,load_us,check_us} |   or FAILED: the source's journal goes
      | COMMIT{epoch} -------------------------------> |   journal `committed`, resume
      | <---------------- RUNNING{resume_us…,fidelity} |   ----- the guest runs there
      | DONE ----------------------------------------> |   journals go

The receiver's table. A pair that is not in it is an :class:`UnexpectedFrame` that names both, and ends the migration::

    state       frame     next
    AWAITED     HELLO     GREETED
    AWAITED     QUERY     AWAITED        answered, then that connection is closed
    GREETED     CONFIG    BUILT          RECEIVING when HELLO has no feature ``check``
    BUILT       CHECK     RECEIVING      with the SECTION frames that it announces
    RECEIVING   RESIDENT  RECEIVING
    RECEIVING   OFFER     RECEIVING      once
    RECEIVING   PAGES     RECEIVING
    RECEIVING   ROUND     RECEIVING      when it announces sections LOADED, or PART when more come after those
    PART        ROUND     LOADED         with the SECTION frames that it announces
    LOADED      PAGES     LOADED
    LOADED      END       READY
    READY       COMMIT    COMMITTED
    COMMITTED   DONE      over
    any before COMMITTED  FAILED         over: the source gave up, for the reason in it

A check alone. HELLO has the features ``check`` and ``only-check``, and after CHECKED that connection is over. Nothing
is built for it but the machine that is thrown away, nothing journalled; the receiver is AWAITED again, whatever came.

Who owns the guest. ``epoch`` names one attempt (nanoseconds since 1970 when it began, so a later one is larger). Before
COMMIT it is the source's: whatever fails, it resumes there. From the moment COMMIT may have left, the source never
resumes by itself. When RUNNING does not come it dials again, as often as needed, and asks over a new connection::

      | QUERY{uuid,epoch} ---------------------------> |
      | <------------------------- ANSWER{state, text} |
      | DONE ----------------------------------------> |   the answer has arrived; after running or discarded

    running     it runs there, or will: the migration is complete
    discarded   it does not and never will: the decision was journalled before it was told, the source may resume
    broken      it was given up there after it may have run: the operator decides
    unknown     this process has never heard of that attempt: the operator decides, or another process answers

A destination that is asked while it waits for COMMIT decides ``discarded`` there and then, and refuses a COMMIT that
comes later: the one who asks has given up that connection. A destination that refuses a COMMIT says so by
ANSWER{discarded} in place of RUNNING.

``digest`` is the sum that both sides keep over the pages as last sent and as last received, ``nr_hashed`` how many of
them are not zero: they differ when a page was lost, damaged or put in a wrong place. They do not replace a digest of
all RAM, which tests take on both sides over a way of their own.

Versions. ``format`` is 1. A source of a later format says so and is refused by number. ``features`` names what this
stream uses beyond format 1 (``zstd``: PAGES frames may be compressed; ``check`` and ``only-check`` as above;
``connections``: pages come over further connections too, see ``joining.py``; ``parts``: sections come in two);
a destination refuses one that it does not know. Frames of an unknown kind are skipped unless their mandatory bit is
set; fields that are unknown are refused.
"""

from __future__ import annotations

from enum import Enum
from typing import Self

from ..config import MAX_CONNECTIONS
from ..errors import BadField, BadVersion, KvmigrateError, PeerFailed
from ..record import asdict, dataclass
from ..state.frame import FrameKind
from ..state.section import Fields, Value, pack, unpack

FORMAT = 1
FEATURES = frozenset({"zstd", "check", "only-check", "connections", PARTS := "parts"})
MAX_RESIDENT_RUNS = 4096
MAX_SECTIONS = 1024
MAX_SECTIONS_BYTES = 16 << 20
MAX_US = 1 << 40


class Ownership(Enum):
    """The answer to QUERY, as the module's docstring says."""

    RUNNING = "running"
    DISCARDED = "discarded"
    BROKEN = "broken"
    UNKNOWN = "unknown"


def _fields(payload: bytes, kind: FrameKind) -> Fields:
    return Fields(unpack(payload, f"a {kind.name} frame"), kind.name)


@dataclass(frozen=True, slots=True)
class Hello:
    """Who speaks, and in which version."""

    format: int
    features: tuple[str, ...]
    uuid: str
    epoch: int
    name: str

    def to_payload(self) -> bytes:
        """The frame\'s payload."""
        return pack(asdict(self) | {"features": list(self.features)})

    @classmethod
    def from_payload(cls, payload: bytes) -> Self:
        """Raises :class:`BadVersion` for a format or a feature that this program does not know."""
        fields = _fields(payload, FrameKind.HELLO)
        version = fields.integer("format", 0, 0xFFFF)
        if version != FORMAT:
            raise BadVersion(f"the peer speaks format {version} of the stream, this kvmigrate format {FORMAT}")
        features = fields.sequence("features", 32)
        for feature in features:
            if not isinstance(feature, str) or feature not in FEATURES:
                raise BadVersion(f"the peer uses {str(feature)[:40]!r}, which this kvmigrate does not know: update it")
        hello = cls(
            version,
            tuple(features),
            fields.text("uuid", 64),
            fields.integer("epoch"),
            fields.text("name", 64),
        )
        fields.done()
        return hello


@dataclass(frozen=True, slots=True)
class Resident:
    """Which memory is about to come: runs of first gfn and number of pages, by rising gfn."""

    runs: tuple[tuple[int, int], ...]

    def to_payload(self) -> bytes:
        """The frame\'s payload."""
        return pack({"runs": [list(run) for run in self.runs]})

    @classmethod
    def from_payload(cls, payload: bytes) -> Self:
        """Raises :class:`BadField`."""
        fields = _fields(payload, FrameKind.RESIDENT)
        runs = fields.sequence("runs", MAX_RESIDENT_RUNS)
        fields.done()
        if any(type(run) is not list or len(run) != 2 or {*map(type, run)} != {int} or min(run) < 0 for run in runs):
            raise BadField("RESIDENT: field 'runs' holds something that is no run of pages")
        return cls(tuple((gfn, nr_pages) for gfn, nr_pages in runs))


@dataclass(frozen=True, slots=True)
class Round:
    """A round is over. With ``sections`` > 0 the guest is paused, and so many SECTION frames come next, in one piece of
    ``sections_bytes``; with ``more``, which only sources that say ``parts`` have, others come after one more ROUND."""

    round: int
    pages_sent: int
    pages_zero: int
    bytes_sent: int
    sections: int = 0
    sections_bytes: int = 0
    more: bool = False

    def to_payload(self) -> bytes:
        """The frame\'s payload."""
        return pack(asdict(self))

    @classmethod
    def from_payload(cls, payload: bytes) -> Self:
        """Decode a hostile payload. Raises :class:`StreamError`."""
        fields = _fields(payload, FrameKind.ROUND)
        number, sent, zero, nr_bytes = (fields.integer(k) for k in ("round", "pages_sent", "pages_zero", "bytes_sent"))
        sections = fields.integer("sections", 0, MAX_SECTIONS)
        sections_bytes = fields.integer("sections_bytes", sections * 32, sections and MAX_SECTIONS_BYTES)
        more = fields.has("more") and fields.boolean("more")
        round_ = cls(number, sent, zero, nr_bytes, sections, sections_bytes, more)
        fields.done()
        return round_


@dataclass(frozen=True, slots=True)
class End:
    """Everything was sent. ``pages`` counts data pages and ``cleared`` pages that became zero, over all rounds."""

    pages: int
    cleared: int
    digest: int
    nr_hashed: int
    autostart: bool
    """Whether the guest is to run at once: false when it was paused at the source."""
    further: int = 0
    """How many further connections carry last pages, and end by DONE. Not on the wire when there are none, so that a
    destination which knows of no further connections reads it too."""

    def to_payload(self) -> bytes:
        """The frame\'s payload."""
        value = asdict(self)
        if not self.further:
            del value["further"]
        return pack(value)

    @classmethod
    def from_payload(cls, payload: bytes) -> Self:
        """Decode a hostile payload. Raises :class:`StreamError`."""
        fields = _fields(payload, FrameKind.END)
        pages, cleared, digest, nr_hashed = (fields.integer(k) for k in ("pages", "cleared", "digest", "nr_hashed"))
        further = fields.integer("further", 1, MAX_CONNECTIONS - 1) if fields.has("further") else 0
        end = cls(pages, cleared, digest, nr_hashed, fields.boolean("autostart"), further)
        fields.done()
        return end


@dataclass(frozen=True, slots=True)
class Ready:
    """Everything is there, loaded and read back."""

    digest: int
    nr_hashed: int
    load_ms: float
    check_ms: float
    """From END received to READY sent."""

    def to_payload(self) -> bytes:
        """The frame\'s payload."""
        return pack(
            {
                "digest": self.digest,
                "nr_hashed": self.nr_hashed,
                "load_us": microseconds(self.load_ms),
                "check_us": microseconds(self.check_ms),
            }
        )

    @classmethod
    def from_payload(cls, payload: bytes) -> Self:
        """Decode a hostile payload. Raises :class:`StreamError`."""
        fields = _fields(payload, FrameKind.READY)
        ready = cls(
            fields.integer("digest"),
            fields.integer("nr_hashed"),
            duration_ms(fields, "load_us"),
            duration_ms(fields, "check_us"),
        )
        fields.done()
        return ready


@dataclass(frozen=True, slots=True)
class Running:
    """The guest runs at the destination, or is paused there as it was here."""

    journal_ms: float
    resume_ms: float
    total_ms: float
    """From COMMIT received to RUNNING sent; the two above are parts of it."""
    fidelity: Value
    """As :meth:`Fidelity.to_value`: for showing only, so the source checks that it is a map and no more."""

    def to_payload(self) -> bytes:
        """The frame\'s payload."""
        return pack(
            {
                "journal_us": microseconds(self.journal_ms),
                "resume_us": microseconds(self.resume_ms),
                "total_us": microseconds(self.total_ms),
                "fidelity": self.fidelity,
            }
        )

    @classmethod
    def from_payload(cls, payload: bytes) -> Self:
        """Decode a hostile payload. Raises :class:`StreamError`."""
        fields = _fields(payload, FrameKind.RUNNING)
        journal_ms, resume_ms, total_ms = (duration_ms(fields, k) for k in ("journal_us", "resume_us", "total_us"))
        running = cls(journal_ms, resume_ms, total_ms, fields.mapping("fidelity"))
        fields.done()
        return running


@dataclass(frozen=True, slots=True)
class Query:
    """Who owns the guest ``uuid`` of the attempt ``epoch``?"""

    uuid: str
    epoch: int

    def to_payload(self) -> bytes:
        """The frame\'s payload."""
        return pack(asdict(self))

    @classmethod
    def from_payload(cls, payload: bytes) -> Self:
        """Decode a hostile payload. Raises :class:`StreamError`."""
        fields = _fields(payload, FrameKind.QUERY)
        query = cls(fields.text("uuid", 64), fields.integer("epoch"))
        fields.done()
        return query


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer, and a line for a person."""

    state: Ownership
    text: str = ""

    def to_payload(self) -> bytes:
        """The frame\'s payload."""
        return pack({"state": self.state.value, "text": one_line(self.text)})

    @classmethod
    def from_payload(cls, payload: bytes) -> Self:
        """Decode a hostile payload. Raises :class:`StreamError`."""
        fields = _fields(payload, FrameKind.ANSWER)
        state = fields.text("state", 16)
        if state not in [o.value for o in Ownership]:
            raise BadField(f"ANSWER: field 'state' is {one_line(state)!r}, which no answer is")
        answer = cls(Ownership(state), one_line(fields.text("text", 4096)))
        fields.done()
        return answer


@dataclass(frozen=True, slots=True)
class Failed:
    """One side gave up: its error's class, the item of state it was about (or nothing), and the line for a person."""

    error: str
    item: str
    text: str

    @classmethod
    def of(cls, error: BaseException) -> Self:
        """Of any exception; one that is not kvmigrate's own is named by its class."""
        text = str(error) if isinstance(error, KvmigrateError) else f"{type(error).__name__}: {error}"
        return cls(type(error).__name__, str(getattr(error, "item", "")), one_line(text))

    def to_value(self) -> Value:
        """As a map for msgpack."""
        return asdict(self)

    @classmethod
    def from_payload(cls, payload: bytes) -> Self:
        """Decode a hostile payload. Raises :class:`StreamError`."""
        fields = _fields(payload, FrameKind.FAILED)
        failed = cls(*(one_line(fields.text(key)) for key in ("error", "item", "text")))
        fields.done()
        return failed

    def to_error(self, peer: str) -> PeerFailed:
        """As the error to raise on this side."""
        return PeerFailed(f"{peer} gave up: {self.text}")


def commit_payload(epoch: int) -> bytes:
    """COMMIT names the attempt, so that one that is meant for another is refused."""
    return pack({"epoch": epoch})


def commit_epoch(payload: bytes) -> int:
    """The attempt that a COMMIT frame names."""
    fields = _fields(payload, FrameKind.COMMIT)
    epoch = fields.integer("epoch")
    fields.done()
    return epoch


def expect_empty(payload: bytes, kind: FrameKind) -> None:
    """For ACCEPT and DONE, which carry an empty map."""
    _fields(payload, kind).done()


def microseconds(ms: float) -> int:
    """A duration for the wire."""
    return max(round(ms * 1e3), 0)


def duration_ms(fields: Fields, key: str) -> float:
    """Milliseconds of a field in whole microseconds: an integer on the wire can be no NaN and no infinity."""
    return fields.integer(key, 0, MAX_US) / 1e3


def one_line(text: str, limit: int = 400) -> str:
    """``text`` from a peer as one printable line: no control characters, no escape sequences, not too long."""
    clean = "".join(c if c.isprintable() else " " for c in text)
    return " ".join(clean.split())[:limit]
