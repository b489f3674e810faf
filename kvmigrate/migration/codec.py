"""Which bytes suit the link: raw pages or zstd at a level, by what link and compressor were measured to carry.

::

    link      bytes per second, of the newest parts of a round that kept the socket busy: what left the socket's
              buffer in them over the time they took. The best of NEWEST: a stall is no slow link. Never above the cap.
    ratio     bytes after compression per byte of pages
    packer    bytes of pages that one thread compresses per second, with everything else that runs here
    speed     bytes of pages per second: link for raw ones; for zstd min(link / ratio, packer), since the link goes on
              sending while the next pages are compressed. On a host with one core neither has it for itself: the times
              of both are added.
    gain      speed / link

ratio and packer come from a sample of the pages still to be sent (csrc/sample.c), and once zstd is in use from the
pages that it compressed, packer as the faster of the two newest parts; the figures of a level that is not in use follow
those of the one that is. A sample is timed by its own processor's clock, so a level begins with a small part, a trial.
A link of FAST_LINK or more is not worth a sample.

The rule. The level is changed for one that is CHANGE times as fast; zstd is begun with at a gain of ENTER and given up
below LEAVE. Between them it stays as it is. While the compressor itself is the limit, so that the socket's buffer runs
empty, nothing is seen of the link: then now and again a few pages go raw, to look; the longer it has been so, the
seldomer.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from ..precopy.converge import show_rate
from ..precopy.rounds import Round
from ..record import dataclass

FAST_LINK = 1.25e9
LEVELS = (1, 3)
"""More is no smaller on what RAM holds (measured: level 6 saves another 0 to 2 % at a third of the speed)."""
ENTER, LEAVE, CHANGE = 1.2, 1.05, 1.1
ALMOST = 0.95
NO_LIMIT = 2**64 - 1
LOOK = 2048, 20_000_000
RAW_PART = 16384, 100_000_000
PACKED_PART = 16384, 250_000_000
TRIAL = 1024, 250_000_000
"""How often the choice is looked at again: pages, or nanoseconds."""
AGAIN_S = 1.0
"""How long a sample counts; doubled each time that its promise was not kept."""
FIRST_LOOK_S, LAST_LOOK_S = 0.25, 8.0
"""How long the compressor may be the limit before the link is looked at: doubled with each look in vain."""
NEWEST, ENOUGH = 4, 3
"""How many rates of the link are remembered, and from how many on they count."""
NOTED_BYTES = 256 << 10
"""The least that must have left the socket for a rate to be worth noting."""
PACKED_BYTES = 1 << 20
"""The least that must have been compressed for its ratio to be worth noting."""
BOUND, EMPTY_BYTES = 0.8, 64 << 10
"""The compressor is the limit when it takes more than this part of the time and leaves no more to be sent."""


@dataclass(frozen=True, slots=True)
class Sample:
    """What a level of zstd made of some pages: ``ratio`` and ``packer`` of the module's docstring."""

    ratio: float
    packer: float

    def speed(self, link: float, cores: int) -> float:
        """Bytes of pages per second over ``link``."""
        send, work = self.ratio / link, 1 / self.packer
        return 1 / (max(send, work) if cores > 1 else send + work)


@dataclass(frozen=True, slots=True)
class Choice:
    """zstd at ``level``, or raw pages for None; ``why`` is in words with numbers."""

    level: int | None
    why: str

    def __str__(self) -> str:
        return "none" if self.level is None else f"zstd:{self.level}"


@dataclass(frozen=True, slots=True)
class Part:
    """The next part of a round: how it goes, and where it ends so that the next one can go another way."""

    choice: Choice
    most_pages: int = NO_LIMIT
    most_ns: int = NO_LIMIT


@dataclass(frozen=True, slots=True)
class Sent:
    """What a part did. ``left_bytes`` left the socket's buffer in it, ``queued_bytes`` are still in there; the times do
    not overlap."""

    page_bytes: int
    out_bytes: int
    left_bytes: int
    queued_bytes: int
    busy_s: float
    work_s: float


def choose(now: int | None, link: float, samples: Mapping[int, Sample], cores: int, name: str = "link") -> Choice:
    """The rule of the module's docstring. Pure; ``link`` is over 0, ``name`` says where it comes from."""
    says = f"{name} {show_rate(link)}"
    if not samples:
        fast = link >= FAST_LINK
        return Choice(None, f"{says}: {'faster than a compressor' if fast else 'too few pages for a sample'}")
    best = now if now is not None and now in samples else min(samples)
    for level in sorted(samples):
        if samples[level].speed(link, cores) > CHANGE * samples[best].speed(link, cores):
            best = level
    found = samples[best]
    gain = found.speed(link, cores) / link
    level_now = best if gain >= (ENTER if now is None else LEAVE) else None
    return Choice(
        level_now, f"{says}, zstd:{best} leaves {found.ratio:.0%} at {show_rate(found.packer)}: {gain:.2f} × raw"
    )


