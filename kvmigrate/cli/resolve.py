"""The verb resolve: the operator's word on who owns a guest whose migration was cut off in its handover."""

from __future__ import annotations

from ..control import runtime
from ..control.client import Client
from ..errors import ConfigError, ControlError


def resolve(name: str, *, run: bool, discard: bool) -> int:
    """Settle the guest ``name``, in its process if that lives, else in what it left behind."""
    if run == discard:
        raise ConfigError("say --run if the guest runs nowhere else, or --discard if it runs at the destination")
    runtime.check_name(name)
    if runtime.is_running(name):
        with Client.of(name) as vm:
            vm.execute("x-kvmigrate-resolve", {"action": "run" if run else "discard"})
        print(f"{name}: " + ("runs here" if run else "discarded here, it runs at the destination"))
        return 0
    held = runtime.claim(name)
    try:
        _resolve_dead(held, run=run)
    finally:
        held.release()
    return 0


def _resolve_dead(held: runtime.Claim, *, run: bool) -> None:
    """The process is gone: only its journal is left, and that can only be put away."""
    from ..migration.journal import Journal

    journal = Journal(held.directory, held.name)
    found = journal.read()
    if found is None:
        raise ControlError(f"no guest named {held.name} is in doubt here")
    if run:
        raise ControlError(
            f"the process that held {held.name} is gone, and the guest's memory with it: it cannot run here any more,"
            f" look for it at {found.peer} and use --discard"
        )
    journal.remove()
    print(f"{held.name}: discarded here, its name is free again")
