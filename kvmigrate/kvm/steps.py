"""Several ioctls in one call into the C core, each with what is to be found in memory afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .._core import ffi, lib
from ..record import dataclass


@dataclass(frozen=True, slots=True)
class Step:
    """One ioctl on ``fd`` with the C pointer ``arg``. With ``held`` and ``expected``, two more pointers, the
    ``size_bytes`` at both are compared after it."""

    fd: int
    request: int
    arg: Any = ffi.NULL
    held: Any = ffi.NULL
    expected: Any = ffi.NULL
    size_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of one item: the first result that is an error, or 0; and whether all of it came as it was to be."""

    rc: int
    exact: bool


class Steps:
    """``items``, each of one or more steps with the result that each is to have, as the C core takes them, to be run as
    often as wanted; the memory they point to is the caller's."""

    def __init__(self, items: Sequence[Sequence[tuple[Step, int]]]) -> None:
        self._wanted = [[rc for _, rc in item] for item in items]
        steps = [step for item in items for step, _ in item]
        self._nr_steps = len(steps)
        self._steps: Any = ffi.new("struct kmig_step[]", self._nr_steps)
        for place, step in zip(self._steps, steps, strict=True):
            place.fd, place.request, place.arg = step.fd, step.request, step.arg
            place.held, place.expected, place.expected_bytes = step.held, step.expected, step.size_bytes

    def run(self) -> list[Outcome]:
        """Make all steps in order, whatever comes of each. What came of each item."""
        lib.kmig_steps_run(self._steps, self._nr_steps)
        made = iter(self._steps)
        return [_outcome(wanted, [next(made) for _ in wanted]) for wanted in self._wanted]


def _outcome(wanted: Sequence[int], made: Sequence[Any]) -> Outcome:
    results = [step.result for step in made]
    error = next((rc for rc in results if rc < 0), 0)
    return Outcome(error, results == wanted and not any(step.differs for step in made))
