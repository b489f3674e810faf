"""One connection that carries frames in both directions, with a timeout and a way out of every blocking call."""

from __future__ import annotations

import errno
import fcntl
import select
import socket
import termios
import time
from array import array
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any

from .._core import ffi, lib
from ..errors import BadField, ChannelError, PeerClosed, PeerTimeout, StreamError, TooLarge, UnexpectedFrame
from ..memory.region import GuestMemory
from ..record import dataclass
from ..state.frame import (
    HEADER,
    MAX_PAYLOAD_BYTES,
    FrameHeader,
    FrameKind,
    check_payload,
    decode_header,
    encode_frame,
)
from ..state.section import Section, Value, decode, pack
from .abort import Abort
from .apart import Apart
from .batch import join, split_sections
from .local import on_this_host
from .wire import Failed
from .zerocopy import enable

DRAIN_MS = 500.0
"""How long a side that failed goes on reading what is on its way, so that its last word is not lost to a reset."""
SPIN_US = 5000
_KIB = 1 << 10
MAX_BYTES: Mapping[int, int] = {
    FrameKind.HELLO: 4 * _KIB,
    FrameKind.CONFIG: 1024 * _KIB,
    FrameKind.ACCEPT: 4 * _KIB,
    FrameKind.CHECK: 4 * _KIB,
    FrameKind.CHECKED: 2048 * _KIB,
    FrameKind.RESIDENT: 128 * _KIB,
    FrameKind.OFFER: 4 * _KIB,
    FrameKind.ROUND: 4 * _KIB,
    FrameKind.SECTION: 2048 * _KIB,
    FrameKind.END: 4 * _KIB,
    FrameKind.READY: 4 * _KIB,
    FrameKind.COMMIT: 4 * _KIB,
    FrameKind.RUNNING: 2048 * _KIB,
    FrameKind.FAILED: 16 * _KIB,
    FrameKind.QUERY: 4 * _KIB,
    FrameKind.ANSWER: 16 * _KIB,
    FrameKind.DONE: 4 * _KIB,
    FrameKind.JOIN: 4 * _KIB,
    FrameKind.LAST: 4 * _KIB,
}
"""The most that the payload of each kind may hold; checked before any of it is read."""


def kind_name(kind: int) -> str:
    """``PAGES`` for 3; ``kind 99`` for a number that no kind has."""
    try:
        return FrameKind(kind).name
    except ValueError:
        return f"kind {kind}"


@dataclass(frozen=True, slots=True)
class Frame:
    """A received frame. The payload of a PAGES frame is not in it: it is still on the connection."""

    kind: int
    payload: bytes = b""

    @property
    def name(self) -> str:
        return kind_name(self.kind)


