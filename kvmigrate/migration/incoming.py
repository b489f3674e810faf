"""The stream of one source, frame by frame: the receiver's table of ``wire.py`` as code."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from enum import Enum

from ..config import PAGE_BYTES
from ..contract import Builder, Migratable, RunState
from ..errors import BadChecksum, BadField
from ..memory.prefault import Prefault
from ..state.fidelity import Fidelity
from ..state.frame import FrameKind
from ..state.section import Section
from . import wire
from .blackout import Stopwatch, quiet_interpreter
from .channel import Channel, Frame, unexpected
from .checks import CHECK
from .custody import Custody
from .delta import DELTA, Offer
from .further import Further
from .joining import CONNECTIONS, Join
from .pages import ANNOUNCED_PAGES, PAGES_DELTA, PAGES_ZSTD, Decompressor
from .trying import answer_check, read_description, take_check
from .warming import WarmUp

_COUNTED = ("data pages", "cleared pages", "pages that are not zero", "digest of the pages")


class State(Enum):
    """What is waited for; the value completes the sentence "a … frame may not come while …"."""

    GREETED = "waiting for CONFIG"
    BUILT = "waiting for CHECK"
    RECEIVING = "receiving pages"
    PART = "receiving the rest of the state"
    LOADED = "receiving the last pages"
    READY = "waiting for COMMIT"
    COMMITTED = "the guest runs here already"


class Incoming:
    """One guest on its way in over ``channel``, after both HELLOs.

    ``take_custody`` is called with nothing received yet and the machine built; what it returns decides over the guest.
    """

    def __init__(
        self,
        channel: Channel,
        hello: wire.Hello,
        builder: Builder,
        take_custody: Callable[[], Custody],
    ) -> None:
        self._channel = channel
        self._hello = hello
        self._builder = builder
        self._take_custody = take_custody
        self._decompressor = Decompressor()
        self._taken = Offer(())
        self._further = Further(channel, self._allowed_flags)
        self._quiet = ExitStack()
        self._warm_up = WarmUp(channel.abort)
        self._prefault: Prefault | None = None
        self._is_sparse = False
        self._build_ms = 0.0
        self._load_ms = 0.0
        self._spin = False
        self._autostart = True
        self.may_start = True
        self.state = State.GREETED
        self.rounds: list[wire.Round] = []
        self.fidelity = Fidelity()
        self.machine: Migratable | None = None
        self.custody: Custody | None = None

    def step(self) -> State:
        """Take one frame (or any number of uncompressed PAGES) and do what the table says.

        Raises :class:`UnexpectedFrame`, any other :class:`StreamError`, :class:`ChannelError`, :class:`PeerFailed` when
        the source gave up, and whatever the builder or the machine's load raise.
        """
        frame = self._next()
        if frame.kind == FrameKind.FAILED and self.state is not State.COMMITTED:
            raise wire.Failed.from_payload(frame.payload).to_error(self._channel.peer)
        step = STEPS.get((self.state, frame.kind))
        if step is None:
            raise unexpected(frame, self.state.value)
        self.state = step(self, frame)
        # The answer to what was said now is not far, and the guest may stand still meanwhile; pages come in their time.
        self._spin = frame.kind != FrameKind.PAGES
        return self.state

    def end_blackout(self) -> None:
        """Give the interpreter back its manners, and stop what else was under way. Idempotent."""
        self._quiet.close()
        self._warm_up.close()
        self._channel.apart.end()
        self._stop_prefault()
        self._further.stop()
        if self._is_sparse:
            self._is_sparse = False
            # What the guest touches from now on is its own matter.
            self._built().memory.want_huge(True)

    def join(self, channel: Channel, frame: Frame) -> None:
        """Take a further connection, which begins with JOIN; from any thread. Raises :class:`StreamError` and
        :class:`MigrationError` for one that does not belong here: it stays the caller's."""
        join = Join.from_payload(frame.payload)
        if CONNECTIONS not in self._hello.features or (join.uuid, join.epoch) != (self._hello.uuid, self._hello.epoch):
            raise BadField("JOIN: no such guest is on its way in here")
        # They may come on the heels of the answer that this side is still busy with.
        if self.state not in (State.GREETED, State.BUILT, State.RECEIVING):
            raise unexpected(frame, self.state.value)
        self._further.join(channel, join, self._built().memory)

    def received(self, counter: str) -> int:
        """A counter of ``struct kmig_incoming``, of all connections."""
        return int(getattr(self._channel.incoming, counter)) + self._further.count(counter)

    def _allowed_flags(self) -> int:
        zstd = PAGES_ZSTD if "zstd" in self._hello.features else 0
        return zstd | (PAGES_DELTA if DELTA in self._taken.features else 0)

    def _stop_prefault(self) -> None:
        if self._prefault is not None:
            self._prefault.stop()
            self._prefault = None

    def run_guest(self) -> None:
        """Let the guest run, or stay paused as it was at the source. Its custody must be committed."""
        if self._autostart:
            self._built().resume()
        else:
            self._built().pause(RunState.PAUSED)

    def _next(self) -> Frame:
        if self.state in (State.RECEIVING, State.LOADED):
            return self._channel.recv_pages(self._built().memory, spin=self._spin)
        return self._channel.recv(spin=self._spin)

    def _built(self) -> Migratable:
        assert self.machine is not None, "no state after GREETED is reached without a machine"
        return self.machine

    def _held(self) -> Custody:
        assert self.custody is not None, "no state after GREETED is reached without custody"
        return self.custody

    def _config(self, frame: Frame) -> State:
        watch = Stopwatch()
        self.machine = self._builder(read_description(frame, self._hello))
        self._build_ms = watch.lap()
        self.machine.rehearse()
        self.custody = self._take_custody()
        self._channel.send(FrameKind.ACCEPT, {})
        return State.BUILT if CHECK in self._hello.features else State.RECEIVING

    def _check(self, frame: Frame) -> State:
        check, sections = take_check(self._channel, frame)
        answer_check(self._channel, check, sections, self._built().trial(), self._build_ms)
        if check.resident_bytes < ANNOUNCED_PAGES * PAGE_BYTES:
            # A handful of pages, for each of which the host may have to find and clear 2 MiB.
            self._built().memory.want_huge(False)
            self._is_sparse = True
        # The source turns its dirty log on now: for a short round this time is not to be had again.
        self._warm_up.go(self._built())
        self._channel.apart.keep(self._hello.epoch + 1)
        return State.RECEIVING

    def _resident(self, frame: Frame) -> State:
        runs = wire.Resident.from_payload(frame.payload).runs
        memory = self._built().memory
        for gfn, nr_pages in runs:
            if not any(s.base_gfn <= gfn and gfn + nr_pages <= s.base_gfn + s.nr_pages for s in memory.slots):
                raise BadField(f"RESIDENT: {nr_pages} pages at gfn {gfn:#x} are not the guest's memory")
        self._stop_prefault()
        self._channel.apart.end()
        self._prefault = Prefault(memory, runs)
        self._channel.apart.keep(self._hello.epoch + 1)
        return self.state

    def _pages(self, frame: Frame) -> State:
        # Only those with flags come this far, with their table checked: C has written the others already.
        self._decompressor.apply(self._built().memory, self._channel, self._allowed_flags())
        return self.state

    def _offer(self, frame: Frame) -> State:
        if self._taken.features:
            raise unexpected(frame, "it was answered before")
        self._taken = Offer.from_payload(frame.payload).known()
        self._channel.send_payloads([(FrameKind.OFFER, self._taken.to_payload())], mandatory=False)
        return self.state

    def _round(self, frame: Frame) -> State:
        round_ = wire.Round.from_payload(frame.payload)
        if not round_.sections:
            self.rounds.append(round_)
            self._channel.apart.keep(self._hello.epoch + 1)
            # Left first, so that garbage is collected once in a round.
            self._quiet.close()
            self._quiet.enter_context(quiet_interpreter())
            self._warm_up.go(self._built())
            self._arrived()
            self._held().rehearse()
            # All of the round has been received: the source waits for this before it pauses the guest.
            self._channel.send_payloads([(FrameKind.ROUND, frame.payload)])
            # Once more while it pauses and saves the guest, if that was the last round. The first time is the slow one,
            # and no guest waits for it.
            self._warm_up.now(self._built(), self._channel.pending)
            return State.RECEIVING
        self._stop_prefault()
        return self._take_state(round_)

    def _rest(self, frame: Frame) -> State:
        round_ = wire.Round.from_payload(frame.payload)
        if not round_.sections or round_.more:
            raise BadField("ROUND: what comes after the first part of the state is the second one, and the last")
        return self._take_state(round_)

    def _take_state(self, round_: wire.Round) -> State:
        sections = self._channel.recv_sections(round_.sections, round_.sections_bytes)
        if round_.more:
            self._load(sections, more=True)
            return State.PART
        self._load(sections)
        self._further.loaded()
        return State.LOADED

    def _load(self, sections: list[Section], *, more: bool = False) -> None:
        watch = Stopwatch()
        self.fidelity = self._built().load(sections, more=more)
        self.fidelity.require()
        self._load_ms += watch.lap()

    def _end(self, frame: Frame) -> State:
        watch = Stopwatch()
        end = wire.End.from_payload(frame.payload)
        self._further.finish(end.further)
        arrived, sent = self._arrived(), (end.pages, end.cleared, end.nr_hashed, end.digest)
        for what, here, there in zip(_COUNTED, arrived, sent, strict=True):
            if here != there:
                raise BadChecksum(f"{what}: {here} arrived, the source says {there}: RAM was damaged on its way")
        self._autostart = end.autostart and self.may_start
        _, _, nr_hashed, digest = arrived
        ready = wire.Ready(digest, nr_hashed, self._load_ms, watch.lap())
        # The state comes first: should the send fail half-way, the source may have read it and answer by COMMIT.
        self.state = State.READY
        self._channel.send_payloads([(FrameKind.READY, ready.to_payload())])
        return State.READY

    def _arrived(self) -> tuple[int, int, int, int]:
        """What :data:`_COUNTED` says, as it is here."""
        memory = self._built().memory
        return self.received("pages_received"), self.received("pages_cleared"), memory.nr_hashed, memory.digest

    def _commit(self, frame: Frame) -> State:
        watch = Stopwatch()
        epoch = wire.commit_epoch(frame.payload)
        if epoch != self._hello.epoch:
            raise BadField(f"COMMIT: field 'epoch' is {epoch}, this attempt is {self._hello.epoch}")
        # Journal, then run, then tell: the source may believe nothing that a crash here could make untrue.
        custody = self._held()
        custody.commit()
        self.state = State.COMMITTED
        journal_ms = watch.lap()
        self.run_guest()
        resume_ms = watch.lap()
        custody.ran()
        running = wire.Running(journal_ms, resume_ms, watch.total(), self.fidelity.to_value())
        self._channel.send_payloads([(FrameKind.RUNNING, running.to_payload())])
        return State.COMMITTED


STEPS: Mapping[tuple[State, int], Callable[[Incoming, Frame], State]] = {
    (State.GREETED, FrameKind.CONFIG): Incoming._config,
    (State.BUILT, FrameKind.CHECK): Incoming._check,
    (State.RECEIVING, FrameKind.RESIDENT): Incoming._resident,
    (State.RECEIVING, FrameKind.OFFER): Incoming._offer,
    (State.RECEIVING, FrameKind.PAGES): Incoming._pages,
    (State.RECEIVING, FrameKind.ROUND): Incoming._round,
    (State.PART, FrameKind.ROUND): Incoming._rest,
    (State.LOADED, FrameKind.PAGES): Incoming._pages,
    (State.LOADED, FrameKind.END): Incoming._end,
    (State.READY, FrameKind.COMMIT): Incoming._commit,
}


def greet(channel: Channel, frame: Frame, name: str) -> wire.Hello:
    """Answer the source's HELLO. Raises :class:`BadVersion` for a stream that this program does not read."""
    hello = wire.Hello.from_payload(frame.payload)
    back = wire.Hello(wire.FORMAT, hello.features, hello.uuid, hello.epoch, name)
    channel.send_payloads([(FrameKind.HELLO, back.to_payload())])
    return hello
