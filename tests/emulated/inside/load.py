"""What a Linux guest does while it moves, all of it checked by itself: see ``load.c``."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence

from tests.oracle.world import Process

from .linux import said

KINDS = {
    "memory": "memory 2",
    "file": "file 1 /dev/vda",
    "stream": "download {port} {server}",
}
PATIENCE_S = 180.0


def start_load(guest: Process, server: str, port: int) -> None:
    """Have ``guest`` rewrite and verify memory and its disk, and check what it downloads from ``server``."""
    for name, work in KINDS.items():
        said(guest, f"load /tmp/{name} {work.format(server=server, port=port)} &")
    wait_for_rounds(guest, tuple(KINDS))


def stop_load(guest: Process, kinds: Sequence[str]) -> None:
    """End these ``kinds`` of work; the others go on."""
    for name in kinds:
        said(guest, f"pkill -f '^load /tmp/{name} '")


def wait_for_rounds(guest: Process, kinds: Sequence[str], more: int = 1) -> None:
    """Return once each kind of work is ``more`` whole rounds further than now, with nothing found wrong."""
    goals = {kind: rounds + more + 1 for kind, rounds in _rounds(guest, kinds).items()}
    deadline = time.monotonic() + PATIENCE_S
    while True:
        now = _rounds(guest, kinds)
        if all(now[kind] >= goals[kind] for kind in kinds):
            return
        assert time.monotonic() < deadline, f"{now} rounds, not {goals}"
        time.sleep(0.5)


def _rounds(guest: Process, kinds: Sequence[str]) -> dict[str, int]:
    lines = said(guest, "; ".join(f"cat /tmp/{kind} 2>/dev/null || echo 0 rounds" for kind in kinds))
    assert len(lines) == len(kinds) and all(re.fullmatch(r"\d+ rounds", line) for line in lines), lines
    return {kind: int(line.split()[0]) for kind, line in zip(kinds, lines, strict=True)}
