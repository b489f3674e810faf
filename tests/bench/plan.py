"""All that ``make bench`` measures, in order, and how often.

What a goal is held against comes first: the rest is left out when the time is over.
"""

from __future__ import annotations

from . import links, linux, loopback, memories, profiles, saves, slots, steps
from .goals import Plan

PLANS = [
    Plan("steps", 5, steps.steps),
    Plan("slots", 3, slots.slots),
    Plan("idle", 3, loopback.idle),
    Plan("blackout", 10, loopback.blackout),
    Plan("empty", 3, loopback.empty),
    loopback.hot(64, 0),
    loopback.hot(256, 0),
    Plan("save", 9, saves.save),
    Plan("restore", 5, saves.restore),
    Plan("restore-sparse", 5, saves.restore_sparse),
    Plan("restore-embedded", 30, saves.restore_embedded),
    Plan("slow-text", 1, links.slow_text),
    *loopback.growth_plans(),
    Plan("text", 3, loopback.text),
    Plan("zeros", 2, loopback.zeros),
    loopback.hot(16, 0),
    *loopback.hot_at_speeds(),
    Plan("gigabit", 2, links.gigabit),
    Plan("gigabit-lossless", 1, links.gigabit_lossless),
    Plan("gigabit-text", 1, links.gigabit_text),
    Plan("memory", 5, memories.memory),
    Plan("memory-move", 5, memories.memory_moves),
    Plan("linux", linux.RUNS, linux.linux),
    Plan("profile", 1, profiles.profile),
]
