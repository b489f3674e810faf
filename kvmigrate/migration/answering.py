"""The destination's listening socket beside a migration and after it: answers QUERY until nobody can ask, and lets
further connections join the guest that is on its way in."""

from __future__ import annotations

import socket
from collections.abc import Callable
from contextlib import suppress

from ..errors import Cancelled, KvmigrateError, StateError
from ..state.frame import FrameKind
from ..threads import Thread
from . import wire
from .abort import Abort
from .address import Listener
from .asking import DECIDED
from .channel import Channel, Frame, unexpected
from .custody import Custody

ANSWER_TIMEOUT_MS = 2000.0


class Answering:
    """Answers from ``custody`` in a thread until that is settled or :meth:`stop` comes; then closes ``listener``.

    ``join`` is given each connection that begins with JOIN, and takes it over or raises."""

    def __init__(self, listener: Listener, custody: Custody, join: Callable[[Channel, Frame], None]) -> None:
        self._listener = listener
        self._custody = custody
        self._join = join
        self._stop = Abort()
        self._thread = Thread(self._run)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Answer no more. Idempotent."""
        self._stop.fire(Cancelled("the destination ends"))
        self._thread.join(ANSWER_TIMEOUT_MS / 1e3)

    def _run(self) -> None:
        with suppress(Cancelled):
            while not self._custody.told.is_set():
                sock = self._listener.accept(self._stop)
                if sock is not None:
                    self._answer(sock)
        self._listener.close()
        self._stop.close()

    def _answer(self, sock: socket.socket) -> None:
        channel = Channel(sock, self._stop, ANSWER_TIMEOUT_MS, "the one who asks")
        try:
            frame = channel.recv()
            if frame.kind == FrameKind.JOIN:
                self._join(channel, frame)
                return
            if frame.kind != FrameKind.QUERY:
                raise StateError("busy with another guest", "waiting for one")
            answer = self._custody.answer(wire.Query.from_payload(frame.payload))
            if send_answer(channel, answer):
                self._custody.settle()
        except KvmigrateError as error:
            # Whoever connects may send anything: it costs him his connection and nothing else.
            channel.close_with(FrameKind.FAILED, wire.Failed.of(error).to_value())
        channel.close()


def send_answer(channel: Channel, answer: wire.Answer) -> bool:
    """Answer; True when a decision arrived, which the one who asked confirms by DONE."""
    channel.send_payloads([(FrameKind.ANSWER, answer.to_payload())])
    if answer.state not in DECIDED:
        return False
    frame = channel.recv()
    if frame.kind != FrameKind.DONE:
        raise unexpected(frame, "waiting for DONE")
    return True
