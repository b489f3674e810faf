"""The run state of a machine: which moves between states there are, and who is told of one."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

from ..contract import RunState
from ..errors import StateError

MOVES: dict[RunState, frozenset[RunState]] = {
    RunState.PRELAUNCH: frozenset({RunState.RUNNING, RunState.PAUSED, RunState.SAVE_VM, RunState.FINISH_MIGRATE}),
    RunState.INMIGRATE: frozenset({RunState.RUNNING, RunState.PAUSED}),
    RunState.RUNNING: frozenset({RunState.PAUSED, RunState.SAVE_VM, RunState.FINISH_MIGRATE}),
    RunState.PAUSED: frozenset({RunState.RUNNING, RunState.SAVE_VM, RunState.FINISH_MIGRATE}),
    RunState.SAVE_VM: frozenset({RunState.RUNNING, RunState.PAUSED}),
    RunState.FINISH_MIGRATE: frozenset({RunState.RUNNING, RunState.PAUSED, RunState.POSTMIGRATE}),
    RunState.POSTMIGRATE: frozenset({RunState.RUNNING}),
    RunState.INTERNAL_ERROR: frozenset(),
    RunState.SHUTDOWN: frozenset(),
}
"""Where a machine may go from each state, beside SHUTDOWN and INTERNAL_ERROR, which the guest may enter by itself."""

_ENDS = frozenset({RunState.SHUTDOWN, RunState.INTERNAL_ERROR})


class RunStateBox:
    """Holds the state; refuses a move that :data:`MOVES` has not. ``on_change`` is called after each move, in their
    order, by one thread at a time."""

    def __init__(self, state: RunState) -> None:
        self._lock = threading.Lock()
        self._telling = threading.Lock()
        self._untold: deque[RunState] = deque()
        self.state = state
        self.on_change: Callable[[RunState], None] = lambda _: None

    @property
    def runs(self) -> bool:
        return self.state is RunState.RUNNING

    @property
    def ended(self) -> bool:
        return self.state in _ENDS

    def move(self, to: RunState) -> None:
        """Enter ``to``, and tell. Raises :class:`StateError`."""
        self.enter(to)
        self.tell()

    def enter(self, to: RunState) -> None:
        """Enter ``to``, of which :meth:`tell` tells; entering the present state again is no move. Raises
        :class:`StateError`."""
        with self._lock:
            if to is self.state:
                return
            self.require(to)
            self.state = to
            self._untold.append(to)

    def tell(self) -> None:
        """Tell of each move of which nobody has told."""
        with self._telling:
            while self._untold:
                self.on_change(self._untold.popleft())

    def require(self, to: RunState) -> None:
        """Raise :class:`StateError` unless there is a move from the present state to ``to``."""
        if self.ended or (to not in MOVES[self.state] and to not in _ENDS):
            allowed = sorted(state.value for state, targets in MOVES.items() if to in targets)
            raise StateError(self.state.value, " or ".join(allowed) or "started anew")
