"""Asking a destination, over a new connection, who owns a guest after COMMIT was sent and no answer came."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress

from ..config import Address
from ..errors import ChannelError, CommitUnknown, HostError, KvmigrateError, PeerFailed, StreamError
from ..state.frame import FrameKind
from ..state.section import pack
from . import wire
from .abort import Abort
from .address import connect
from .channel import Channel, Frame, unexpected

DECIDED = (wire.Ownership.RUNNING, wire.Ownership.DISCARDED)
ASK_AGAIN_MS = (100.0, 2000.0)
"""The first and the longest wait between two questions."""


class Resolved(KvmigrateError):
    """Not an error: how the operator's word reaches the thread that waits for the destination's."""

    def __init__(self, run_here: bool) -> None:
        self.run_here = run_here
        super().__init__("resolved by the operator")


def ask(address: Address, query: wire.Query, abort: Abort, timeout_ms: float) -> wire.Answer:
    """Ask once. A decided answer is acknowledged, so that the destination need not keep it any longer.

    Raises :class:`HostError` or :class:`ChannelError` when nobody answers, :class:`StreamError` for a wrong answer,
    :class:`PeerFailed` for a refusal, and the reason ``abort`` was fired with.
    """
    channel = Channel(connect(address, abort, timeout_ms), abort, timeout_ms, str(address))
    try:
        channel.send_payloads([(FrameKind.QUERY, query.to_payload())])
        answer = _answer(channel.recv(), channel.peer)
        if answer.state in DECIDED:
            channel.send_payloads([(FrameKind.DONE, pack({}))])
        return answer
    finally:
        channel.close()


def _answer(frame: Frame, peer: str) -> wire.Answer:
    if frame.kind == FrameKind.FAILED:
        raise wire.Failed.from_payload(frame.payload).to_error(peer)
    if frame.kind != FrameKind.ANSWER:
        raise unexpected(frame, "waiting for the answer to QUERY")
    return wire.Answer.from_payload(frame.payload)


def ask_until_decided(
    address: Address,
    query: wire.Query,
    resolution: Abort,
    timeout_ms: float,
    *,
    give_up_ms: float | None,
    note: Callable[[str], str],
) -> wire.Answer:
    """Ask until the destination knows, or ``resolution`` is fired with :class:`Resolved`.

    ``note`` is told why it is still unknown, and makes a line for a person of it. Raises :class:`CommitUnknown` with
    that line when ``give_up_ms`` has passed (None: never).
    """
    give_up = None if give_up_ms is None else time.monotonic() + give_up_ms / 1e3
    wait_ms = ASK_AGAIN_MS[0]
    while True:
        try:
            answer = ask(address, query, resolution, timeout_ms)
            if answer.state in DECIDED:
                return answer
            doubt = note(answer.text)
        except Resolved as word:
            return wire.Answer(
                wire.Ownership.DISCARDED if word.run_here else wire.Ownership.RUNNING, "the operator said so"
            )
        except (HostError, ChannelError, StreamError, PeerFailed) as error:
            doubt = note(str(error))
        if give_up is not None and time.monotonic() > give_up:
            raise CommitUnknown(doubt)
        with suppress(Resolved):
            resolution.sleep(wait_ms)
        wait_ms = min(wait_ms * 2, ASK_AGAIN_MS[1])
