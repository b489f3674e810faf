"""A TCP proxy between source and destination that knows where frames begin, and strikes at a chosen one.

It listens where the source believes the destination to be. A :class:`Strike` names a kind of frame (which also says
the direction) and what happens when it comes by, before it is passed on.
"""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from enum import Enum
from types import TracebackType

from kvmigrate._core import lib
from kvmigrate.snapshot.sink import PAGES_HEAD, RUN
from kvmigrate.state.frame import HEADER, FrameKind, decode_header

CHUNK_BYTES = 1 << 16
NOTHING = struct.pack("ii", 1, 0)  # SO_LINGER: close with a reset


class Action(Enum):
    """What happens to the link, or to one of its ends."""

    CUT = "cut"
    RESET = "reset"
    STALL = "stall"
    CORRUPT = "corrupt"
    CALL = "call"


@dataclass
class Strike:
    """At the first frame of ``kind``, once a frame of ``after`` has come by if there is one; of PAGES the first whose
    last page with data is in ``gfns``, if they are given. ``call`` (for :attr:`Action.CALL`) does something to
    ``victim``.

    ``down``: from then on no new connection is let through either, until :meth:`Proxy.mend`. ``further``: only on a
    further connection of the migration; otherwise only PAGES are struck there too.
    """

    kind: FrameKind
    action: Action
    gfns: range | None = None
    down: bool = False
    further: bool = False
    after: FrameKind | None = None
    victim: str = ""
    call: Callable[[], None] = lambda: None
    said: str = ""
    struck: threading.Event = field(default_factory=threading.Event)


class Proxy:
    """Passes frames between whoever connects and ``target``, in threads of its own. A context manager."""

    def __init__(self, target: tuple[str, int], strike: Strike | None = None) -> None:
        self._target = target
        self._strike = strike
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._sockets: list[socket.socket] = []
        self._down = threading.Event()
        self._mended = threading.Event()
        self._lock = threading.Lock()
        self._taken = False
        self.kinds: list[FrameKind] = []

    @property
    def address(self) -> str:
        return f"tcp://127.0.0.1:{self._listener.getsockname()[1]}"

    def __enter__(self) -> Proxy:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._mended.set()
        self._listener.close()
        self.drop()

    def drop(self) -> None:
        """Close what is open: a stalled link is found dead at last."""
        for sock in self._sockets:
            _close(sock)

    def mend(self) -> None:
        """Let connections through again."""
        self._down.clear()
        self._mended.set()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            if self._down.is_set():
                _close(near)
                continue
            try:
                far = socket.create_connection(self._target, 5)
            except OSError:
                _close(near)
                continue
            self._sockets += [near, far]
            joined = threading.Event()
            for one, other in ((near, far), (far, near)):
                threading.Thread(target=self._pass_on, args=(one, other, joined), daemon=True).start()

    def _pass_on(self, source: socket.socket, sink: socket.socket, joined: threading.Event) -> None:
        """Frames from ``source`` to ``sink`` until either ends; then both do."""
        with suppress(OSError, EOFError):
            source.settimeout(None)
            source.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            while self._frame(source, sink, joined):
                pass
        _close(source)
        _close(sink)

    def _frame(self, source: socket.socket, sink: socket.socket, joined: threading.Event) -> bool:
        head = _read(source, HEADER.size)
        header = decode_header(head)
        kind = FrameKind(header.kind)
        self.kinds.append(kind)
        if kind is FrameKind.JOIN:
            joined.set()
        gfn = None
        if kind is FrameKind.PAGES:
            table, gfn = _page_table(source)
            head += table
        with self._lock:
            strike = self._due(kind, joined.is_set(), gfn)
        if strike and not self._hit(strike, source, sink):
            return False
        sink.sendall(head)
        damage = strike is not None and strike.action is Action.CORRUPT
        _copy(source, sink, HEADER.size + header.length - len(head) - damage)
        if damage:
            # One bit of the payload's last byte, which for PAGES is a byte of guest memory.
            sink.sendall(bytes([_read(source, 1)[0] ^ 0x04]))
        return True

    def _due(self, kind: FrameKind, joined: bool, gfn: int | None) -> Strike | None:
        strike = self._strike
        if strike is None or strike.kind is not kind or self._taken:
            return None
        if strike.further != joined and (strike.further or kind is not FrameKind.PAGES):
            return None
        if strike.after is not None and strike.after not in self.kinds:
            return None
        if kind is FrameKind.PAGES and strike.gfns is not None and gfn not in strike.gfns:
            return None
        self._taken = True
        return strike

    def _hit(self, strike: Strike, source: socket.socket, sink: socket.socket) -> bool:
        """Whether the frame may still go its way."""
        if strike.down:
            self._down.set()
        if strike.action is Action.CALL:
            strike.call()
        strike.struck.set()
        if strike.action in (Action.CALL, Action.CORRUPT):
            return True
        if strike.action is Action.STALL:
            self._mended.wait()
        if strike.action is Action.RESET:
            for sock in (source, sink):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, NOTHING)
        return False


def _page_table(sock: socket.socket) -> tuple[bytes, int | None]:
    """What comes before the data of a PAGES frame, and the last page that has data."""
    begin = _read(sock, PAGES_HEAD.size)
    nr_runs, _, _ = PAGES_HEAD.unpack(begin)
    table = _read(sock, nr_runs * RUN.size)
    last = [gfn + nr_pages - 1 for gfn, nr_pages, kind in RUN.iter_unpack(table) if kind != lib.KMIG_RUN_ZERO]
    return begin + table, last[-1] if last else None


def _copy(source: socket.socket, sink: socket.socket, count: int) -> None:
    while count:
        data = _read(source, min(count, CHUNK_BYTES))
        sink.sendall(data)
        count -= len(data)


def _read(sock: socket.socket, count: int) -> bytes:
    data = bytearray()
    while len(data) < count:
        chunk = sock.recv(count - len(data))
        if not chunk:
            raise EOFError
        data += chunk
    return bytes(data)


def _close(sock: socket.socket) -> None:
    with suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)
    with suppress(OSError):
        sock.close()
