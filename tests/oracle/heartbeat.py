"""What the heartbeats on the serial ports of all sides prove, taken together.

The bytes of the sides in the order of the hops are one stream: a line may begin at the source and end at the
destination. In it each vCPU's numbers count up by one, with none missing and none twice. A guest that ran in two
places would send the same numbers twice; one that was resumed from old registers would repeat some.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from .recorder import SerialLog

OVERLAP_TOLERANCE_S = 0.020
"""How late the recorder may notice a chunk on this machine; two running guests overlap for as long as both live."""


class OracleError(AssertionError):
    """A witness saw something that must not be. ``oracle`` names the witness."""

    def __init__(self, oracle: str, text: str) -> None:
        super().__init__(f"{oracle}: {text}")
        self.oracle = oracle


@dataclass(frozen=True)
class Verdict:
    """``beats``: the last number of each vCPU. ``blackouts_ms``: the silence at each hop, seen from outside."""

    beats: dict[int, int]
    blackouts_ms: tuple[float, ...]
    ended: bool


def judge(sides: Sequence[SerialLog]) -> Verdict:
    """Raise :class:`OracleError` unless the ``sides``, in the order of the hops, show one guest that ran once."""
    beats: dict[int, int] = {}
    ended = False
    lines = b"".join(side.data for side in sides).decode("ascii", "replace").split("\n")
    for number, line in enumerate(lines[:-1]):
        if line.startswith("BAD"):
            raise OracleError("ledger", line)
        if line.startswith("H "):
            _count(beats, line, number)
        ended |= line.startswith("OK ")
    return Verdict(beats, tuple(_blackouts_ms(sides)), ended)


def judge_restored(saved: SerialLog, restored: SerialLog) -> Verdict:
    """Raise :class:`OracleError` unless ``restored`` goes on from a moment of ``saved``, which ran on after it."""
    whole = judge([saved])
    _, _, text = restored.text.partition("\n")  # the first line may have begun before the snapshot
    beats: dict[int, int] = {}
    for number, line in enumerate(text.split("\n")[:-1]):
        if line.startswith("BAD"):
            raise OracleError("ledger", line)
        if line.startswith("H "):
            cpu, beat = (int(word) for word in line.split(" ")[1:3])
            if cpu not in beats and not 1 < beat <= whole.beats[cpu] + 1:
                raise OracleError("heartbeat", f"restored vCPU {cpu} starts at {beat}; saved: {whole.beats[cpu]}")
            beats.setdefault(cpu, beat - 1)
            _count(beats, line, number)
    if beats.keys() != whole.beats.keys():
        raise OracleError("heartbeat", f"vCPUs {sorted(beats)} run after the restore, not {sorted(whole.beats)}")
    return Verdict(beats, (), "OK " in text)


def _count(beats: dict[int, int], line: str, number: int) -> None:
    words = line.split(" ")
    if len(words) not in (3, 5) or not all(word.isascii() and word.isdigit() for word in words[1:]):
        raise OracleError("heartbeat", f"line {number} is damaged: {line!r}")
    cpu, beat = int(words[1]), int(words[2])
    if beat != beats.get(cpu, 0) + 1:
        raise OracleError("heartbeat", f"vCPU {cpu} sent {beat} after {beats.get(cpu, 0)} (line {number})")
    beats[cpu] = beat


def _blackouts_ms(sides: Sequence[SerialLog]) -> list[float]:
    spoke = [side for side in sides if side.chunks]
    found = []
    for source, destination in pairwise(spoke):
        silence_s = destination.first_s - source.last_s
        if silence_s < -OVERLAP_TOLERANCE_S:
            raise OracleError("heartbeat", f"{source.side} spoke {-silence_s * 1000:.0f} ms after {destination.side}")
        found.append(max(silence_s, 0.0) * 1000)
    return found


def require_progress(log: SerialLog, beats: int = 20, timeout_s: float = 60.0) -> None:
    """Raise :class:`OracleError` unless the guest at ``log`` sends that many more heartbeats."""
    try:
        log.wait_bytes(beats * 8, timeout_s)
    except AssertionError as error:
        raise OracleError("heartbeat", str(error)) from None


def require_silence(log: SerialLog, seconds: float = 0.3) -> None:
    """Raise :class:`OracleError` when the guest at ``log`` sends anything within ``seconds``."""
    before = len(log.data)
    time.sleep(seconds)
    if len(log.data) != before:
        raise OracleError("heartbeat", f"{log.side} runs, though it must not: {log.text[-80:]!r}")