class Channel:
    """Frames over a connected socket. ``timeout_ms`` bounds the wait for each control frame as a whole, and for pages
    how long the peer may let pass without a byte. Not thread-safe.

    Errors: :class:`PeerClosed`, :class:`PeerTimeout`, :class:`ChannelError` of the connection, :class:`StreamError` of
    what came over it, and whatever reason ``abort`` was fired with.
    """

    def __init__(self, sock: socket.socket, abort: Abort, timeout_ms: float, peer: str) -> None:
        _tune(sock, timeout_ms)
        self._sock = sock
        self.apart = Apart(sock)
        self.abort = abort
        self.timeout_ms = timeout_ms
        self.peer = peer
        self.broken = False
        """A send failed, maybe inside a frame: nothing more can be said to the peer."""
        self._sent: Any = ffi.new("uint32_t *")
        self._incoming: Any = ffi.new("struct kmig_incoming *")
        self._zero_copy: Any = ffi.NULL
        self._splice: Any = ffi.NULL

    @property
    def fd(self) -> int:
        return self._sock.fileno()

    @property
    def sequence(self) -> Any:
        """The ``uint32_t *`` with the number of the next frame out, for C functions that send frames themselves."""
        return self._sent

    @property
    def incoming(self) -> Any:
        """The ``struct kmig_incoming *``: counters of what :meth:`recv_pages` received."""
        return self._incoming

    @property
    def zero_copy(self) -> Any:
        """The ``struct kmig_zerocopy *`` of pages that go by ``MSG_ZEROCOPY``, NULL while none do."""
        return self._zero_copy

    @property
    def splice(self) -> Any:
        """The ``struct kmig_splice *`` of pages that go through a pipe, NULL while none do."""
        return self._splice

    def send_by_reference(self) -> None:
        """Let pages leave from where they lie. Raises :class:`UnsupportedError`."""
        enable(self.fd)
        self._zero_copy = ffi.new("struct kmig_zerocopy *")

    def splice_if_local(self) -> None:
        """Have pages for a peer on this host leave through a pipe, which saves one of two copies."""
        if on_this_host(self._sock):
            splice = ffi.new("struct kmig_splice *")
            # Without one they go by copy.
            if lib.kmig_splice_open(splice, self.fd) == 0:
                self._splice = splice

    def take_reports(self) -> int:
        """Take in what the kernel reports of sends by reference, which poll shows as an error. Returns of how many."""
        return self.check(lib.kmig_zerocopy_reap(self._zero_copy, self.fd)) if self._zero_copy else 0

    def send(self, kind: FrameKind, value: Value) -> None:
        """One control frame."""
        self.send_payloads([(kind, pack(value))])

    def send_payloads(self, frames: Iterable[tuple[FrameKind, bytes]], *, mandatory: bool = True) -> None:
        """Several control frames in one piece."""
        data, nr_frames = join(frames, self._sent[0], mandatory=mandatory)
        self._sent[0] += nr_frames
        self.send_raw(data)

    def send_raw(self, data: bytes | bytearray) -> None:
        """Bytes of frames that the caller made."""
        view = ffi.from_buffer(data)
        limits = self.abort.fd, int(self.timeout_ms)
        self.check(lib.kmig_stream_send(self.fd, view, len(data), *limits, self._zero_copy))

    def check(self, rc: int) -> int:
        """Turn the result of a C function on this connection into a count or an exception."""
        if rc >= 0:
            return rc
        self.broken = True
        if rc == -errno.ECANCELED:
            self.abort.check()
        raise _channel_error(rc, self.peer, self.timeout_ms)

    def recv(self, timeout_ms: float | None = None, *, spin: bool = False) -> Frame:
        """The next control frame; optional frames of an unknown kind are skipped. A PAGES frame is returned with its
        payload unread, for the caller to refuse. ``spin`` is for the blackout: look again and again for ``SPIN_US``
        before sleeping, since waking up costs more than the frame is away."""
        deadline = self._deadline(timeout_ms)
        while True:
            incoming = self._prepare(deadline, spin)
            if not self._received(lib.kmig_stream_recv_frame(incoming, self.fd, self._zero_copy)):
                self._count(decode_header(bytes(ffi.buffer(incoming.payload, HEADER.size))))
            frame = self._taken(deadline)
            if frame is not None:
                return frame

    def recv_pages(self, memory: GuestMemory, *, spin: bool = False) -> Frame:
        """Write pages into ``memory`` until a frame of another kind comes, and return that; a compressed PAGES frame
        comes back with its table checked (in :attr:`incoming`) and its data unread. ``spin`` as in :meth:`recv`."""
        while True:
            deadline = self._deadline(None)
            self._check_incoming(lib.kmig_stream_recv_pages(memory.handle, self._prepare(deadline, spin), self.fd))
            frame = self._taken(deadline)
            if frame is not None:
                return frame

    def _prepare(self, deadline: float, spin: bool) -> Any:
        incoming = self._incoming
        incoming.abort_fd = self.abort.fd
        incoming.timeout_ms = max(int((deadline - time.monotonic()) * 1e3), 0)
        incoming.spin_us = SPIN_US if spin else 0
        return incoming

    def recv_sections(self, nr_frames: int, size_bytes: int) -> list[Section]:
        """The next ``nr_frames``, which must be SECTIONs and take ``size_bytes`` with their headers, both of which the
        caller has checked: read in one piece, since a guest may be waiting."""
        whole = self._recv_exact(size_bytes, self._deadline(None), SPIN_US)
        found = split_sections(whole, nr_frames, self._incoming.sequence)
        if found is not None:
            self._incoming.sequence += nr_frames
            return found
        # One after another, then, to say what is wrong with which.
        data = memoryview(whole)
        sections: list[Section] = []
        at = 0
        for _ in range(nr_frames):
            begin = at + HEADER.size
            header = decode_header(data[at:begin]) if begin <= size_bytes else None
            if header is None or header.length > size_bytes - begin:
                raise BadField("the sections take more bytes than were announced for them")
            self._count(header)
            if header.kind != FrameKind.SECTION:
                raise unexpected(Frame(header.kind), "receiving sections")
            at = begin + header.length
            check_payload(header, data[begin:at])
            sections.append(decode(data[begin:at]))
        if at < size_bytes:
            raise BadField(f"{size_bytes - at} bytes are left of the sections that were announced")
        return sections

    def recv_bytes(self, size_bytes: int) -> bytes:
        """Raw bytes inside a frame whose size the caller has checked."""
        return self._recv_exact(size_bytes, self._deadline(None))

    def pending(self) -> bool:
        """Whether the peer has said something, or hung up."""
        return self._wait(0.0)

    def wait_while_draining(self) -> None:
        """Wait until the peer speaks, as long as it goes on taking what was sent: on a slow link much may be under way.

        Raises :class:`PeerTimeout` once ``timeout_ms`` has passed with neither a word nor a byte taken."""
        left = self.nr_unacknowledged()
        while not self._wait(self.timeout_ms, self.abort.fd):
            before, left = left, self.nr_unacknowledged()
            if left >= before:
                raise _channel_error(-errno.ETIMEDOUT, self.peer, self.timeout_ms)

    def nr_unacknowledged(self) -> int:
        """Bytes that were sent and that the peer's kernel has not taken yet (SIOCOUTQ, tcp(7) and unix(7))."""
        count = array("i", [0])
        fcntl.ioctl(self.fd, termios.TIOCOUTQ, count)
        return count[0]

    def pause_until(self, at: float) -> None:
        """Sleep until ``at`` on the monotonic clock, in seconds, unless ``abort`` fires."""
        left_ms = (at - time.monotonic()) * 1e3
        if left_ms > 0:
            self.abort.sleep(left_ms)

    def hand_over(self, abort: Abort, timeout_ms: float, peer: str) -> None:
        """From now on this serves another purpose than it was accepted for."""
        _tune(self._sock, timeout_ms)
        self.abort, self.timeout_ms, self.peer = abort, timeout_ms, peer

    def close(self) -> None:
        """Close at once. Idempotent."""
        if self._splice:
            lib.kmig_splice_close(self._splice)
        with suppress(OSError):
            self._sock.close()

    def close_with(self, kind: FrameKind, value: Value) -> None:
        """Say a last word if the connection still carries one, let it arrive, and close. Never raises."""
        with suppress(OSError, ChannelError, StreamError):
            if not self.broken and self.fd >= 0:
                data = encode_frame(kind, pack(value), self._sent[0])
                lib.kmig_stream_send(self.fd, data, len(data), -1, int(DRAIN_MS), self._zero_copy)
                self._drain()
        self.close()

    def _deadline(self, timeout_ms: float | None) -> float:
        return time.monotonic() + (self.timeout_ms if timeout_ms is None else timeout_ms) / 1e3

    def _drain(self) -> None:
        # Closing a TCP socket with bytes unread sends a reset, and a reset may overtake and destroy the last word.
        self._sock.shutdown(socket.SHUT_WR)
        deadline = time.monotonic() + DRAIN_MS / 1e3
        scratch = bytearray(1 << 18)
        while (left_ms := (deadline - time.monotonic()) * 1e3) > 0:
            if not self._wait(left_ms) or not self._sock.recv_into(scratch):
                return

    def _count(self, header: FrameHeader) -> None:
        due = self._incoming.sequence
        if header.sequence != due:
            raise BadField(f"frame {header.sequence} came where frame {due} was due: the stream lost or repeats frames")
        self._incoming.sequence = due + 1

    def _taken(self, deadline: float) -> Frame | None:
        """The frame of which C has read the header, and the payload if that is small; None for an optional one that is
        skipped."""
        incoming = self._incoming
        number = incoming.sequence - 1
        header = FrameHeader(incoming.kind, incoming.flags, incoming.length, incoming.checksum, number)
        known = header.kind in MAX_BYTES
        if header.kind == FrameKind.PAGES or (not known and header.mandatory):
            return Frame(header.kind)
        limit = MAX_BYTES.get(header.kind, MAX_PAYLOAD_BYTES)
        if header.length > limit:
            raise TooLarge(f"a {kind_name(header.kind)} frame of {header.length} bytes is over its limit of {limit}")
        if incoming.has_payload:
            payload = bytes(ffi.buffer(incoming.payload, header.length))
        else:
            payload = self._recv_exact(header.length, deadline)
        check_payload(header, payload)
        return Frame(header.kind, payload) if known else None

    def _check_incoming(self, rc: int) -> None:
        if rc in (-errno.EBADMSG, -errno.EPROTO, -errno.EINVAL, -errno.ESTALE):
            what = {
                errno.EBADMSG: "a frame header or a page table is damaged",
                errno.EPROTO: "a frame has a wrong magic, number or length",
                errno.EINVAL: "a page table names pages that cannot be",
                errno.ESTALE: "pages come as changes to others than are here",
            }[-rc]
            raise StreamError(f"{what} (near frame {self._incoming.sequence} of the stream from {self.peer})")
        self.check(rc)

    def _recv_exact(self, size_bytes: int, deadline: float, spin_us: int = 0) -> bytes:
        data = bytearray(size_bytes)
        left_ms = max(int((deadline - time.monotonic()) * 1e3), 0)
        view = ffi.from_buffer(data)
        rc = lib.kmig_stream_recv(self.fd, view, size_bytes, self.abort.fd, left_ms, spin_us, self._zero_copy)
        self._received(rc)
        return bytes(data)

    def _received(self, rc: int) -> int:
        """As :meth:`check`, but that something could not be received keeps nobody from sending."""
        if rc == -errno.ECANCELED:
            self.abort.check()
        if rc < 0:
            raise _channel_error(rc, self.peer, self.timeout_ms)
        return rc

    def _wait(self, timeout_ms: float, *others: int) -> bool:
        """Wait until the peer has said something or hung up, or one of ``others`` is readable."""
        deadline = time.monotonic() + timeout_ms / 1e3
        poll = select.poll()
        for fd in (self.fd, *others):
            poll.register(fd, select.POLLIN)
        while True:
            found = dict(poll.poll(max(timeout_ms, 0.0)))
            # Reports of sends by reference are no word of the peer's.
            if found.get(self.fd) != select.POLLERR or len(found) > 1 or not self.take_reports():
                return bool(found)
            timeout_ms = (deadline - time.monotonic()) * 1e3


