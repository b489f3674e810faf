"""Further connections for the pages of one migration: how the source opens them and says whose they are.

The feature ``connections`` in HELLO says that they will come. Each begins with JOIN, which the destination sends back
once it listens there for pages. One that has pages of the last round says LAST before them and DONE after them.
"""

from __future__ import annotations

from typing import Self

from ..config import MAX_CONNECTIONS, Address
from ..errors import BadField, ChannelError, HostError
from ..record import asdict, dataclass
from ..state.frame import FrameKind
from ..state.section import Fields, pack, unpack
from .abort import Abort
from .address import connect
from .channel import Channel, expect

CONNECTIONS = "connections"
"""The feature of HELLO."""


@dataclass(frozen=True, slots=True)
class Join:
    """Connection ``number`` of ``of``, the first of which is number 1, for the guest ``uuid`` in attempt ``epoch``."""

    uuid: str
    epoch: int
    number: int
    of: int

    def to_payload(self) -> bytes:
        """The frame's payload."""
        return pack(asdict(self))

    @classmethod
    def from_payload(cls, payload: bytes) -> Self:
        """Decode a hostile payload. Raises :class:`StreamError`."""
        fields = Fields(unpack(payload, "a JOIN frame"), FrameKind.JOIN.name)
        uuid, epoch = fields.text("uuid", 64), fields.integer("epoch")
        number, of = (fields.integer(key, 2, MAX_CONNECTIONS) for key in ("number", "of"))
        fields.done()
        if number > of:
            raise BadField(f"JOIN: connection {number} of {of} cannot be")
        return cls(uuid, epoch, number, of)


def dial(address: Address, abort: Abort, timeout_ms: float) -> Channel:
    """A connection to a destination. Raises :class:`ChannelError`, :class:`HostError` and ``abort``'s reason."""
    return Channel(connect(address, abort, timeout_ms), abort, timeout_ms, str(address))


def open_further(first: Channel, address: Address, uuid: str, epoch: int, of: int) -> list[Channel]:
    """Connections 2 to ``of`` beside ``first``. Raises what :func:`dial` and :func:`expect` raise, with none open."""
    opened: list[Channel] = []
    try:
        for number in range(2, of + 1):
            try:
                channel = dial(address, first.abort, first.timeout_ms)
            except HostError as error:
                # The first one came through: something between lets no more than one.
                raise ChannelError(f"connection {number} of {of}: {error}; --connections 1 needs one only") from error
            opened.append(channel)
            channel.peer = f"{address} (connection {number} of {of})"
            payload = Join(uuid, epoch, number, of).to_payload()
            channel.send_payloads([(FrameKind.JOIN, payload)])
            if expect(channel, FrameKind.JOIN).payload != payload:
                raise BadField(f"{channel.peer} answers for another connection")
    except BaseException:
        for channel in opened:
            channel.close()
        raise
    return opened
