"""The end of a connection whose migration failed: the other side's reason, and the last word of this one."""

from __future__ import annotations

from ..errors import ChannelError, KvmigrateError, PeerFailed
from ..state.frame import FrameKind
from . import wire
from .abort import Abort
from .channel import Channel, expect

LAST_WORD_MS = 300.0
"""How long a failed connection is listened to for the other side's reason."""


def reason_of(error: BaseException, channel: Channel | None, abort: Abort) -> BaseException:
    """What the destination gave as its reason, when all we saw ourselves is a connection that died. ``abort`` ends the
    wait for it."""
    if channel is None or not isinstance(error, ChannelError):
        return error
    try:
        channel.abort = abort
        expect(channel, FrameKind.FAILED, LAST_WORD_MS)
    except PeerFailed as told:
        return told
    except KvmigrateError:
        pass
    return error


def part(channel: Channel | None, error: BaseException) -> None:
    """Close the connection, and tell why if the other side cannot know."""
    if channel is None:
        return
    if isinstance(error, PeerFailed | ChannelError):
        channel.close()
    else:
        channel.close_with(FrameKind.FAILED, wire.Failed.of(error).to_value())
