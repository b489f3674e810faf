"""One VM process: owns the machine, the job under way and the control socket, and decides when and how it all ends.

The main thread runs the control loop. vCPUs and serial back-ends have threads of their own, and so has the one job.
What those threads tell (run states, events, ends) reaches the loop through a queue that wakes it; a change that lies
in the blackout does not wake it, but is told with its own time when the next one does.
"""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ..config import Address, MigrationParameters, SnapshotParameters
from ..contract import Builder, Examiner, RunState
from ..errors import KvmigrateError, MigrationError, StateError
from ..machine.machine import Machine
from ..state.fidelity import Fidelity
from . import ballooning
from .console import Console
from .ending import REASONS, STATUS_ERROR, STATUS_MOVED, STATUS_STOPPED, Exit, whose
from .job import Job, SnapshotJob, describe
from .runtime import Claim
from .server import Server

if TYPE_CHECKING:
    from ..migration.address import Listener
    from .incoming import IncomingJob

LINGER_S = 30.0
"""How long the process of a guest that moved away waits for its clients to read the result."""
QUITTER_S = 2.0
"""How long it waits for them to hang up once one of them has said ``quit``."""
FIRST_CLIENT_S = 2.0
"""How long it waits for one to come when there is none: a script may dial anew for every question."""
REHEARSE_AFTER_S = 0.3
REASON_S = 3.0
"""How long it waits for them when a job was cut short by the guest's end."""
CANCEL_S = 15.0

_QUIET = frozenset({RunState.FINISH_MIGRATE, RunState.SAVE_VM})


