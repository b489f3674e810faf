"""Two sides of one move on one host, each on a processor of its own.

Linux wakes who waits for a packet of the loopback on the processor of its sender, and parts two threads that share one
only at the next tick: both sides then take turns on one processor while another is idle. Seen in traces of busy guests'
moves (two processors, each with a cache of its own), in which it cost up to 4 ms of the blackout.

Which one is whose follows from the number of the attempt, which both sides know. SO_INCOMING_CPU does not say where the
peer is: what had to wait for room in the socket leaves when this side's kernel acknowledges, on this side's processor
(seen in 10 of 16 moves, whose state then waited 0.1 to 0.3 ms for the other side to be done).
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from contextlib import suppress

from .local import TCP, on_this_host


class Apart:
    """Keeps the calling thread on its side's processors, if the peer of ``sock`` is on this host and may run on the
    same ones. One thread calls all of it; what it starts meanwhile inherits it."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._before: set[int] | None = None

    def take_one(self, attempt: int) -> None:
        """The source: on the one processor that is its own from now on. Idempotent."""
        self._take(attempt, lambda allowed, one: {one})

    def leave_one(self, attempt: int) -> None:
        """The destination: on all but that one. Idempotent."""
        self._take(attempt, lambda allowed, one: allowed - {one})

    def end(self) -> None:
        """Any processor will do again. Idempotent."""
        if self._before is not None:
            with suppress(OSError):
                os.sched_setaffinity(0, self._before)
            self._before = None

    def _take(self, attempt: int, choose: Callable[[set[int], int], set[int]]) -> None:
        # On two hosts there is nothing to share.
        if self._before is not None or self._sock.family not in TCP or not on_this_host(self._sock):
            return
        with suppress(OSError):
            allowed = os.sched_getaffinity(0)
            if len(allowed) > 1:
                os.sched_setaffinity(0, choose(allowed, sorted(allowed)[attempt % len(allowed)]))
                self._before = allowed
