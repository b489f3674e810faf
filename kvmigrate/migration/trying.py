"""The destination's side of a check: what a peer sends to be tried, and the answer; and all of a connection that only
checks, on a machine that is thrown away."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from ..contract import Examiner, Trial
from ..errors import (
    BadField,
    ChannelError,
    ConfigError,
    HostError,
    KvmigrateError,
    PeerFailed,
    PeerTimeout,
    RestoreRefused,
)
from ..state.fidelity import Fidelity
from ..state.frame import FrameKind
from ..state.section import Section, Value, unpack
from . import wire
from .blackout import Stopwatch
from .channel import Channel, Frame, expect
from .checks import Check, Checked


def read_description(frame: Frame, hello: wire.Hello) -> Mapping[str, Value]:
    """What a CONFIG frame says. Raises :class:`StreamError`, also when it is not the guest that HELLO named."""
    description = unpack(frame.payload, "a CONFIG frame")
    if not isinstance(description, dict):
        raise BadField("CONFIG: expected a map")
    if description.get("uuid") != hello.uuid:
        raise BadField("CONFIG: field 'uuid' is not the one of HELLO")
    return description


def take_check(channel: Channel, frame: Frame) -> tuple[Check, list[Section]]:
    """What the CHECK ``frame`` announces, and the sections after it. Raises :class:`StreamError` and
    :class:`ChannelError`."""
    check = Check.from_payload(frame.payload)
    return check, channel.recv_sections(check.sections, check.sections_bytes)


def answer_check(channel: Channel, check: Check, sections: Sequence[Section], trial: Trial, build_ms: float) -> None:
    """Try ``sections`` on ``trial``, which took ``build_ms`` to build, say CHECKED and close it. Raises
    :class:`StreamError` and :class:`ChannelError`; that this host cannot hold the state is no error but the answer."""
    watch = Stopwatch()
    try:
        fidelity = trial.load(sections, check.resident_bytes)
        checked = Checked.of(fidelity, build_ms, watch.lap())
        channel.send_payloads([(FrameKind.CHECKED, checked.to_payload())])
    finally:
        # The source goes on meanwhile.
        trial.close()


class _NoTrial:
    """In place of a machine that cannot be built here, which is the answer."""

    def __init__(self, error: KvmigrateError) -> None:
        self._error = error

    def load(self, sections: Sequence[Section], resident_bytes: int) -> Fidelity:
        fidelity = Fidelity()
        fidelity.refused("machine", None, None, str(self._error))
        return fidelity

    def close(self) -> None:
        return


def _make(examiner: Examiner, description: Mapping[str, Value]) -> Trial:
    try:
        return examiner(description)
    except (ConfigError, HostError, RestoreRefused) as error:
        return _NoTrial(error)


def serve_check(channel: Channel, hello: wire.Hello, examiner: Examiner) -> None:
    """All of a connection that only checks, after both HELLOs, and its end. Raises nothing: what goes wrong costs the
    peer his answer, and whoever waits for a guest waits on. The peer has the channel's timeout for all that he says.
    """
    budget = _Budget(channel)
    try:
        description = read_description(budget.expect(FrameKind.CONFIG), hello)
        channel.send(FrameKind.ACCEPT, {})
        frame = budget.expect(FrameKind.CHECK)
        budget.spend()
        check, sections = take_check(channel, frame)
        watch = Stopwatch()
        trial = _make(examiner, description)
        answer_check(channel, check, sections, trial, watch.lap())
    except (ChannelError, PeerFailed):
        pass
    except Exception as error:  # also a fault of our own, which must not end the one who waits
        channel.close_with(FrameKind.FAILED, wire.Failed.of(error).to_value())
    finally:
        channel.close()


class _Budget:
    """One timeout for several waits on ``channel``."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._until = time.monotonic() + channel.timeout_ms / 1e3

    def spend(self) -> None:
        """From here on the channel waits no longer than is left. Raises :class:`PeerTimeout` when nothing is."""
        left_ms = (self._until - time.monotonic()) * 1e3
        if left_ms <= 0:
            raise PeerTimeout(f"{self._channel.peer} took too long for a check")
        self._channel.timeout_ms = left_ms

    def expect(self, kind: FrameKind) -> Frame:
        """See :func:`kvmigrate.migration.channel.expect`."""
        self.spend()
        return expect(self._channel, kind)
