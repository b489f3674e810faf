"""Two sides of one move on one host, each on a processor of its own.

Linux wakes who waits for a packet of the loopback on the processor of its sender, and parts two threads that share one
only at the next tick: both sides then take turns on one processor while another is idle. Seen in traces of busy guests'
moves (two processors, each with a cache of its own), in which it cost up to 4 ms of the blackout.
"""

from __future__ import annotations

import os
import socket
from contextlib import suppress

from .local import TCP, on_this_host


class Apart:
    """Keeps the calling thread off the processor from which the peer of ``sock`` sends, if that is on this host. One
    thread calls all of it."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._before: set[int] | None = None

    def keep(self) -> None:
        """From now on; again when the peer may have moved."""
        # Of a peer elsewhere it is the processor that takes packets in, which is no bad place to be.
        if self._sock.family not in TCP or not on_this_host(self._sock):
            return
        with suppress(OSError):
            allowed = self._before or os.sched_getaffinity(0)
            others = allowed - {self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_INCOMING_CPU)}
            if others and others != allowed:
                os.sched_setaffinity(0, others)
                self._before = allowed

    def end(self) -> None:
        """Any processor will do again. Idempotent."""
        if self._before is not None:
            with suppress(OSError):
                os.sched_setaffinity(0, self._before)
            self._before = None