def unexpected(frame: Frame, state: str) -> UnexpectedFrame:
    """The error for a frame that may not come in ``state``."""
    return UnexpectedFrame(f"the frame {frame.name} may not come while {state}")


def expect(channel: Channel, kind: FrameKind, timeout_ms: float | None = None, *, spin: bool = False) -> Frame:
    """The next frame, which must be of ``kind``; FAILED becomes :class:`PeerFailed`."""
    return require(channel, channel.recv(timeout_ms, spin=spin), kind)


def require(channel: Channel, frame: Frame, kind: FrameKind) -> Frame:
    """``frame`` if it is of ``kind``; FAILED becomes :class:`PeerFailed`."""
    if frame.kind == FrameKind.FAILED:
        raise Failed.from_payload(frame.payload).to_error(channel.peer)
    if frame.kind != kind:
        raise unexpected(frame, f"waiting for {kind.name}")
    return frame


def _channel_error(rc: int, peer: str, timeout_ms: float) -> ChannelError:
    if rc == -errno.ETIMEDOUT:
        return PeerTimeout(f"{peer} did not answer for {timeout_ms / 1e3:g} s: is it stopped, or the network down?")
    if rc in (-errno.ECONNRESET, -errno.EPIPE):
        return PeerClosed(f"{peer} closed the connection: look at its own output for the reason")
    return ChannelError(f"the connection to {peer} failed: {errno.errorcode.get(-rc, str(-rc))}")


def _tune(sock: socket.socket, timeout_ms: float) -> None:
    """Send small frames at once, and notice a dead peer even while nothing is sent."""
    sock.setblocking(False)
    if sock.family not in (socket.AF_INET, socket.AF_INET6):
        return
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 5)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 2)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, max(int(timeout_ms), 1))
