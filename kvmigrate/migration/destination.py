"""The receiving side: wait for a source, receive, and run the guest once the source has given it up by COMMIT.

A guest that arrived is never run twice and never run in doubt: :class:`Custody` decides, once, and the listening socket
goes on answering who owns it until the source has said that it knows.
"""

from __future__ import annotations

import os
import threading
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

from ..contract import Builder, Examiner, Migratable
from ..errors import Cancelled, ChannelError, KvmigrateError, PeerFailed, StateError
from ..record import dataclass
from ..state.fidelity import Fidelity
from ..state.frame import FrameKind
from ..state.section import Value
from . import wire
from .abort import Abort
from .address import Listener
from .answering import Answering, send_answer
from .channel import Channel, Frame, unexpected
from .checks import ONLY
from .custody import Custody, answer_of
from .incoming import Incoming, State, greet
from .journal import Entry, Journal, Record, Role
from .status import Observer, Status, Telling
from .trying import serve_check

IN_DOUBT_MS = 30_000.0
"""How long a destination that lost its source after READY waits to be asked, before it ends by itself."""
DONE_MS = 30_000.0
"""How long the source's own connection is kept for its DONE; after that it can only ask."""


@dataclass(frozen=True, slots=True)
class Arrived:
    """A guest that is ours now: it runs, or is paused if it was paused at the source."""

    machine: Migratable
    fidelity: Fidelity
    source_name: str
    uuid: str


