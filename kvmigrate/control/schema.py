"""What a command takes and when it may come: the rows of the command table, and the checks that they mean.

Error texts and classes are those of QEMU's own argument checks, so that a client cannot tell the difference.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from enum import Enum
from typing import Any, Generic, TypeVar

from ..contract import RunState
from ..record import dataclass
from .qmp import QmpError


class Kind(Enum):
    """The type of an argument under QMP's name, with the Python type that its JSON decodes to."""

    STRING = ("string", str)
    BOOLEAN = ("boolean", bool)
    INTEGER = ("integer", int)
    ARRAY = ("array", list)
    OBJECT = ("object", dict)

    @property
    def label(self) -> str:
        return str(self.value[0])

    def fits(self, value: object) -> bool:
        return type(value) is self.value[1]


@dataclass(frozen=True, slots=True)
class Argument:
    """One argument. ``low`` and ``high`` bound an integer, both included; ``high`` bounds a string's length."""

    name: str
    kind: Kind
    text: str
    required: bool = False
    low: int = 0
    high: int = 2**63 - 1

    def check(self, value: object) -> None:
        """Raise :class:`QmpError` unless ``value`` can be meant."""
        if not self.kind.fits(value):
            raise QmpError(f"Invalid parameter type for '{self.name}', expected: {self.kind.label}")
        if isinstance(value, int) and self.kind is Kind.INTEGER and not self.low <= value <= self.high:
            raise QmpError(f"Parameter '{self.name}' expects a value from {self.low} to {self.high}")


Vm = TypeVar("Vm")

ANY_STATE = frozenset(RunState)
LIVE = frozenset({RunState.RUNNING, RunState.PAUSED, RunState.PRELAUNCH})


@dataclass(frozen=True, slots=True)
class Command(Generic[Vm]):
    """One row: the handler gets the VM and the checked arguments, and must not block the control loop.

    ``states`` are the run states in which it may come; ``with_job`` tells whether it may come while a migration or
    a snapshot is under way.
    """

    name: str
    handler: Callable[[Vm, Mapping[str, Any]], Awaitable[object]]
    text: str
    arguments: tuple[Argument, ...] = ()
    states: frozenset[RunState] = ANY_STATE
    with_job: bool = True

    def check_arguments(self, arguments: Mapping[str, Any]) -> None:
        """Raise :class:`QmpError` for an argument that is unknown, missing, of a wrong type or out of range."""
        known = {argument.name: argument for argument in self.arguments}
        for name, value in arguments.items():
            if name not in known:
                raise QmpError(f"Parameter '{name}' is unexpected")
            known[name].check(value)
        for argument in self.arguments:
            if argument.required and argument.name not in arguments:
                raise QmpError(f"Parameter '{argument.name}' is missing")

    def check_state(self, state: RunState, job: str) -> None:
        """Raise :class:`QmpError` when the VM is in no state for this. ``job`` names the one under way, or is empty."""
        if job and not self.with_job:
            raise QmpError(f"{self.name} has to wait for the job under way ({job}): wait too, or cancel that first")
        if state not in self.states:
            allowed = " or ".join(sorted(self.states))
            raise QmpError(f"the VM is {state}, but {self.name} needs it to be {allowed}")


def table_as_markdown(commands: Mapping[str, Command[Any]]) -> str:
    """The table of docs/qmp.md, made from the very rows that the server obeys."""
    lines = ["| command | arguments | what it does | refused |", "|---|---|---|---|"]
    for command in commands.values():
        arguments = "<br>".join(_argument_cell(argument) for argument in command.arguments)
        lines.append(f"| `{command.name}` | {arguments} | {command.text} | {_refusals(command)} |")
    return "\n".join(lines) + "\n"


def _argument_cell(argument: Argument) -> str:
    optional = "" if argument.required else ", optional"
    return f"`{argument.name}` ({argument.kind.label}{optional}): {argument.text}"


def _refusals(command: Command[Any]) -> str:
    reasons = [] if command.with_job else ["during a migration, snapshot or check"]
    if command.states != ANY_STATE:
        reasons.append("unless " + " or ".join(sorted(command.states)))
    return "; ".join(reasons)