class Fixed:
    """What the operator chose, for all rounds."""

    def __init__(self, level: int | None) -> None:
        self.delta = False
        self._part = Part(Choice(level, "as asked for"))

    def next(self, round_: Round, sample: Callable[[int], Sample | None]) -> Part:
        """The whole round in one part."""
        return self._part

    def sent(self, round_: Round, part: Part, did: Sent) -> None:
        """Nothing changes the choice."""


class Auto:
    """Chooses part by part. ``clock`` in seconds, for tests."""

    def __init__(self, cores: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.delta = False
        """Whether pages that are sent again can go as what changed in them."""
        self._cores = cores
        self._clock = clock
        self._choice = Choice(None, "nothing measured yet")
        self._samples: dict[int, Sample] = {}
        self._packers: dict[int, float] = {}
        self._rates: list[float] = []
        self._sampled_at = self._looked_at = float("-inf")
        self._look_after = FIRST_LOOK_S
        self._again_s = AGAIN_S
        self._bound = False

    def next(self, round_: Round, sample: Callable[[int], Sample | None]) -> Part:
        """How the next part of ``round_`` goes; ``sample`` tries a level on some of the pages still to be sent."""
        if round_.last:
            # In the blackout nothing is tried out.
            return Part(self._choice)
        link, name = self._link(round_.bandwidth_bytes_s)
        if not link or (name == "link" and len(self._rates) < ENOUGH):
            return Part(self._choice, *LOOK)
        now = self._clock()
        if self._bound and name == "link" and now - self._looked_at > self._look_after:
            self._look_after = min(2 * self._look_after, LAST_LOOK_S)
            return Part(Choice(None, "to see what the link carries"), *LOOK)
        level = self._choice.level
        if level is None:
            self._take_samples(link, now, sample)
            self._looked_at, self._look_after = now, FIRST_LOOK_S
        # Until a level has shown what it does under this host's load, it has to win anew.
        proven = level if level in self._packers else None
        choice = self._with_delta(round_, choose(proven, link, self._samples, self._cores, name), link)
        if choice.level is None and level is not None:
            self._again_s = min(2 * self._again_s, LAST_LOOK_S)
            self._packers.clear()
        self._choice = choice
        if choice.level is None:
            return Part(choice, *RAW_PART)
        return Part(choice, *(PACKED_PART if choice.level in self._packers else TRIAL))

    def _with_delta(self, round_: Round, choice: Choice, link: float) -> Choice:
        """Pages that do not shrink may still change little from round to round: try it where it loses next to nothing.
        It takes a round to fill the cache and another one to see."""
        if choice.level is not None or not self.delta or round_.number == 0 or not self._samples:
            return choice
        level = min(self._samples)
        if self._samples[level].speed(link, self._cores) < ALMOST * link:
            return choice
        return Choice(level, f"{choice.why}, to see whether pages change little")

    def sent(self, round_: Round, part: Part, did: Sent) -> None:
        """A part is over: what it tells of the link and the compressor."""
        if self.delta and part.choice.level is not None and did.page_bytes >= PACKED_BYTES and round_.number > 1:
            # Now the cache has had its chance.
            self.delta = did.out_bytes < did.page_bytes / LEAVE
        busy_s = did.busy_s + (did.work_s if part.choice.level is not None else 0.0)
        if part.choice.level is None:
            self._bound, self._looked_at = False, self._clock()
        else:
            self._bound = did.work_s > BOUND * busy_s and did.queued_bytes < EMPTY_BYTES
            self._note_packer(part.choice.level, did)
        if did.left_bytes < NOTED_BYTES or busy_s <= 0:
            return
        rate = did.left_bytes / busy_s
        # With the compressor as the limit this is the least that the link carries.
        if not self._bound or rate > max(self._rates, default=0.0):
            self._rates = [*self._rates, rate][-NEWEST:]

    def _note_packer(self, level: int, did: Sent) -> None:
        if did.page_bytes < PACKED_BYTES or did.work_s <= 0:
            return
        packer = did.page_bytes / did.work_s
        newest = max(packer, self._packers.get(level, 0.0))
        ratio = min(did.out_bytes / did.page_bytes, 1.0)
        before = self._samples.get(level, Sample(ratio, newest))
        for other, found in self._samples.items():
            slower = newest / before.packer
            self._samples[other] = Sample(min(found.ratio * ratio / before.ratio, 1.0), found.packer * slower)
        if level in self._packers:
            self._again_s = AGAIN_S
        self._packers[level] = packer
        self._samples[level] = Sample(ratio, newest)

    def _link(self, cap: int) -> tuple[float, str]:
        measured = max(self._rates, default=0.0)
        return (cap, "cap") if cap and (cap < measured or not measured) else (measured, "link")

    def _take_samples(self, link: float, now: float, sample: Callable[[int], Sample | None]) -> None:
        if link >= FAST_LINK or now - self._sampled_at < self._again_s:
            return
        self._sampled_at = now
        for level in LEVELS:
            found = sample(level)
            if found is None:
                return
            if level == LEVELS[0]:
                self._samples = {}
            self._samples[level] = found
            # The next level takes about twice the time: only where there is time.
            if found.packer * found.ratio < 2 * link:
                return
