"""Two sides of one move on one host, each on processors of its own.

Linux wakes who waits for a packet of the loopback on the processor of its sender, and parts two threads that share one
only at the next tick: both sides then take turns on one processor while another is idle. Seen in traces of busy guests'
moves (two processors, each with a cache of its own), in which it cost up to 4 ms of the blackout.

Whose they are follows from the number of the attempt, which both sides know. SO_INCOMING_CPU does not say where the
peer is: what had to wait for room in the socket leaves when this side's kernel acknowledges, on this side's processor
(seen in 10 of 16 moves, whose state then waited 0.1 to 0.3 ms for the other side to be done).
"""

from __future__ import annotations

import os
import socket
from contextlib import suppress

from .local import TCP, on_this_host


class Apart:
    """Keeps the calling thread to a half of the processors, if the peer of ``sock`` is on this host. One thread calls
    all of it; what it starts meanwhile, such as the threads of a guest's devices, inherits that until the end."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._local: bool | None = None
        self._half = 0
        self._before: set[int] | None = None
        self._threads: set[str] = set()
        """Those that there were before."""

    def keep(self, half: int) -> None:
        """From now on to this one: even numbers mean the one, odd ones the other. Of each core's two threads both are
        in the same as a rule, since they are numbered half of all apart. Idempotent."""
        if self._local is None:
            self._local = self._sock.family in TCP and on_this_host(self._sock)
        if not self._local or (self._before is not None and self._half == half % 2):
            return
        with suppress(OSError):
            allowed = self._before or os.sched_getaffinity(0)
            if len(allowed) > 1:
                self._threads = self._threads or _threads()
                self._half = half % 2
                os.sched_setaffinity(0, sorted(allowed)[self._half :: 2])
                self._before = allowed

    def end(self) -> None:
        """Any processor will do again, also for what was started meanwhile. Idempotent."""
        if self._before is not None:
            with suppress(OSError):
                os.sched_setaffinity(0, self._before)
                for thread in _threads() - self._threads:
                    _let_go(int(thread), self._before)
            self._before, self._threads = None, set()


def _threads() -> set[str]:
    """The ids of this process's threads. Raises OSError."""
    return set(os.listdir("/proc/self/task"))  # noqa: PTH208 (their names are all that is wanted)


def _let_go(thread_id: int, allowed: set[int]) -> None:
    """Let a thread run on all processors that are ``allowed``, if it has kept to one of the halves."""
    with suppress(OSError):
        if os.sched_getaffinity(thread_id) in (set(sorted(allowed)[half::2]) for half in (0, 1)):
            os.sched_setaffinity(thread_id, allowed)
