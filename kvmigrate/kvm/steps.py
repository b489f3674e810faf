"""Several ioctls in one call into the C core, each with what is to be found in memory afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .._core import ffi, lib
from ..record import dataclass


@dataclass(frozen=True, slots=True)
class Step:
    """One ioctl, whose argument is ``arg`` bytes into the memory that it is made on. The ``size_bytes`` at ``held`` and
    at ``expected`` are compared after it."""

    request: int
    arg: int
    held: int = 0
    expected: int = 0
    size_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of one item: the first result that is an error, or 0; and whether all of it came as it was to be."""

    rc: int
    exact: bool


_EXACT = Outcome(0, True)


class Steps:
    """``items``, each of one or more steps with the result that each is to have, as the C core takes them: for any
    memory in which the same things lie at the same places."""

    def __init__(self, items: Sequence[Sequence[tuple[Step, int]]]) -> None:
        self._nr_items = len(items)
        self._all_exact = [_EXACT] * len(items)
        steps = [
            [step.request, step.arg, step.held, step.expected, step.size_bytes, number, wanted]
            for number, item in enumerate(items)
            for step, wanted in item
        ]
        self._nr_steps = len(steps)
        self._steps: Any = ffi.new("struct kmig_step[]", steps)

    def run(self, fd: int, memory: Any) -> list[Outcome]:
        """Make all steps on ``fd`` and the C pointer ``memory``, in order, whatever comes of each. What came of each
        item."""
        outcomes = ffi.new("struct kmig_outcome[]", self._nr_items)
        if lib.kmig_steps_run(fd, memory, self._steps, self._nr_steps, outcomes):
            return self._all_exact
        return [Outcome(outcome.rc, not outcome.differs) for outcome in outcomes]
