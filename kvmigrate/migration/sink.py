"""Rounds of pages onto a migration's connections: each takes pieces of the round, in a thread of its own."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

from .._core import lib
from ..config import PAGE_BYTES, Compression
from ..errors import BadField, KvmigrateError
from ..memory.region import GuestMemory
from ..precopy.ledger import RoundRecord
from ..precopy.rounds import Round
from ..state.frame import FrameKind
from ..state.section import pack
from . import wire
from .channel import Channel, Frame, require
from .codec import Auto, Fixed, Part, Sent
from .delta import DELTA, DeltaCache, Offer
from .packer import Packer
from .zerocopy import References

PART_PAGES = 256
"""A connection that gets fewer pages than this of a round costs more than it saves."""


class Writer:
    """One connection's part of each round: uncompressed pages entirely in C, others by the :class:`Packer`."""

    def __init__(self, channel: Channel, compression: Compression, cores: int) -> None:
        self.channel = channel
        self._packer = Packer()
        self._codec: Fixed | Auto = Auto(cores) if compression.auto else Fixed(compression.level)

    def use_delta(self) -> None:
        """From now on pages may go as what changed in them."""
        self._codec.delta = True

    def write(self, memory: GuestMemory, part_of_round: Round) -> None:
        """Send pages until none are left to take. Raises what :meth:`Channel.check` raises."""
        part_of_round.handle.zerocopy = self.channel.zero_copy
        part_of_round.handle.splice = self.channel.splice
        more = True
        while more:
            part = self._codec.next(part_of_round, lambda level: self._packer.sample(memory, level))
            more = self._write_part(memory, part_of_round, part)

    def write_beside_others(self, memory: GuestMemory, part_of_round: Round) -> None:
        """The same; when it fails the other connections stop as well."""
        try:
            self.write(memory, part_of_round)
        except KvmigrateError as error:
            self.channel.abort.fire(error)
            raise

    def _write_part(self, memory: GuestMemory, round_: Round, part: Part) -> bool:
        """Send one part of the round; returns whether there may be more."""
        handle, channel = round_.handle, self.channel
        pages, sent, out, busy = handle.pages_done, handle.pages_sent, handle.bytes_sent, handle.busy_ns
        work, waiting, begin = round_.work_ns, channel.nr_unacknowledged(), time.monotonic_ns()
        if part.choice.level is None:
            limits = (part.most_pages, part.most_ns)
            more = channel.check(
                lib.kmig_stream_send_some(memory.handle, handle, channel.fd, channel.sequence, *limits)
            )
            # Under a cap the pacer's sleeps cannot be told from work.
            if not round_.bandwidth_bytes_s:
                round_.work_ns += max(time.monotonic_ns() - begin - (handle.busy_ns - busy), 0)
        else:
            more = self._packer.send_some(memory, round_, channel, part)
        out, queued = handle.bytes_sent - out, channel.nr_unacknowledged()
        did = Sent(
            page_bytes=(handle.pages_sent - sent) * PAGE_BYTES,
            out_bytes=out,
            left_bytes=out + waiting - queued,
            queued_bytes=queued,
            busy_s=(handle.busy_ns - busy) / 1e9,
            work_s=(round_.work_ns - work) / 1e9,
        )
        round_.went_as(str(part.choice), part.choice.why, handle.pages_done - pages)
        self._codec.sent(round_, part, did)
        return bool(more)


