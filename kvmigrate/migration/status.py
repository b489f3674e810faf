"""What a migration tells while it runs and when it is over, under QEMU's names (qapi/migration.json) where it has one.

:meth:`MigrationResult.to_value` gives a map for JSON::

    status              none setup active device completed failed cancelling cancelled, and commit-unknown (not QEMU's)
    total-time          ms since the migration began          setup-time          ms before the first round
    downtime            ms, on the source's clock, from the request to pause until RUNNING had come back
    expected-downtime   ms, the estimate of precopy/converge.py
    error-desc          why it failed; only then
    ram                 transferred remaining total (bytes) duplicate normal (pages) normal-bytes dirty-pages-rate
                        (pages/s) mbps (megabits/s) dirty-sync-count page-size pages-per-second, and fraction (0 to
                        1, never falls) and eta (ms for the rest of this round, or null), which are not QEMU's
    rounds              a list of what each round did, see precopy/ledger.py
    downtime-parts      ms: stop state last-pages load send resume, their sum total, and one-way
    fidelity            what the destination made of every item of state: counts and the items that are not exact
    check               what the destination made of the state when it tried it before the first round: fits, counts,
                        items, and ms: pause-time (the guest stood still for it), build-time, load-time, total-time
    why                 why it switched over when it did, or gave up
    zero-copy           of pages sent by reference, if that was asked for: sends, copied, refused; see zerocopy.py
    digest              the sum over all pages that both sides agreed on, in hexadecimal

The parts of the downtime are measured where they happen, each by one clock; ``send`` is what the source's clock saw
and no part explains: frames on their way, and both sides' journals. ``one-way`` is half of what COMMIT and RUNNING
took to travel: so long before RUNNING arrived here did the guest already run there, and the guest's own blackout is
so much shorter than ``downtime``.
"""

from __future__ import annotations

from contextlib import suppress
from enum import StrEnum
from typing import Protocol

from ..config import PAGE_BYTES
from ..precopy.ledger import Downtime, RoundRecord
from ..precopy.progress import ProgressView
from ..record import dataclass, replace
from ..state.section import Value
from .checks import CheckResult
from .zerocopy import References


class Status(StrEnum):
    """QEMU's MigrationStatus, as far as it is reached here."""

    NONE = "none"
    SETUP = "setup"
    ACTIVE = "active"
    DEVICE = "device"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"
    COMMIT_UNKNOWN = "commit-unknown"
    """COMMIT was sent and its answer is out: the guest is paused here until the other side or the operator says."""


class Observer(Protocol):
    """Told what happens, from the thread that migrates: must return at once and raise nothing.

    Nothing is told during the blackout or right before it; what happened then is told when it is over.
    """

    def status(self, word: Status) -> None: ...

    def round_done(self, record: RoundRecord) -> None: ...

    def event(self, name: str, data: Value) -> None: ...


class Silence:
    """An observer that looks away."""

    def status(self, word: Status) -> None:
        return

    def round_done(self, record: RoundRecord) -> None:
        return

    def event(self, name: str, data: Value) -> None:
        return


class Telling:
    """Tells ``observer``, which may not decide over the guest by raising."""

    def __init__(self, observer: Observer | None) -> None:
        self._observer: Observer = observer if observer is not None else Silence()
        self._kept: RoundRecord | None = None

    def status(self, word: Status) -> None:
        with suppress(Exception):
            self._observer.status(word)

    def round_done(self, record: RoundRecord, *, later: bool) -> None:
        """``later``, by :meth:`rest`, when the guest is about to be paused: whoever hears of it wants a processor and
        the interpreter."""
        self._kept = record
        if not later:
            self.rest()

    def rest(self) -> None:
        """What was kept for later. Idempotent."""
        record, self._kept = self._kept, None
        if record is not None:
            with suppress(Exception):
                self._observer.round_done(record)


@dataclass(frozen=True, slots=True)
class MigrationResult:
    """A migration so far, or as it ended. Times in milliseconds."""

    status: Status = Status.NONE
    total_ms: float = 0.0
    setup_ms: float = 0.0
    downtime_ms: float = 0.0
    one_way_ms: float = 0.0
    expected_downtime_ms: float = 0.0
    why: str = ""
    error: str = ""
    rounds: tuple[RoundRecord, ...] = ()
    parts: Downtime | None = None
    fidelity: Value = None
    digest: int = 0
    view: ProgressView | None = None
    check: CheckResult | None = None
    zero_copy: References | None = None

    def require_fit(self, peer: str) -> None:
        """Raise :class:`MigrationError` unless the destination's host could hold the state that was tried there."""
        if self.check is not None:
            self.check.checked.require(peer)

    def to_value(self) -> dict[str, Value]:
        """The map of the module's docstring; keys that have no value yet are left out, as QEMU does."""
        value: dict[str, Value] = {"status": self.status.value}
        if self.status is Status.NONE:
            return value
        value |= {"total-time": round(self.total_ms), "setup-time": round(self.setup_ms)}
        if self.status in (Status.SETUP, Status.ACTIVE, Status.DEVICE):
            value["expected-downtime"] = round(self.expected_downtime_ms)
        if self.view is not None:
            value["ram"] = ram_value(self.view)
        if self.error:
            value["error-desc"] = self.error
        if self.parts is not None:
            value |= {
                "downtime": round(self.downtime_ms),
                "expected-downtime": round(self.expected_downtime_ms),
                "downtime-parts": self.parts.to_value()
                | {"total": round(self.downtime_ms, 3), "one-way": round(self.one_way_ms, 3)},
                "digest": f"{self.digest:016x}",
            }
        if self.check is not None:
            value["check"] = self.check.to_value()
        if self.zero_copy is not None:
            value["zero-copy"] = self.zero_copy.to_value()
        optional = {"why": self.why, "fidelity": self.fidelity, "rounds": [r.to_value() for r in self.rounds]}
        return value | {key: found for key, found in optional.items() if found}

    def at(self, view: ProgressView, rounds: tuple[RoundRecord, ...]) -> MigrationResult:
        """The same with the counters of now."""
        return replace(self, view=view, rounds=rounds, expected_downtime_ms=view.expected_downtime_ms)


def ram_value(view: ProgressView) -> dict[str, Value]:
    """QEMU's ``ram`` object."""
    return {
        "transferred": view.transferred_bytes,
        "remaining": view.remaining_bytes,
        "total": view.total_bytes,
        "duplicate": view.duplicate_pages,
        "normal": view.normal_pages,
        "normal-bytes": view.normal_pages * PAGE_BYTES,
        "dirty-pages-rate": round(view.writes_pages_s),
        "mbps": round(view.rate_bytes_s * 8 / 1e6, 3),
        "dirty-sync-count": view.dirty_sync_count,
        "page-size": PAGE_BYTES,
        "pages-per-second": round(view.pages_per_second),
        "fraction": round(view.fraction, 4),
        "eta": None if view.eta_ms is None else round(view.eta_ms),
    }
