"""All that ``make bench`` measures, in order, and how often: all of it is to take less than twenty minutes."""

from __future__ import annotations

from . import moves
from .goals import Plan

PLANS = [
    Plan("idle", 5, moves.idle),
    Plan("blackout", 30, moves.blackout),
    Plan("empty", 5, moves.empty),
]
