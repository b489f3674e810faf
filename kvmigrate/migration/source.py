"""The sending side: pre-copy, the switch, and the handover after which the guest is never resumed here by itself.

::

    Source(machine, address, parameters, journal_dir).run()

Whatever fails before COMMIT (the destination, the link, the operator's cancel, this host) leaves the guest as it was:
running if it ran, logging off, nothing pending, free to be migrated again at once.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from ..config import Address, MigrationParameters
from ..contract import Migratable, RunState
from ..errors import (
    Cancelled,
    ChannelError,
    ConfigError,
    HostError,
    KvmigrateError,
    PeerFailed,
    StateError,
    StreamError,
)
from ..precopy.converge import Action, Decision, Limits
from ..precopy.ledger import RoundRecord
from ..precopy.rounds import PreCopy
from ..record import replace
from ..state.frame import FrameKind
from . import wire
from .abort import Abort
from .asking import DECIDED, Resolved, ask_until_decided
from .blackout import quiet_interpreter
from .channel import Channel, expect
from .checker import Sample, ask_check, await_machine, introduce, require_movable
from .checks import CHECK
from .handover import (
    ENDED,
    HandedOver,
    Switched,
    bound_switch_over,
    commit,
    measured,
    refuse_ended,
    say_done,
    switch_over,
)
from .joining import CONNECTIONS, dial, open_further
from .journal import Entry, Journal, Record, Role
from .pages import announce_resident
from .parting import part, reason_of
from .sink import StreamSink
from .status import MigrationResult, Observer, Status, Telling
from .warming import WarmUp
from .watchdog import Watchdog
from .zerocopy import References, require_possible

DISKS_FREE_S = 2.0
"""How long a guest that goes on here waits for its destination to let the disks go."""


class Source:
    """One outgoing migration of ``machine``; used once. Other threads may call :meth:`cancel`, :meth:`resolve` and
    :meth:`query` at any time.

    ``ask_for_ms`` bounds how long a destination is asked who owns the guest when the answer to COMMIT is lost (None:
    until it says, or the operator does).
    """

    def __init__(
        self,
        machine: Migratable,
        address: Address,
        parameters: MigrationParameters,
        journal_dir: Path,
        observer: Observer | None = None,
        *,
        ask_for_ms: float | None = None,
    ) -> None:
        self._machine = machine
        self._address = address
        self._parameters = parameters
        self._telling = Telling(observer)
        self._ask_for_ms = ask_for_ms
        self._config = dict(machine.describe())
        self._query = wire.Query(str(self._config["uuid"]), time.time_ns())
        self._name = str(self._config["name"])
        self._journal = Journal(journal_dir, self._name)
        self._abort = Abort()
        self._resolution = Abort()
        self._channel: Channel | None = None
        self._sink: StreamSink | None = None
        self._precopy: PreCopy | None = None
        self._result = MigrationResult()
        self._warm_up = WarmUp(self._abort)
        self._watchdog = Watchdog(self._abort)
        self._begin_ns = time.monotonic_ns()
        self._nr_resident = 0
        self._autostart = False
        self._pausing = False
        self._committed = False

    def run(self) -> MigrationResult:
        """Migrate. Returns when the guest runs at the destination.

        Raises :class:`NotConverged`, :class:`Cancelled`, :class:`PeerFailed`, :class:`MigrationError`,
        :class:`ChannelError`, :class:`StreamError`, :class:`HostError` or :class:`StateError` with the guest as it was
        before; and :class:`CommitUnknown`, with the guest paused here, only when ``ask_for_ms`` has passed.
        """
        try:
            with self._rollback():
                channel = self._setup()
                precopy, sink = self._copy(channel)
                bound_switch_over(self._watchdog, channel, self._parameters)
                with quiet_interpreter():
                    switched = self._switch_over(channel, precopy, sink)
                    answer = self._commit(channel, switched)
            return self._conclude(switched, answer)
        finally:
            self._close()

    def cancel(self, reason: KvmigrateError | None = None) -> None:
        """Stop the migration, for ``reason`` or because the operator wants it; the guest goes on here. Raises
        :class:`StateError` once COMMIT may have been sent."""
        if not self._abort.fire(reason or Cancelled("cancelled by the operator: the guest runs on here")):
            raise StateError("handed over (COMMIT was sent)", "still owned by this side")
        if self._result.status in (Status.SETUP, Status.ACTIVE, Status.DEVICE):
            self._result = replace(self._result, status=Status.CANCELLING)

    def resolve(self, *, run_here: bool) -> None:
        """The operator's word on a guest that is ``commit-unknown``: it runs here (it does not and never will at the
        destination), or it is given up here. Raises :class:`StateError` when nothing is in doubt."""
        if self._result.status is not Status.COMMIT_UNKNOWN or not self._resolution.fire(Resolved(run_here)):
            raise StateError(f"not in doubt (migration {self._result.status.value})", "commit-unknown")

    def query(self) -> MigrationResult:
        """How far it is, or how it ended. From any thread."""
        result, precopy = self._result, self._precopy
        if result.status in (Status.SETUP, Status.ACTIVE, Status.DEVICE, Status.CANCELLING, Status.COMMIT_UNKNOWN):
            result = replace(result, total_ms=self._elapsed_ms())
        if precopy is None or result.parts is not None:
            return result
        return result.at(precopy.progress.view(), precopy.progress.records)

    def _setup(self) -> Channel:
        """Connect, agree on the version, and have the destination build the machine and try the state."""
        self._enter(Status.SETUP)
        self._watchdog.start()
        require_movable(self._machine)
        require_possible(self._address, self._parameters)
        self._channel = channel = dial(self._address, self._abort, self._parameters.timeout_ms)
        uuid, epoch = self._query.uuid, self._query.epoch
        hello = wire.Hello(wire.FORMAT, tuple(self._features()), uuid, epoch, self._name)
        introduce(channel, hello, self._config)
        self._machine.rehearse()
        # While the destination builds the machine.
        sample = Sample.take(self._machine)
        self._journal.stage(self._record())
        await_machine(channel, hello, self._machine.memory.size_bytes)
        self._nr_resident = sum(nr_pages for _, nr_pages in sample.resident)
        announce = partial(announce_resident, channel, sample.resident)
        self._result = replace(self._result, check=ask_check(channel, self._machine, sample, announce))
        self._result.require_fit(channel.peer)
        return channel

    def _features(self) -> Iterator[str]:
        yield CHECK
        yield wire.PARTS
        if self._parameters.compression.may_pack:
            yield "zstd"
        if self._parameters.connections != 1:
            yield CONNECTIONS

    def _open_sink(self, channel: Channel) -> StreamSink:
        parameters, query = self._parameters, self._query
        nr_connections = parameters.connections_for(self._nr_resident)
        further = open_further(channel, self._address, query.uuid, query.epoch, nr_connections)
        packing = parameters.compression, parameters.delta_cache_bytes
        self._sink = StreamSink([channel, *further], *packing, meanwhile=partial(self._get_ready, channel))
        self._sink.spare_copies(zero_copy=parameters.zero_copy)
        return self._sink

    def _copy(self, channel: Channel) -> tuple[PreCopy, StreamSink]:
        """Rounds while the guest runs, until the decision to switch."""
        parameters = self._parameters
        sink = self._open_sink(channel)
        limits = Limits(parameters.downtime_limit_ms, parameters.max_rounds, parameters.bandwidth_bytes_s)
        precopy = PreCopy(
            self._machine.memory,
            self._machine.dirty_log,
            sink,
            limits,
            abort_fd=self._abort.fd,
            timeout_ms=parameters.timeout_ms,
            observe=self._after_round,
        )
        self._precopy = precopy
        self._result = replace(self._result, setup_ms=self._elapsed_ms())
        self._enter(Status.ACTIVE)
        decision = precopy.run()
        self._result = replace(self._result, why=decision.why, expected_downtime_ms=decision.expected_downtime_ms)
        return precopy, sink

    def _get_ready(self, channel: Channel) -> None:
        """For the blackout, while the destination does the same."""
        channel.apart.keep(self._query.epoch)
        self._warm_up.go(self._machine)
        self._journal.rehearse()

    def _after_round(self, record: RoundRecord, decision: Decision) -> None:
        self._result = replace(self._result, why=decision.why, zero_copy=self._references())
        self._telling.round_done(record, later=decision.action is Action.SWITCH)
        self._abort.check()
        refuse_ended(self._machine)
        if self._channel is not None and self._channel.pending():
            expect(self._channel, FrameKind.FAILED)

    def _references(self) -> References | None:
        return self._sink.references() if self._sink is not None else None

    def _switch_over(self, channel: Channel, precopy: PreCopy, sink: StreamSink) -> Switched:
        self._autostart = self._machine.runstate is RunState.RUNNING
        self._result = replace(self._result, status=Status.DEVICE)
        self._abort.check()
        self._pausing = True
        # In the journal before COMMIT is on the wire: a process that dies in between leaves a doubt, never two guests.
        # And while the destination loads, not between READY and COMMIT, where the guest would wait for it.
        publish = self._journal.publish
        return switch_over(self._machine, channel, precopy, sink, autostart=self._autostart, meanwhile=publish)

    def _commit(self, channel: Channel, switched: Switched) -> HandedOver | wire.Answer | None:
        """There is no way back by ourselves. None: no answer that says who owns the guest."""
        # The operator's cancel is either seen here or refused from here on; it cannot fall between.
        self._abort.disarm()
        self._committed = True
        channel.abort = self._resolution
        try:
            return commit(channel, self._query.epoch, switched.watch)
        except (ChannelError, StreamError):
            return None

    def _conclude(self, switched: Switched, answer: HandedOver | wire.Answer | None) -> MigrationResult:
        if isinstance(answer, HandedOver):
            return self._complete(switched, answer)
        if answer is None or answer.state not in DECIDED:
            answer = self._ask_until_decided()
        elif self._channel is not None:
            with suppress(ChannelError):
                say_done(self._channel)
        if answer.state is wire.Ownership.RUNNING:
            return self._complete(switched, None)
        raise self._taken_back(answer.text)

    def _ask_until_decided(self) -> wire.Answer:
        """Ask over new connections until the destination or the operator decides."""
        self._enter(Status.COMMIT_UNKNOWN)
        if self._channel is not None:
            self._channel.close()

        def note(news: str) -> str:
            doubt = (
                f"the guest may run at {self._address} and stays paused here: {news}; see there, then "
                f"`kvmigrate resolve {self._name} --run` or `--discard`"
            )
            self._result = replace(self._result, error=doubt)
            return doubt

        asked = (self._address, self._query, self._resolution, self._parameters.timeout_ms)
        return ask_until_decided(*asked, give_up_ms=self._ask_for_ms, note=note)

    def _complete(self, switched: Switched, handed_over: HandedOver | None) -> MigrationResult:
        """The guest is the destination's."""
        if handed_over is not None and self._channel is not None:
            with suppress(ChannelError):
                say_done(self._channel)
        self._machine.pause(RunState.POSTMIGRATE)
        result = replace(self._result, total_ms=self._elapsed_ms(), zero_copy=self._references())
        self._result = measured(result, self._precopy, switched, handed_over)
        self._telling.rest()
        self._telling.status(Status.DEVICE)
        self._enter(Status.COMPLETED)
        self._journal.remove()
        self._stop_log()
        return self._result

    def _taken_back(self, text: str) -> BaseException:
        """The destination gave it up after COMMIT was sent, and has that in its journal: the guest is ours again."""
        self._committed = False
        self._journal.remove()
        return self._undo(
            PeerFailed(f"{self._address} gave the guest up before it ran there ({text}): it goes on here")
        )

    @contextmanager
    def _rollback(self) -> Iterator[None]:
        """Undo everything, unless COMMIT was sent: resume first, for the guest waits."""
        try:
            yield
        except BaseException as error:
            if self._committed:
                raise
            reason = self._undo(error)
            if reason is not error:
                raise reason from error
            raise

    def _undo(self, error: BaseException) -> BaseException:
        """The guest as it was before, resumed before anything else, for it waits. Returns the reason to report."""
        waits_for_disks = False
        if self._channel is not None:
            self._channel.apart.end()
        try:
            self._resume()
        except ConfigError:
            # The destination has locked them for itself, and hears only below that the guest stays here.
            waits_for_disks = True
        finally:
            reason = reason_of(error, self._channel, self._resolution)
            part(self._channel, reason)
            self._stop_log()
            self._journal.withdraw()
            self._fail(reason)
        if waits_for_disks:
            self._resume_when_free()
        return reason

    def _resume_when_free(self) -> None:
        """Resume once the destination has let the disks go. Raises :class:`ConfigError` when it does not: the guest
        stays paused, since it may not write beside another."""
        deadline = time.monotonic() + DISKS_FREE_S
        while True:
            self._pausing = True
            try:
                return self._resume()
            except ConfigError:
                if time.monotonic() > deadline:
                    raise
            time.sleep(0.01)

    def _resume(self) -> None:
        if not self._pausing or self._machine.runstate in ENDED:
            return
        self._pausing = False
        if self._autostart:
            self._machine.resume()
        else:
            self._machine.pause(RunState.PAUSED)

    def _fail(self, error: BaseException) -> None:
        self._telling.rest()
        self._result = replace(self.query(), error=wire.Failed.of(error).text, total_ms=self._elapsed_ms(), parts=None)
        self._enter(Status.CANCELLED if isinstance(error, Cancelled) else Status.FAILED)

    def _stop_log(self) -> None:
        # Not in the blackout: it takes the kernel a while. Should it fail, the next start of the log says so.
        if self._precopy is not None:
            with suppress(HostError):
                self._precopy.stop()

    def _enter(self, status: Status) -> None:
        self._result = replace(self._result, status=status)
        self._telling.status(status)

    def _record(self) -> Record:
        query = self._query
        return Record(
            self._name, query.uuid, query.epoch, Role.SOURCE, Entry.COMMITTED, str(self._address), os.getpid()
        )

    def _elapsed_ms(self) -> float:
        return (time.monotonic_ns() - self._begin_ns) / 1e6

    def _close(self) -> None:
        if self._sink is not None:
            self._sink.close()
        if self._channel is not None:
            self._channel.apart.end()
            self._channel.close()
        self._warm_up.close()
        self._watchdog.close()
        self._abort.close()
        self._resolution.close()
