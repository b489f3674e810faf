"""One cell of the fault matrix: a migration through the proxy, a strike, and what must be true afterwards."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kvmigrate.errors import ControlError
from kvmigrate.state.frame import FrameKind

from ..oracle.heartbeat import judge, require_progress
from ..oracle.world import MOVED, Process, World, migrate, wait_job, wait_listening
from .proxy import Proxy, Strike

GUEST = "beat=10 pages=200 fill=8 irq=1 state=1"
MEMORY = "32M"
TIMEOUT_MS = 2500
ENDED_S = 30.0


@dataclass
class Traveller:
    """The guest that goes through the cells, wherever it is now; a new one is booted when it was lost. ``next_place``
    starts up while the place before it is put to use: destinations are used in the order in which they were started."""

    world: World
    process: Process | None = None
    first_log: int = 0
    next_place: tuple[Process, str] | None = None

    def source(self) -> Process:
        if self.process is None:
            self.first_log = len(self.world.processes)
            self.process = self.world.run("ledger", GUEST, memory=MEMORY, name=f"vm{self.first_log}")
        return self.process

    def receive(self) -> tuple[Process, str]:
        """A destination that listens, and its address."""
        process, address = self.next_place or self._start_place()
        process.wait_ready()
        wait_listening(address)
        self.next_place = self._start_place()
        return process, address

    def _start_place(self) -> tuple[Process, str]:
        address = self.world.tcp()
        return self.world.start("receive", f"vm{len(self.world.processes)}", address), address

    def hop(self) -> None:
        """Migrate as if nothing had been."""
        source = self.source()
        destination, address = self.receive()
        job = migrate(source, address)
        assert job["status"] == "completed", job
        status = source.wait_end()
        assert status == MOVED, f"exit status {status}: {source.stderr} {destination.stderr}"
        self.moved_to(destination)

    def forget(self) -> None:
        """End all there is; the next cell begins with a new guest."""
        for process in self.world.processes:
            process.kill()
        self.process = self.next_place = None

    def require_one_guest(self) -> None:
        """Raise :class:`OracleError` unless the guest ran in one place at any time, so far."""
        judge(self.world.logs[self.first_log :])

    def lost(self) -> None:
        """The guest is gone with its host; that may be, but not that it ran twice before."""
        self.require_one_guest()
        self.forget()

    def moved_to(self, process: Process) -> None:
        self.process = process
        require_progress(process.log, 5)
        self.require_one_guest()


@dataclass
class Attempt:
    """A migration that was struck: both ends, and the source's last report of it (None when it was killed)."""

    traveller: Traveller
    source: Process
    destination: Process
    proxy: Proxy
    job: Mapping[str, Any] | None

    def require_source_goes_on(self) -> None:
        """The guest runs at the source, the destination never ran it and ends with one line, and the next try works."""
        job = self.settled_job()
        assert job["status"] in ("failed", "cancelled"), job
        assert "\n" not in job["error"]["desc"]
        assert self.source.status() == "running"
        require_progress(self.source.log, 3)
        self.proxy.drop()
        self.end_destination()
        assert not self.destination.log.chunks, "the guest ran at the destination too"
        self.traveller.hop()

    def end_destination(self, word: str = "--discard") -> None:
        """The destination ends by itself or, after READY, by the operator's word; with the reason in one line."""
        if in_doubt(self.destination):
            done = self.traveller.world.command("resolve", self.destination.name, word)
            # The source may ask at the same time, and then the destination ends by that.
            assert done.returncode == 0 or "is in doubt here" in done.stderr, done.stderr
        assert self.destination.wait_end(ENDED_S) == 2, self.destination.stderr
        lines = self.destination.stderr.splitlines()
        assert len(lines) == 2 and "waits for a guest" in lines[0] and lines[1].startswith("kvmigrate: "), lines

    def require_moved(self) -> None:
        """The guest runs at the destination, and the source knows."""
        assert self.source.wait_end(ENDED_S) == MOVED, self.source.stderr
        self.traveller.moved_to(self.destination)

    def settled_job(self) -> Mapping[str, Any]:
        """The source's report once nothing is in doubt any more."""
        deadline = time.monotonic() + ENDED_S
        while True:
            with self.source.client() as client:
                job = wait_job(client)
            if job["status"] != "commit-unknown":
                return job
            assert time.monotonic() < deadline, job
            time.sleep(0.05)

    def require_in_doubt(self) -> None:
        """The source keeps the guest paused and refuses to run it without the operator's word."""
        assert self.job is not None and self.job["status"] == "commit-unknown", self.job
        assert self.source.status() not in ("running", "gone")
        try:
            self.source.execute("cont")
        except ControlError:
            pass
        else:
            raise AssertionError("a guest in doubt was resumed")


def attempt(traveller: Traveller, strike: Strike, connections: int = 2) -> Attempt:
    """Migrate through a proxy with ``strike``; returns once the source has a result, is in doubt or is dead."""
    source = traveller.source()
    destination, address = traveller.receive()
    proxy = Proxy(("127.0.0.1", int(address.rpartition(":")[2])), strike).__enter__()
    victims = {"kill-source": source, "kill-destination": destination}
    if strike.victim in victims:
        strike.call = victims[strike.victim].kill
    elif strike.victim == "cancel":
        strike.call = lambda: cancel(source, strike)
    parameters: dict[str, Any] = {"x-kvmigrate-timeout": TIMEOUT_MS, "multifd-channels": connections}
    try:
        job = migrate(source, proxy.address, **parameters)
    except ControlError:
        # The process is gone: killed, or moved away after a doubt that was over before we could ask.
        assert strike.victim == "kill-source" or source.wait_end(ENDED_S) == MOVED, source.stderr
        job = None
    assert strike.struck.wait(5), f"no {strike.kind.name} frame came by: {[kind.name for kind in proxy.kinds]}"
    return Attempt(traveller, source, destination, proxy, job)


def cancel(source: Process, strike: Strike) -> None:
    """Cancel the migration from outside, as an operator would, and note what was said."""
    try:
        source.execute("migrate_cancel")
    except ControlError as error:
        strike.said = str(error)


def in_doubt(destination: Process) -> bool:
    """Whether the destination waits for a word on a guest that it has but may not run; or it ends within a while."""
    for _ in range(200):
        if destination.popen.poll() is not None:
            return False
        try:
            if destination.execute("x-kvmigrate-job")["status"] == "commit-unknown":
                return True
        except ControlError:
            continue
    return False


def before(kind: FrameKind) -> bool:
    """Whether a frame of ``kind`` comes before COMMIT."""
    return kind not in (FrameKind.COMMIT, FrameKind.RUNNING, FrameKind.DONE)
