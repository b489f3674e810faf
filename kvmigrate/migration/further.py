"""The destination's end of a migration's further connections: a thread each that writes pages into guest memory."""

from __future__ import annotations

import threading
from collections.abc import Callable

from ..errors import Cancelled, ChannelError, KvmigrateError, MigrationError
from ..memory.region import GuestMemory
from ..state.frame import FrameKind
from . import wire
from .abort import Abort
from .channel import Channel, require
from .joining import Join
from .pages import Decompressor


class Further:
    """The connections that joined ``first``. What goes wrong on one ends the migration by ``first``'s abort.

    ``allowed`` says which flags PAGES frames may have by now."""

    def __init__(self, first: Channel, allowed: Callable[[], int]) -> None:
        self._first = first
        self._allowed = allowed
        self._abort = Abort()
        self._loaded = threading.Event()
        self._lock = threading.Condition()
        self._closed = False
        self._failed = False
        self._nr_done = 0
        self._joined: dict[int, _Connection] = {}

    def join(self, channel: Channel, join: Join, memory: GuestMemory) -> None:
        """Receive on ``channel`` from now on. Raises :class:`MigrationError` for one too many: that is the caller's."""
        with self._lock:
            if self._closed or join.number in self._joined:
                raise MigrationError(f"connection {join.number} of {join.of} is there already, or comes too late")
            peer = f"the source (connection {join.number} of {join.of})"
            channel.hand_over(self._abort, self._first.timeout_ms, peer)
            # Another thread may be counting: it keeps the map that it has.
            self._joined = {**self._joined, join.number: _Connection(channel, join, memory, self)}

    def loaded(self) -> None:
        """The guest's state has been loaded: the last pages may be written over what that wrote."""
        self._loaded.set()

    def finish(self, nr_last: int) -> None:
        """Wait until ``nr_last`` of them have ended by DONE: those that carry last pages. The others are not woken for
        it, and what becomes of them after this changes nothing. Raises what went wrong on one, or
        :class:`MigrationError`."""
        with self._lock:
            ended = self._lock.wait_for(lambda: self._failed or self._nr_done >= nr_last, self._first.timeout_ms / 1e3)
            if ended and not self._failed:
                self._closed = True
        self._first.abort.check()
        if not ended:
            raise MigrationError(f"of {nr_last} further connections {self._nr_done} ended: is one stalled?")

    def count(self, counter: str) -> int:
        """The sum over all of them of a counter of ``struct kmig_incoming``."""
        return sum(getattr(connection.channel.incoming, counter) for connection in self._joined.values())

    def done(self) -> None:
        """One of them has ended by DONE."""
        with self._lock:
            self._nr_done += 1
            self._lock.notify_all()

    def stop(self) -> None:
        """End them all, and wait for it. Idempotent."""
        with self._lock:
            self._closed = True
        self._abort.fire(Cancelled("the migration has ended"))
        self._loaded.set()
        for connection in self._joined.values():
            connection.join()
            connection.channel.close()
        self._abort.close()

    def wait_until_loaded(self) -> None:
        """Raises the reason when that is not to happen any more."""
        self._loaded.wait()
        self._abort.check()

    def failed(self, error: KvmigrateError) -> None:
        """Have ``first`` raise the reason, and the other connections end; unless all of it is over."""
        if isinstance(error, ChannelError):
            error = MigrationError(str(error))
        with self._lock:
            if self._closed:
                return
            self._failed = True
            self._first.abort.fire(error)
            self._lock.notify_all()
        self._abort.fire(error)

    @property
    def allowed(self) -> int:
        """The flags that PAGES frames may have by now."""
        return self._allowed()


class _Connection:
    """One of them, with its thread."""

    def __init__(self, channel: Channel, join: Join, memory: GuestMemory, all_of_them: Further) -> None:
        self.channel = channel
        self._join = join
        self._memory = memory
        self._further = all_of_them
        self._decompressor = Decompressor()
        self._thread = threading.Thread(target=self._run, name=f"pages-{join.number}", daemon=True)
        self._thread.start()

    def join(self) -> None:
        """Wait for its thread's end."""
        self._thread.join()

    def _run(self) -> None:
        try:
            self.channel.send_payloads([(FrameKind.JOIN, self._join.to_payload())])
            while self._take_frame():
                continue
            self._further.done()
        except KvmigrateError as error:
            self._further.failed(error)

    def _take_frame(self) -> bool:
        """One frame, or any number of uncompressed PAGES. False after the last."""
        frame = self.channel.recv_pages(self._memory)
        if frame.kind == FrameKind.PAGES:
            self._decompressor.apply(self._memory, self.channel, self._further.allowed)
        elif frame.kind == FrameKind.ROUND:
            # All of the round that came this way has been received.
            self.channel.send_payloads([(FrameKind.ROUND, frame.payload)])
        elif frame.kind == FrameKind.LAST:
            wire.expect_empty(frame.payload, FrameKind.LAST)
            self._further.wait_until_loaded()
        else:
            require(self.channel, frame, FrameKind.DONE)
            wire.expect_empty(frame.payload, FrameKind.DONE)
            return False
        return True