class Session:
    """The live process of one VM, as :mod:`.commands` sees it. All public methods belong to the loop's thread."""

    def __init__(self, claim: Claim) -> None:
        self.name = claim.name
        self.parameters = MigrationParameters()
        self.events_on = False
        self.machine: Machine | None = None
        self.on_arrival: Callable[[Fidelity], None] = lambda _: None
        """Told what became of every item of state of a guest that came in."""
        self._claim = claim
        self._server = Server(self)
        self._console = Console(claim.name)
        self._job: Job | None = None
        self._jobs: list[Job] = []
        self._busy = ""
        self._queue: deque[tuple[int, str, Any]] = deque()
        self._ran = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._over: asyncio.Future[Exit] | None = None
        self._told_to_quit = asyncio.Event()

    # What the commands ask.

    @cached_property
    def package(self) -> str:
        # Its import takes 15 ms, for which neither a restored guest nor one in its blackout should wait.
        from importlib.metadata import version

        return f"kvmigrate {version('kvmigrate')}"

    @property
    def runstate(self) -> RunState:
        return self.machine.runstate if self.machine is not None else RunState.INMIGRATE

    @property
    def job(self) -> str:
        return self._job.kind if self._job is not None and self._job.alive else self._busy

    def facts(self) -> Mapping[str, Any]:
        """See :class:`commands.Vm`, as for all that follows."""
        if self.machine is None:
            return {"uuid": "00000000-0000-0000-0000-000000000000", "memory_bytes": 0, "thread_ids": []}
        return {
            "uuid": self.machine.description.uuid,
            "memory_bytes": self.machine.memory.size_bytes,
            "thread_ids": self.machine.cpus.thread_ids,
        }

    async def pause(self) -> None:
        await self._exclusively("pause", lambda machine: machine.pause(RunState.PAUSED))

    async def resume(self) -> None:
        await self._exclusively("resume", Machine.resume)

    async def reset(self) -> None:
        # Not exclusive: a migration or a snapshot may be under way, and the machine knows when it cannot be.
        await asyncio.to_thread(self._require_machine().reset)

    async def digest(self) -> Mapping[str, Any]:
        found: Mapping[str, Any] = await self._exclusively("digest", Machine.digest)
        return found

    async def _exclusively(self, what: str, work: Callable[[Machine], Any]) -> Any:
        """``work`` in a thread, while commands that touch the machine are refused."""
        if self.machine is None:
            raise StateError("waiting for a guest", "there")
        self._busy = what
        try:
            return await asyncio.to_thread(work, self.machine)
        finally:
            self._busy = ""

    def resize(self, keep_bytes: int) -> None:
        ballooning.resize(self._require_machine(), keep_bytes)

    def balloon_info(self) -> Mapping[str, Any]:
        return ballooning.facts(self._require_machine())

    def press_power_button(self) -> None:
        self._require_machine().press_power_button()

    def quit(self) -> None:
        self._told_to_quit.set()
        self._end(Exit(STATUS_STOPPED, f"VM {self.name} was stopped by the operator", "host-qmp-quit"))

    def start_migration(self, address: Address) -> None:
        machine = self._require_machine()
        from .outgoing import MigrationJob

        self._begin(MigrationJob(machine, address, self.parameters, self._claim.directory, self._tell_migration))

    def start_snapshot(self, directory: Path, parameters: SnapshotParameters) -> None:
        self._begin(SnapshotJob(self._require_machine(), directory, parameters, self._tell))

    def start_check(self, address: Address) -> None:
        machine = self._require_machine()
        from .outgoing import CheckJob

        self._begin(CheckJob(machine, address, self.parameters.timeout_ms, self._tell))

    def receive(self, listener: Listener, builder: Builder, examiner: Examiner, *, paused: bool) -> None:
        """Wait on ``listener`` for a guest that ``builder`` builds and adopts; ``examiner`` is for checks meanwhile."""
        directory = self._claim.directory
        from .incoming import IncomingJob

        self._begin(IncomingJob(listener, builder, examiner, directory, self.name, self._tell_migration, paused=paused))

    def _begin(self, job: Job) -> None:
        """Start ``job``; there is none under way."""
        self._job = job
        self._jobs.append(job)
        job.start(lambda ended: self._post("ended", ended))

    def cancel_job(self) -> None:
        if self._job is not None and self._job.alive:
            self._job.cancel()

    def migration_info(self) -> Mapping[str, Any]:
        if self._job is None or self._job.kind in ("snapshot", "check"):
            return {}
        return self._job.result() or {"status": self._job.status}

    def job_info(self) -> Mapping[str, Any]:
        return self._job.info() if self._job is not None else {"kind": "none"}

    def resolve(self, action: str) -> Mapping[str, Any]:
        if self._job is None:
            raise StateError(self.runstate.value, "in doubt after a migration")
        self._job.resolve(run_here=action == "run")
        return {"action": action}

    def _require_machine(self) -> Machine:
        if self.machine is None:
            raise StateError("waiting for a guest", "there")
        return self.machine

    # What other threads tell.

    def adopt(self, machine: Machine) -> None:
        """Own ``machine`` from now on, whose guest may run already, or have ended. May be called from the thread that
        receives it."""
        machine.on_change(self._changed)
        machine.on_end = lambda end: self._post("end", end)
        machine.on_reset = lambda reset: self._tell("RESET", whose(REASONS[reset.kind]))
        self._console.adopt(machine.platform.backend)
        self._ran = machine.runstate is RunState.RUNNING
        self.machine = machine
        if machine.end is not None:
            self._post("end", machine.end)

    def _changed(self, state: RunState) -> None:
        if state in _QUIET:
            self._console.hold(True)
        self._post("state", state, wake=state not in _QUIET)

    def _tell(self, name: str, data: Mapping[str, Any]) -> None:
        self._post("event", (name, data))

    def _tell_migration(self, name: str, data: Mapping[str, Any]) -> None:
        if self.events_on:
            self._post("event", (name, data))

    def _post(self, what: str, value: Any, *, wake: bool = True) -> None:
        self._queue.append((time.time_ns(), what, value))
        if wake and self._loop is not None:
            try:
                self._loop.call_soon_threadsafe(self._drain)
            except RuntimeError:
                return  # the loop is closed: the process is at its end

    def _drain(self) -> None:
        while self._queue:
            time_ns, what, value = self._queue.popleft()
            if what == "state":
                self._show_state(value, time_ns)
            elif what == "event":
                self._server.emit(value[0], value[1], time_ns)
            elif what == "end":
                self._end(Exit.of_guest(value))
            else:
                self._job_ended(value)

    def _show_state(self, state: RunState, time_ns: int) -> None:
        self._console.hold(self.runstate in _QUIET)
        runs = state is RunState.RUNNING
        if runs != self._ran:
            self._server.emit("RESUME" if runs else "STOP", None, time_ns)
        self._ran = runs

    def _job_ended(self, job: Job) -> None:
        if job.kind == "incoming migration":
            self._guest_arrived(cast("IncomingJob", job))
        elif job.kind == "migration" and self.runstate is RunState.POSTMIGRATE:
            self._end(Exit(STATUS_MOVED, f"VM {self.name} has moved to {job.target}", moved=True))

    def _guest_arrived(self, job: IncomingJob) -> None:
        if job.arrived is not None:
            self.on_arrival(job.arrived.fidelity)
        elif job.error is not None:
            error = job.error if isinstance(job.error, KvmigrateError) else MigrationError(describe(job.error))
            self._end(Exit(STATUS_ERROR, error=error))

    def _end(self, how: Exit) -> None:
        """The first reason to end counts."""
        if self._over is not None and not self._over.done():
            self._over.set_result(how)
            story = how.story or str(how.error or "")
            self._console.end(how.status, f"VM {self.name} has ended: {story}" if story else how.text)

    # The life of the process.

    async def live(self, begin: Callable[[Session], None]) -> Exit:
        """Serve who comes to the claim's listeners until the guest ends or moves away or is stopped. ``begin`` starts
        what there is to live for, if the guest does not run already."""
        self._loop = asyncio.get_running_loop()
        self._over = self._loop.create_future()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            self._loop.add_signal_handler(number, self.signalled, number)
        control, console = self._claim.listeners
        await self._server.start(control)
        self._console.start(console)
        try:
            begin(self)
            # What was told before there was a loop to wake: the guest may have come to its end already.
            self._drain()
            gc.collect()
            gc.freeze()
            rehearsal = asyncio.create_task(self._rehearse())
            how = await self._over
            rehearsal.cancel()
            return await self._wind_down(how)
        finally:
            await self._server.close()

    async def _rehearse(self) -> None:
        """Prepare the process for a migration, once the guest has got going: neither a restored guest nor a migration
        should wait for it."""
        await asyncio.sleep(REHEARSE_AFTER_S)
        await asyncio.to_thread(lambda: self.package)
        if self.machine is not None:
            await asyncio.to_thread(import_module, ".outgoing", __package__)
            # Should it fail, the migration that tries again will say so.
            with suppress(KvmigrateError):
                await asyncio.to_thread(self.machine.rehearse)

    def signalled(self, number: int) -> None:
        """The first signal ends in good order; a second one, sent by someone who will not wait, at once."""
        if self._over is not None and self._over.done():
            self._claim.release()
            os._exit(STATUS_STOPPED)
        name = signal.Signals(number).name
        self._end(Exit(STATUS_STOPPED, f"VM {self.name} was stopped by {name}", "host-signal"))

    async def _wind_down(self, how: Exit) -> Exit:
        """Stop what is under way, tell the clients, and let them read what they came for."""
        job = self._job
        interrupted = job is not None and job.alive
        if job is not None and interrupted:
            try:
                job.cancel(MigrationError(f"the guest came to its end: {how.text or 'it switched itself off'}"))
            except KvmigrateError:
                pass  # too late: the handover ends one way or the other
            await asyncio.to_thread(job.wait, CANCEL_S)
        self._drain()
        if how.moved:
            await self._linger()
        else:
            self._server.emit("SHUTDOWN", whose(how.reason))
        if interrupted and not how.moved:
            # Whoever follows the job looks again within its polling interval, and should read why it ended.
            await self._server.wait_idle(REASON_S)
        return how

    async def _linger(self) -> None:
        """The guest is gone, but its last client wants the result; until a client says that nobody does."""
        deadline = time.monotonic() + FIRST_CLIENT_S
        while not self._server.nr_clients and time.monotonic() < deadline:
            await asyncio.sleep(0.1)
        idle = asyncio.create_task(self._server.wait_idle(LINGER_S))
        told = asyncio.create_task(self._told_to_quit.wait())
        await asyncio.wait((idle, told), return_when=asyncio.FIRST_COMPLETED)
        for one in (idle, told):
            one.cancel()
        if self._told_to_quit.is_set():
            # Who says so hangs up himself, as a rule, and should not find that it was done for him.
            await self._server.wait_idle(QUITTER_S)

    def close(self) -> None:
        """Give the machine back. A job that would not end keeps it, and the process ends without."""
        if self._job is not None and self._job.alive:
            self._claim.release()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(STATUS_ERROR)
        for job in self._jobs:
            job.close()
        if self.machine is not None:
            self.machine.close()
        self._console.close()
