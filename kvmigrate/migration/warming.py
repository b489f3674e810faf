"""Going through what the blackout does right before it, while no guest waits: much of it takes half as long then."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable

from ..contract import Migratable
from ..state.frame import FrameKind
from ..state.section import Section
from . import wire
from .abort import Abort
from .channel import Channel
from .handover import send_state

WARM_FOR_S = 0.01
"""How long what was gone through is gone through quickly once more, as a rule: a short round goes by in that time."""
_TIMEOUT_MS = 1000.0


class WarmUp:
    """Has one side of a migration, which ``abort`` ends, do it: with a connection to itself, until :meth:`close`."""

    def __init__(self, abort: Abort) -> None:
        self._abort = abort
        self._cold_at = 0.0
        self._ends: list[Channel] = []

    def go(self, machine: Migratable) -> None:
        """After a round, unless it was done a moment ago: where rounds follow each other closely, not after each. A
        guest that writes goes on writing meanwhile."""
        if time.monotonic() >= self._cold_at:
            self.now(machine)
            self._cold_at = time.monotonic() + WARM_FOR_S

    def now(self, machine: Migratable, is_late: Callable[[], bool] = lambda: False) -> None:
        """In any case; the rest is left out when it ``is_late``. A millisecond later all that is not in the processor's
        caches any more (measured: 2.4 ms from the pause on when the destination did it before its last answer, 1.85
        when it did it once more after that)."""
        machine.warm_up()
        if not is_late():
            self._talk()

    def _talk(self) -> None:
        if not self._ends:
            self._ends = [Channel(end, self._abort, _TIMEOUT_MS, "this process") for end in socket.socketpair()]
        here, there = self._ends
        send_state(here, _SECTIONS, 0, 0, more=False)
        round_ = wire.Round.from_payload(there.recv(spin=True).payload)
        there.recv_sections(round_.sections, round_.sections_bytes)
        for kind, payload, parse in _FRAMES:
            here.send_payloads([(kind, payload())])
            parse(there.recv(spin=True).payload)

    def close(self) -> None:
        """Idempotent."""
        for end in self._ends:
            end.close()
        self._ends = []


_FRAMES: tuple[tuple[FrameKind, Callable[[], bytes], Callable[[bytes], object]], ...] = (
    (FrameKind.END, wire.End(0, 0, 0, 0, True).to_payload, wire.End.from_payload),
    (FrameKind.READY, wire.Ready(0, 0, 0.0, 0.0).to_payload, wire.Ready.from_payload),
    (FrameKind.COMMIT, lambda: wire.commit_payload(1), wire.commit_epoch),
    (FrameKind.RUNNING, wire.Running(0.0, 0.0, 0.0, {}).to_payload, wire.Running.from_payload),
)
"""What both sides have to say to each other after the state, and how it is understood."""
_SECTIONS = [Section(f"part{number}", 1, {"number": number}) for number in range(3)]
