"""The three ways to become a VM process, each of which stays until its guest ends: boot, restore, receive."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from types import FrameType

from ..config import Address, ClockPolicy, HostSide, MachineConfig
from ..errors import ControlError
from ..machine.machine import Machine
from ..machine.rehearsal import rehearse
from ..machine.trial import TrialMachine
from ..migration.address import Listener
from ..migration.journal import Entry, Journal, Role
from ..state.fidelity import Fidelity
from ..state.section import Value
from . import runtime
from .leases import leased
from .session import STATUS_STOPPED, Exit, Session

ShowFidelity = Callable[[Fidelity], None]
"""Told what became of every item of state once it is loaded."""


class _Stopped(BaseException):
    """A signal came before the control loop could take it."""


def run_machine(config: MachineConfig, *, paused: bool = False) -> int:
    """Boot ``config`` and stay until the guest ends. Returns the exit status; raises a :class:`KvmigrateError` when it
    never ran."""
    with _session(config.name) as session:
        machine = Machine.create(config)
        session.adopt(machine)
        return _live(session, lambda _: _let_go(machine, paused=paused))


def _let_go(machine: Machine, *, paused: bool) -> None:
    machine.start()
    if not paused:
        machine.resume()


def run_restored(
    directory: Path,
    here: HostSide,
    *,
    paused: bool = False,
    show: ShowFidelity | None = None,
    clone: bool = False,
    clock: ClockPolicy = ClockPolicy.CONTINUE,
) -> int:
    """Restore the snapshot ``directory`` and stay until the guest ends; it stays paused if it was, or if so wanted.

    A ``clone`` is another guest than the saved one, so there may be any number of them; else the snapshot is held."""
    from ..snapshot.load import restore

    with _session(here.name, held=None if clone else directory) as session:
        restored = restore(directory, partial(Machine.build, here=here, clone=clone, clock=clock))
        machine = restored.machine
        assert isinstance(machine, Machine)
        session.adopt(machine)
        machine.new_generation()
        if show is not None:
            show(restored.fidelity)
        wait = paused or not restored.description["autostart"]
        return _live(session, lambda _: _restart(machine, paused=wait))


def _restart(machine: Machine, *, paused: bool) -> None:
    machine.start()
    if paused:
        machine.pause()
    else:
        machine.resume()


def run_incoming(address: Address, here: HostSide, *, paused: bool = False, show: ShowFidelity | None = None) -> int:
    """Wait at ``address`` for one guest, take it over and stay until it ends."""
    with _session(here.name) as session:
        listener = Listener(address)

        def build(value: Mapping[str, Value]) -> Machine:
            machine = Machine.build(value, here)
            session.adopt(machine)
            return machine

        examine = partial(TrialMachine.examine, here=here)
        # Before a source comes: it would wait for it.
        rehearse()
        if show is not None:
            session.on_arrival = show
        print(f"kvmigrate: {here.name} waits for a guest at {listener.address}", file=sys.stderr, flush=True)
        return _live(session, lambda live: live.receive(listener, build, examine, paused=paused))


def _live(session: Session, begin: Callable[[Session], None]) -> int:
    how: Exit = asyncio.run(session.live(begin))
    if how.error is not None:
        raise how.error
    if how.text:
        print(f"kvmigrate: {how.text}", file=sys.stderr, flush=True)
    return how.status


@contextmanager
def _session(name: str, held: Path | None = None) -> Iterator[Session]:
    """A session that holds ``name``, and the snapshot ``held``; everything it took is given back at the end, however
    that comes, and the guest first."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.signal(number, _stopped) for number in numbers]
    try:
        claim = runtime.claim(name)
        try:
            _require_settled(claim)
            with leased(held, claim) if held else nullcontext():
                session = Session(claim)
                try:
                    yield session
                finally:
                    session.close()
        except _Stopped:
            raise SystemExit(STATUS_STOPPED) from None
        finally:
            claim.release()
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def _stopped(number: int, frame: FrameType | None) -> None:
    raise _Stopped(number)


def _require_settled(claim: runtime.Claim) -> None:
    """Refuse a name under which a guest may be running elsewhere while its source's process is gone."""
    found = Journal(claim.directory, claim.name).read()
    if found is not None and found.role is Role.SOURCE and found.state is Entry.COMMITTED:
        raise ControlError(
            f"the guest {claim.name} was being handed to {found.peer} when its process died: see whether it runs there,"
            f" then kvmigrate resolve {claim.name} --discard"
        )
