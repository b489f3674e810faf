"""The source's side of a check: show the destination the state of a guest that runs on, and hear the answer."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Self

from ..config import PAGE_BYTES, Address
from ..contract import Migratable, RunState
from ..errors import BadField, Cancelled, KvmigrateError, StateError
from ..record import dataclass
from ..state.frame import HEADER, FrameKind
from ..state.section import Value, encode, pack
from . import wire
from .abort import Abort
from .blackout import Stopwatch, quiet_interpreter
from .channel import Channel, expect
from .checks import CHECK, ONLY, Check, Checked, CheckResult
from .handover import refuse_ended
from .joining import dial

MOVABLE = (RunState.RUNNING, RunState.PAUSED, RunState.PRELAUNCH)
BUILD_MS_PER_GIB = 1000.0
"""What a destination may take, beyond the timeout, to build and touch each GiB of guest memory."""


def introduce(channel: Channel, hello: wire.Hello, description: Value) -> None:
    """Say who comes, and have its machine built: HELLO and CONFIG in one piece, so that the way to the destination and
    back is waited for once."""
    channel.send_payloads([(FrameKind.HELLO, hello.to_payload()), (FrameKind.CONFIG, pack(description))])


def await_machine(channel: Channel, hello: wire.Hello, size_bytes: int) -> None:
    """Wait until the destination has heard that and built the machine, whose memory has ``size_bytes``. Raises
    :class:`BadField` when it answers somebody else, and what :func:`expect` raises."""
    back = wire.Hello.from_payload(expect(channel, FrameKind.HELLO).payload)
    if (back.uuid, back.epoch) != (hello.uuid, hello.epoch):
        raise BadField(f"{channel.peer} answers for another guest ({back.uuid}): is it an old connection?")
    accept = expect(channel, FrameKind.ACCEPT, patience_ms(channel, size_bytes))
    wire.expect_empty(accept.payload, FrameKind.ACCEPT)


def require_movable(machine: Migratable) -> None:
    """Raise :class:`StateError` for a guest that has ended or is not here yet."""
    if machine.runstate not in MOVABLE:
        raise StateError(machine.runstate.value, "running or paused")


def patience_ms(channel: Channel, size_bytes: int) -> float:
    """How long to wait for a destination that builds a machine with so much memory."""
    return channel.timeout_ms + size_bytes / (1 << 30) * BUILD_MS_PER_GIB


@dataclass(frozen=True, slots=True)
class Sample:
    """What a destination is shown of a guest that runs on: its state as frames, and where its memory is in use."""

    sections: Sequence[tuple[FrameKind, bytes]]
    resident: Sequence[tuple[int, int]]
    """First gfn and number of pages."""
    pause_ms: float
    """The longest pause of the guest for it."""

    @classmethod
    def take(cls, machine: Migratable) -> Self:
        """Sample ``machine``. Raises what :meth:`Migratable.sample` raises, and :class:`StateError` when it ended."""
        # The guest's own exits must not wait for the interpreter meanwhile either.
        with quiet_interpreter():
            sampled, pause_ms = machine.sample()
            sections = [(FrameKind.SECTION, encode(section)) for section in sampled]
        refuse_ended(machine)
        return cls(sections, machine.memory.resident_runs(wire.MAX_RESIDENT_RUNS), pause_ms)

    @property
    def head(self) -> Check:
        """What announces it."""
        size_bytes = sum(HEADER.size + len(payload) for _, payload in self.sections)
        return Check(len(self.sections), size_bytes, PAGE_BYTES * sum(nr_pages for _, nr_pages in self.resident))


def ask_check(
    channel: Channel, machine: Migratable, sample: Sample, meanwhile: Callable[[], None] = lambda: None
) -> CheckResult:
    """Send the state of ``machine`` to be tried, do what can be done ``meanwhile``, and wait for the answer. Raises
    what :func:`expect` raises."""
    watch = Stopwatch()
    channel.send_payloads([(FrameKind.CHECK, sample.head.to_payload()), *sample.sections])
    meanwhile()
    answer = expect(channel, FrameKind.CHECKED, patience_ms(channel, machine.memory.size_bytes))
    return CheckResult(Checked.from_payload(answer.payload), sample.pause_ms, watch.total())


class Checker:
    """One check of ``machine`` against who receives at ``address``; used once. Others may call :meth:`cancel`."""

    def __init__(self, machine: Migratable, address: Address, timeout_ms: float) -> None:
        self._machine = machine
        self._address = address
        self._timeout_ms = timeout_ms
        self._abort = Abort()

    def run(self) -> CheckResult:
        """Check. The guest stays as it is, whatever happens.

        Raises :class:`StateError`, :class:`Cancelled`, :class:`PeerFailed`, :class:`ChannelError`,
        :class:`StreamError` or :class:`HostError`."""
        require_movable(self._machine)
        try:
            channel = dial(self._address, self._abort, self._timeout_ms)
            try:
                return self._check(channel)
            finally:
                channel.close()
        finally:
            self._abort.close()

    def _check(self, channel: Channel) -> CheckResult:
        description = dict(self._machine.describe())
        uuid, name = str(description["uuid"]), str(description["name"])
        hello = wire.Hello(wire.FORMAT, (CHECK, ONLY), uuid, time.time_ns(), name)
        introduce(channel, hello, description)
        # Nothing in a pause should be done for the first time.
        self._machine.rehearse()
        # While the destination builds its machine.
        sample = Sample.take(self._machine)
        await_machine(channel, hello, self._machine.memory.size_bytes)
        return ask_check(channel, self._machine, sample)

    def cancel(self, reason: KvmigrateError | None = None) -> None:
        """Ask no further, for ``reason`` or because the operator wants it."""
        self._abort.fire(reason or Cancelled("cancelled by the operator: the guest runs on, unchecked"))