class Destination:
    """One incoming migration on ``listener``, which it owns and closes; used once.

    ``builder`` makes the empty machine, ``examiner`` those for peers that only check; ``name`` is the one under which
    the guest goes on here, and names the journal. With ``autostart`` false the guest stays paused here even when it ran
    at the source. Other threads may call :meth:`cancel`, :meth:`resolve` and :meth:`query` at any time; :meth:`close`
    ends it.
    """

    def __init__(
        self,
        listener: Listener,
        builder: Builder,
        examiner: Examiner,
        journal_dir: Path,
        name: str,
        observer: Observer | None = None,
        *,
        timeout_ms: float = 10_000.0,
        in_doubt_ms: float = IN_DOUBT_MS,
        autostart: bool = True,
    ) -> None:
        self._listener = listener
        self._builder = builder
        self._examiner = examiner
        self._name = name
        self._telling = Telling(observer)
        self._timeout_ms = timeout_ms
        self._in_doubt_ms = in_doubt_ms
        self._autostart = autostart
        self._journal = Journal(journal_dir, name)
        self._abort = Abort()
        self._run_here: bool | None = None
        self._status = Status.NONE
        self._incoming: Incoming | None = None
        self._channel: Channel | None = None
        self._answering: Answering | None = None

    def run(self) -> Arrived:
        """Wait for a source and take its guest over.

        Raises :class:`StreamError`, :class:`ChannelError`, :class:`PeerFailed`, :class:`RestoreRefused`,
        :class:`ConfigError`, :class:`HostError`, :class:`Cancelled` or :class:`MigrationError`: the guest never ran
        here then, everything of it is gone, and the source has been told if it could be.
        """
        incoming: Incoming | None = None
        try:
            channel, hello = self._await_source()
            self._channel = channel
            take_custody = partial(self._take_custody, channel, hello)
            incoming = Incoming(channel, hello, self._builder, take_custody)
            incoming.may_start = self._autostart
            self._incoming = incoming
            while incoming.step() is not State.COMMITTED:
                self._follow(incoming.state)
        except BaseException as error:
            self._failed(incoming, error)
        assert incoming is not None and incoming.machine is not None
        incoming.end_blackout()
        self._enter(Status.COMPLETED)
        threading.Thread(target=self._see_off, args=(incoming,), name="see-off", daemon=True).start()
        return Arrived(incoming.machine, incoming.fidelity, hello.name, hello.uuid)

    def cancel(self) -> None:
        """Receive no more; the guest stays at its source. Raises :class:`StateError` once it is committed here."""
        custody = self._custody
        if custody is not None and not custody.discard("cancelled by the operator of the destination"):
            raise StateError("the owner of the guest", "still receiving it")
        self._abort.fire(Cancelled("cancelled by the operator: the guest stays at its source"))

    def resolve(self, *, run_here: bool) -> None:
        """The operator's word on a guest whose source was lost between READY and COMMIT: it runs here (the source does
        not and never will run it), or it is given up. Raises :class:`StateError` when nothing is in doubt."""
        if self._status is not Status.COMMIT_UNKNOWN:
            raise StateError(f"not in doubt (migration {self._status.value})", "commit-unknown")
        self._run_here = run_here

    def query(self) -> dict[str, Value]:
        """How far it is, as a map for JSON with QEMU's names. From any thread."""
        value: dict[str, Value] = {"status": self._status.value}
        if self._incoming is not None:
            value["ram"] = {
                "transferred": self._incoming.received("bytes_received"),
                "normal": self._incoming.received("pages_received"),
                "duplicate": self._incoming.received("pages_cleared"),
            }
        return value

    def close(self, linger_ms: float = 2000.0) -> None:
        """End: the source that may still ask is given ``linger_ms`` first. Idempotent."""
        custody = self._custody
        if custody is not None and custody.state is Custody.State.RUNNING:
            custody.told.wait(linger_ms / 1e3)
        self._close()

    @property
    def _custody(self) -> Custody | None:
        return self._incoming.custody if self._incoming is not None else None

    def _await_source(self) -> tuple[Channel, wire.Hello]:
        """The first connection that brings a guest; those that ask or only check are answered meanwhile."""
        found = self._journal.read()
        while True:
            sock = self._listener.accept(self._abort)
            assert sock is not None, "accept without a timeout returns a connection or raises"
            channel = Channel(sock, self._abort, self._timeout_ms, "the source")
            self._channel = channel
            frame = channel.recv()
            if frame.kind == FrameKind.HELLO:
                hello = greet(channel, frame, self._name)
                if ONLY not in hello.features:
                    self._enter(Status.SETUP)
                    return channel, hello
                serve_check(channel, hello, self._examiner)
                continue
            if frame.kind != FrameKind.QUERY:
                raise unexpected(frame, "waiting for a source")
            with suppress(ChannelError):
                if send_answer(channel, answer_of(found, wire.Query.from_payload(frame.payload))):
                    self._journal.remove()
            channel.close()

    def _take_custody(self, channel: Channel, hello: wire.Hello) -> Custody:
        record = Record(self._name, hello.uuid, hello.epoch, Role.DESTINATION, Entry.RECEIVING, hello.name, os.getpid())
        custody = Custody(self._journal, record)
        self._answering = Answering(self._listener, custody, self._join)
        self._answering.start()
        return custody

    def _join(self, channel: Channel, frame: Frame) -> None:
        assert self._incoming is not None, "a guest in custody is on its way in"
        self._incoming.join(channel, frame)

    def _follow(self, state: State) -> None:
        # Told before the blackout begins and after it has ended, never in it.
        if state is State.RECEIVING and self._status is Status.SETUP:
            self._enter(Status.ACTIVE)

    def _failed(self, incoming: Incoming | None, error: BaseException) -> None:
        """Returns only when the operator has decided that the guest runs here."""
        if incoming is not None:
            incoming.end_blackout()
        custody = self._custody
        if incoming is None or custody is None or incoming.state not in (State.READY, State.COMMITTED):
            self._give_up(error)
            raise error
        if incoming.state is State.COMMITTED:
            self._after_commit(custody, error)
            return
        if isinstance(error, PeerFailed):
            # The source has rolled back and says so: it will not ask.
            custody.discard(str(error))
            custody.settle()
        elif not isinstance(error, ChannelError):
            self._refuse(custody, error)
        if not custody.told.is_set() and self._wait_in_doubt(custody):
            custody.commit()
            incoming.run_guest()
            custody.ran()
            return
        custody.discard(f"the source was lost after READY: {error}")
        self._give_up(error)
        raise error

    def _after_commit(self, custody: Custody, error: BaseException) -> None:
        """RUNNING could not be said: then the source will ask. Or the guest could not be run: nobody may, then."""
        if custody.state is Custody.State.RUNNING and isinstance(error, ChannelError):
            return
        custody.broke(f"it was committed there and could not be run ({wire.Failed.of(error).text})")
        if self._channel is not None:
            self._channel.close()
        self._enter(Status.FAILED)
        raise error

    def _refuse(self, custody: Custody, error: BaseException) -> None:
        """Decide against the guest and tell the source, whose COMMIT may be on its way already."""
        custody.discard(wire.Failed.of(error).text)
        channel = self._channel
        if channel is None or channel.broken:
            return
        channel.abort = Abort()
        with suppress(KvmigrateError):
            channel.send_payloads(
                [(FrameKind.ANSWER, wire.Answer(wire.Ownership.DISCARDED, wire.Failed.of(error).text).to_payload())]
            )
            while (frame := channel.recv()).kind == FrameKind.COMMIT:
                continue
            if frame.kind in (FrameKind.DONE, FrameKind.FAILED):
                custody.settle()
        channel.abort.close()

    def _wait_in_doubt(self, custody: Custody) -> bool:
        """Until the source asks, the operator decides, or the wait is over. True: the operator wants it to run here."""
        if self._channel is not None:
            self._channel.close()
        self._enter(Status.COMMIT_UNKNOWN)
        until = time.monotonic() + self._in_doubt_ms / 1e3
        while time.monotonic() < until and self._run_here is None:
            if custody.told.wait(0.05):
                return False
        return self._run_here is True and custody.state is Custody.State.HELD

    def _give_up(self, error: BaseException) -> None:
        """It never ran here: leave nothing behind but, if the source may still ask in vain, the journal."""
        custody = self._custody
        state = self._incoming.state if self._incoming is not None else State.GREETED
        if custody is not None and state is not State.READY:
            custody.discard(wire.Failed.of(error).text)
            custody.settle()
        if self._channel is not None and isinstance(error, ChannelError | PeerFailed):
            self._channel.close()
        elif self._channel is not None:
            self._channel.close_with(FrameKind.FAILED, wire.Failed.of(error).to_value())
        self._close()
        self._abort.close()
        if self._incoming is not None and self._incoming.machine is not None:
            self._incoming.machine.close()
        self._enter(Status.CANCELLED if isinstance(error, Cancelled) else Status.FAILED)

    def _see_off(self, incoming: Incoming) -> None:
        """Wait for DONE on the source's own connection; whoever lost that connection asks instead."""
        channel, custody = self._channel, incoming.custody
        if channel is None or custody is None:
            return
        custody.note_running()
        with suppress(KvmigrateError):
            if channel.recv(DONE_MS).kind == FrameKind.DONE:
                custody.settle()
        channel.close()
        self._abort.close()
        if custody.told.is_set() and self._answering is not None:
            self._answering.stop()

    def _enter(self, status: Status) -> None:
        self._status = status
        self._telling.status(status)

    def _close(self) -> None:
        if self._answering is not None:
            self._answering.stop()
        else:
            self._listener.close()