class StreamSink:
    """A :class:`PageSink` that writes to ``channels``, and counts what it wrote over all rounds. The first carries the
    rest of the migration too; :meth:`close` closes the further ones. ``meanwhile`` is done after each round, while the
    destination does what it has to do after one."""

    def __init__(
        self,
        channels: Sequence[Channel],
        compression: Compression,
        delta_cache_bytes: int = 0,
        *,
        meanwhile: Callable[[], None] = lambda: None,
    ) -> None:
        self._channels = channels
        cores = max(1, len(os.sched_getaffinity(0)) // len(channels))
        self._writers = [Writer(channel, compression, cores) for channel in channels]
        self._pool = _pool(len(channels) - 1) if len(channels) > 1 else None
        self._delta_cache_bytes = delta_cache_bytes if compression.may_pack else 0
        self._meanwhile = meanwhile
        self._offered = False
        self._delta: DeltaCache | None = None
        self.pages_sent = 0
        self.pages_cleared = 0
        self.nr_last = 0
        """How many further connections carried pages of the last round."""

    def write_round(self, memory: GuestMemory, round_: Round) -> None:
        """Send everything that is pending. Raises what :meth:`Channel.check` raises."""
        if self._delta_cache_bytes and round_.handle.first:
            self._channels[0].send_payloads([(FrameKind.OFFER, Offer((DELTA,)).to_payload())], mandatory=False)
            self._offered = True
        if self._delta is not None:
            round_.handle.delta = self._delta.handle
        lib.kmig_round_begin(memory.handle, round_.handle)
        self._write(memory, round_)
        self.pages_sent += round_.total("pages_sent")
        self.pages_cleared += round_.total("pages_cleared")

    def _write(self, memory: GuestMemory, round_: Round) -> None:
        # How many there are in the first round shows only while it runs.
        most = len(self._writers) if round_.handle.first else round_.handle.pages_total // PART_PAGES
        first, *further = self._writers[: max(most, 1)]
        if self._pool is None or not further:
            first.write(memory, round_)
            return
        if round_.last:
            self.nr_last = len(further)
            _say(further, FrameKind.LAST)
        parts = [round_.part(memory, 1 + len(further)) for _ in further]
        running = [
            self._pool.submit(writer.write_beside_others, memory, part)
            for writer, part in zip(further, parts, strict=True)
        ]
        try:
            first.write_beside_others(memory, round_)
        finally:
            errors = [error for error in (one.exception() for one in running) if error is not None]
        if errors:
            # Whoever failed first has said why there.
            first.channel.abort.check()
            raise errors[0]
        if round_.last:
            _say(further, FrameKind.DONE)

    def end_round(self, record: RoundRecord) -> None:
        """Tell the destination how far it is, and wait until it is there too, on every connection.

        Megabytes of a round fit into the sockets' buffers. Were they still under way when the guest is paused, its
        state would queue behind them (measured: 5 to 20 ms of blackout for 1 GiB)."""
        zero = record.pages_zero + record.pages_cleared
        payload = wire.Round(record.round, record.pages_sent, zero, record.bytes_sent).to_payload()
        for channel in self._channels:
            channel.send_payloads([(FrameKind.ROUND, payload)])
        self._meanwhile()
        for channel in self._channels:
            if self._answer(channel).payload != payload:
                raise BadField(f"{channel.peer} answers for another round than {record.round}")

    def spare_copies(self, *, zero_copy: bool) -> None:
        """Let uncompressed pages leave from where they lie: by ``zero_copy``, or to a peer on this host through pipes.
        Raises :class:`UnsupportedError`."""
        for channel in self._channels:
            if zero_copy:
                channel.send_by_reference()
            else:
                channel.splice_if_local()

    def references(self) -> References | None:
        """What came of that so far, None where it is not so. For the thread that migrates."""
        handles = [channel.zero_copy for channel in self._channels if channel.zero_copy]
        for channel in self._channels:
            channel.take_reports()
        if not handles:
            return None
        return References(*(sum(getattr(one, name) for one in handles) for name in ("sends", "copied", "refused")))

    def _answer(self, channel: Channel) -> Frame:
        """The ROUND that comes back, and what the destination made of an OFFER before it."""
        while True:
            channel.wait_while_draining()
            frame = channel.recv()
            if frame.kind != FrameKind.OFFER or not self._offered or channel is not self._channels[0]:
                return require(channel, frame, FrameKind.ROUND)
            self._offered = False
            if DELTA in Offer.from_payload(frame.payload).features:
                self._delta = DeltaCache(self._delta_cache_bytes)
                for writer in self._writers:
                    writer.use_delta()

    def close(self) -> None:
        """Let the threads and the further connections go. Nothing may be under way. Idempotent."""
        if self._pool is not None:
            self._pool.shutdown()
        for channel in self._channels[1:]:
            channel.close()


def _pool(nr_threads: int) -> ThreadPoolExecutor:
    """Threads that may run wherever this one may now: one that is started later would inherit what it keeps to then."""
    allowed = os.sched_getaffinity(0)

    def roam() -> None:
        with suppress(OSError):
            os.sched_setaffinity(0, allowed)

    return ThreadPoolExecutor(nr_threads, "pages", roam)


def _say(writers: Sequence[Writer], kind: FrameKind) -> None:
    for writer in writers:
        writer.channel.send_payloads([(kind, pack({}))])
