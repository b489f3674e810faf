"""The source's half of the blackout: from the request to pause until the destination says that the guest runs there."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..config import MigrationParameters
from ..contract import Migratable, RunState
from ..errors import BadChecksum, MigrationError, PeerTimeout
from ..precopy.ledger import Downtime
from ..precopy.rounds import PreCopy
from ..record import dataclass, replace
from ..state.frame import HEADER, FrameKind
from ..state.section import Section, encode, pack
from . import wire
from .blackout import Stopwatch
from .channel import Channel, expect, unexpected
from .sink import StreamSink
from .status import MigrationResult
from .watchdog import Watchdog

ENDED = (RunState.SHUTDOWN, RunState.INTERNAL_ERROR)


@dataclass(frozen=True, slots=True)
class Switched:
    """Everything is at the destination, and checked. ``watch`` runs since the request to pause; times in ms."""

    watch: Stopwatch
    stop: float
    state: float
    last_pages: float
    until_ready: float
    """From the last page sent to READY received."""
    ready: wire.Ready
    digest: int


@dataclass(frozen=True, slots=True)
class HandedOver:
    """The destination's answer to COMMIT, and what the blackout took. ``to_running`` from COMMIT sent, in ms."""

    running: wire.Running
    to_running: float
    total: float


def bound_switch_over(watchdog: Watchdog, channel: Channel, parameters: MigrationParameters) -> None:
    """A switch-over that takes too long comes to an end, unless COMMIT may have been sent."""
    bound_ms = max(parameters.timeout_ms, 2 * parameters.downtime_limit_ms)
    late = PeerTimeout(f"{channel.peer} took over {bound_ms / 1e3:g} s to take the paused guest over")
    watchdog.bound(bound_ms, late)


def switch_over(
    machine: Migratable,
    channel: Channel,
    precopy: PreCopy,
    sink: StreamSink,
    *,
    autostart: bool,
    meanwhile: Callable[[], None],
) -> Switched:
    """Pause, save, send what is left, and wait until the destination has loaded and compared it; do ``meanwhile`` what
    comes before :func:`commit`.

    Raises :class:`MigrationError` when the guest has ended by itself, :class:`PeerFailed` when the destination refuses.
    """
    watch = Stopwatch()
    machine.pause(RunState.FINISH_MIGRATE)
    stop = watch.lap()
    refuse_ended(machine)
    # The state goes first, so that the destination loads it while the last pages travel; and of that what the kernel
    # keeps, whose load takes longest, while the devices are saved.
    parts = machine.save_parts()
    for more in (True, False):
        send_state(channel, next(parts), len(precopy.records), sink.pages_sent, more=more)
    state = watch.lap()
    # Saving may write guest memory (a device completes what is under way): the last sync comes after it.
    precopy.last_round()
    last_pages = watch.lap()
    memory = machine.memory
    end = wire.End(sink.pages_sent, sink.pages_cleared, memory.digest, memory.nr_hashed, autostart, sink.nr_last)
    channel.send_payloads([(FrameKind.END, end.to_payload())])
    meanwhile()
    ready = wire.Ready.from_payload(expect(channel, FrameKind.READY, spin=True).payload)
    if (ready.digest, ready.nr_hashed) != (end.digest, end.nr_hashed):
        raise BadChecksum(f"{channel.peer} holds other pages than were sent ({ready.digest:#x}, here {end.digest:#x})")
    return Switched(watch, stop, state, last_pages, watch.lap(), ready, end.digest)


def send_state(channel: Channel, part: Sequence[Section], number: int, pages_sent: int, *, more: bool) -> None:
    """One part of the guest's state, announced by a ROUND of that number; whether there is ``more``."""
    frames = [(FrameKind.SECTION, encode(section)) for section in part]
    size_bytes = sum(HEADER.size + len(payload) for _, payload in frames)
    round_ = wire.Round(number, pages_sent, 0, 0, len(frames), size_bytes, more)
    channel.send_payloads([(FrameKind.ROUND, round_.to_payload()), *frames])


def commit(channel: Channel, epoch: int, watch: Stopwatch) -> HandedOver | wire.Answer:
    """Send COMMIT and wait for its answer. Whatever this raises, the guest may run at the destination."""
    watch.lap()
    channel.send_payloads([(FrameKind.COMMIT, wire.commit_payload(epoch))])
    # Asleep, not looking again and again: on one host the guest may want this processor now.
    frame = channel.recv()
    if frame.kind == FrameKind.RUNNING:
        to_running, total = watch.lap(), watch.total()
        # It goes on at this processor, as a rule, since the destination is busy on the other one: what is left to be
        # done here, which takes longer than all of the blackout, is done beside that.
        channel.apart.keep(epoch + 1)
        return HandedOver(wire.Running.from_payload(frame.payload), to_running, total)
    if frame.kind == FrameKind.ANSWER:
        return wire.Answer.from_payload(frame.payload)
    raise unexpected(frame, "waiting for RUNNING")


def say_done(channel: Channel) -> None:
    """The decision has arrived: the other side may forget it."""
    channel.send_payloads([(FrameKind.DONE, pack({}))])


def refuse_ended(machine: Migratable) -> None:
    """Raise :class:`MigrationError` when the guest has ended by itself: there is nothing to move any more."""
    if machine.runstate in ENDED:
        raise MigrationError(f"the guest ended ({machine.runstate.value}) while it was being migrated")


def measured(
    result: MigrationResult, precopy: PreCopy | None, switched: Switched, handed_over: HandedOver | None
) -> MigrationResult:
    """``result`` with what is known after the end; without ``handed_over`` only that it went over."""
    result = replace(result, digest=switched.digest, error="")
    if handed_over is not None:
        result = replace(
            result,
            downtime_ms=handed_over.total,
            one_way_ms=one_way_ms(handed_over),
            parts=downtime_parts(switched, handed_over),
            fidelity=handed_over.running.fidelity,
        )
    if precopy is None:
        return result
    precopy.progress.finish()
    expected_ms = result.expected_downtime_ms
    result = result.at(precopy.progress.view(), precopy.progress.records)
    return replace(result, expected_downtime_ms=expected_ms)


def downtime_parts(switched: Switched, handed_over: HandedOver) -> Downtime:
    """The blackout in parts that sum up to the total of the source's clock; see :class:`Downtime`."""
    load = min(switched.ready.load_ms, switched.until_ready)
    resume = min(handed_over.running.resume_ms, handed_over.to_running)
    explained = switched.stop + switched.state + switched.last_pages + load + resume
    return Downtime(
        stop=switched.stop,
        last_pages=switched.last_pages,
        state=switched.state,
        send=max(handed_over.total - explained, 0.0),
        load=load,
        resume=resume,
    )


def one_way_ms(handed_over: HandedOver) -> float:
    """Half of what COMMIT and RUNNING took to travel."""
    return max(handed_over.to_running - handed_over.running.total_ms, 0.0) / 2
