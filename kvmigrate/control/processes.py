"""The three ways to become a VM process, each of which stays until its guest ends: boot, restore, receive."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from ..config import Address, ClockPolicy, HostSide, MachineConfig, MemoryBackend
from ..errors import ConfigError, ControlError
from ..machine.machine import Machine
from ..migration.journal import Entry, Journal, Role
from ..state.fidelity import Fidelity
from ..state.section import Value
from . import runtime
from .ending import STATUS_STOPPED, Exit
from .leases import leased

if TYPE_CHECKING:
    from ..memory.prefault import SpareMemory
    from .session import Session

SWITCH_INTERVAL_S = 0.0005
"""How long one Python thread may make another wait, which may be a vCPU's with an exit in hand, or the blackout's."""
ShowFidelity = Callable[[Fidelity], None]
"""Told what became of every item of state once it is loaded."""


class _Stopped(BaseException):
    """A signal came before the control loop could take it."""


_signals: list[int] = []
"""Those that came. An exception that is raised inside of a finalizer or a weak reference's callback (the import system
has some) goes no further: then the control loop finds the signal here."""


def run_machine(config: MachineConfig, *, paused: bool = False) -> int:
    """Boot ``config`` and stay until the guest ends. Returns the exit status; raises a :class:`KvmigrateError` when it
    never ran."""
    with _claimed(config.name) as claim, closing(Machine.create(config)) as machine:
        machine.start()
        if not paused:
            machine.resume()
        return _serve(claim, machine)


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

    with _claimed(here.name, held=None if clone else directory) as claim:
        restored = restore(directory, partial(Machine.build, here=here, clone=clone, clock=clock))
        machine = restored.machine
        assert isinstance(machine, Machine)
        with closing(machine):
            machine.new_generation()
            if show is not None:
                show(restored.fidelity)
            if paused or not restored.description["autostart"]:
                machine.pause()
            else:
                machine.resume()
            return _serve(claim, machine)


def run_incoming(
    address: Address,
    here: HostSide,
    *,
    prefault_bytes: int = 0,
    paused: bool = False,
    show: ShowFidelity | None = None,
) -> int:
    """Wait at ``address`` for one guest, take it over and stay until it ends. A guest with ``prefault_bytes`` of memory
    finds all of it touched."""
    from ..machine import spare_vm
    from ..machine.rehearsal import rehearse
    from ..machine.trial import TrialMachine
    from ..migration.address import Listener

    with ExitStack() as stack:
        session = stack.enter_context(_session(stack.enter_context(_claimed(here.name))))
        listener = Listener(address)
        stack.callback(listener.close)
        spare = _spare(prefault_bytes, here.memory_backend, stack)

        def build(value: Mapping[str, Value]) -> Machine:
            machine = Machine.build(value, here, make_memory=spare.take if spare else None)
            session.adopt(machine)
            return machine

        def examine(description: Mapping[str, Value]) -> TrialMachine:
            return TrialMachine.examine(description, here, touched_bytes=spare.touched_bytes if spare else 0)

        # Before a source comes: it would wait for it.
        spare_vm.set_aside()
        rehearse()
        if show is not None:
            session.on_arrival = show
        print(f"kvmigrate: {here.name} waits for a guest at {listener.address}", file=sys.stderr, flush=True)
        return _live(session, lambda live: live.receive(listener, build, examine, paused=paused))


def _spare(size_bytes: int, backend: MemoryBackend, stack: ExitStack) -> SpareMemory | None:
    if not size_bytes:
        return None
    from ..machine.room import available_bytes
    from ..memory import huge
    from ..memory.prefault import SpareMemory

    if backend is MemoryBackend.HUGETLBFS:
        huge.require(size_bytes)
    elif size_bytes > (available := available_bytes()):
        raise ConfigError(f"--prefault {size_bytes >> 20} MiB: this host has {available >> 20} MiB to give")
    print(f"kvmigrate: touching {size_bytes >> 20} MiB of memory", file=sys.stderr, flush=True)
    return stack.enter_context(closing(SpareMemory(size_bytes, backend)))


def _serve(claim: runtime.Claim, machine: Machine) -> int:
    """Stay with a guest that runs. What serves it is loaded only now: the guest need not wait for that."""
    with _session(claim) as session:
        session.adopt(machine)
        return _live(session, lambda _: None)


def _live(session: Session, begin: Callable[[Session], None]) -> int:
    import asyncio

    def begin_unless_stopped(live: Session) -> None:
        if _signals:
            live.signalled(_signals[0])
        else:
            begin(live)

    how: Exit = asyncio.run(session.live(begin_unless_stopped))
    if how.error is not None:
        raise how.error
    if how.text:
        print(f"kvmigrate: {how.text}", file=sys.stderr, flush=True)
    return how.status


@contextmanager
def _session(claim: runtime.Claim) -> Iterator[Session]:
    from .session import Session

    with closing(Session(claim)) as session:
        yield session


@contextmanager
def _claimed(name: str, held: Path | None = None) -> Iterator[runtime.Claim]:
    """Hold ``name``, and the snapshot ``held``; everything is given back at the end, however that comes. A signal ends
    the process in good order from here on, by its exit status."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    _signals.clear()
    # From the start: the guest runs while all that serves it is still being loaded.
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    hook, sys.unraisablehook = sys.unraisablehook, _unraisable
    before = [signal.signal(number, _stopped) for number in numbers]
    try:
        claim = runtime.claim(name)
        try:
            _require_settled(claim)
            with leased(held, claim) if held else nullcontext():
                claim.listen()
                yield claim
        except _Stopped:
            raise SystemExit(STATUS_STOPPED) from None
        finally:
            claim.release()
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
        sys.unraisablehook = hook


def _stopped(number: int, frame: FrameType | None) -> None:
    _signals.append(number)
    raise _Stopped(number)


def _unraisable(told: sys.UnraisableHookArgs) -> None:
    """Of a signal that is not lost nobody need read."""
    if not isinstance(told.exc_value, _Stopped):
        sys.__unraisablehook__(told)


def _require_settled(claim: runtime.Claim) -> None:
    """Refuse a name under which a guest may be running elsewhere while its source's process is gone."""
    found = Journal(claim.directory, claim.name).read()
    if found is not None and found.role is Role.SOURCE and found.state is Entry.COMMITTED:
        raise ControlError(
            f"the guest {claim.name} was being handed to {found.peer} when its process died: see whether it runs there,"
            f" then kvmigrate resolve {claim.name} --discard"
        )
