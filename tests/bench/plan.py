"""All that ``make bench`` measures, in order, and how often: all of it is to take less than twenty minutes."""

from __future__ import annotations

from . import links, loopback, saves, slots, steps
from .goals import Plan

PLANS = [
    Plan("steps", 5, steps.steps),
    Plan("slots", 3, slots.slots),
    Plan("idle", 5, loopback.idle),
    Plan("blackout", 30, loopback.blackout),
    Plan("empty", 5, loopback.empty),
    Plan("text", 3, loopback.text),
    Plan("zeros", 3, loopback.zeros),
    *loopback.hot_plans(),
    Plan("slow-text", 1, links.slow_text),
    Plan("gigabit", 2, links.gigabit),
    Plan("gigabit-lossless", 1, links.gigabit_lossless),
    Plan("gigabit-text", 2, links.gigabit_text),
    *loopback.growth_plans(),
    Plan("save", 3, saves.save),
    Plan("restore", 5, saves.restore),
    Plan("restore-sparse", 5, saves.restore_sparse),
    Plan("restore-embedded", 30, saves.restore_embedded),
]
