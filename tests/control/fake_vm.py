"""A VM process without a guest: what the commands ask of a session, for tests of the protocol around it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kvmigrate.config import Address, MigrationParameters, SnapshotParameters
from kvmigrate.contract import RunState
from kvmigrate.control.runtime import listen
from kvmigrate.control.server import Server
from kvmigrate.errors import StateError


class FakeVm:
    def __init__(self) -> None:
        self.name = "fake"
        self.package = "kvmigrate-test"
        self.parameters = MigrationParameters()
        self.events_on = False
        self.runstate = RunState.RUNNING
        self.job = ""
        self.log: list[Any] = []
        self.server: Server | None = None

    def facts(self) -> Mapping[str, Any]:
        return {"uuid": "00000000-0000-4000-8000-000000000001", "memory_bytes": 1 << 20, "thread_ids": [11, 12]}

    async def pause(self) -> None:
        self.runstate = RunState.PAUSED
        self._emit("STOP")

    async def resume(self) -> None:
        if self.runstate is RunState.PRELAUNCH:
            raise StateError("prelaunch", "paused")
        self.runstate = RunState.RUNNING
        self._emit("RESUME")

    def _emit(self, name: str) -> None:
        if self.server is not None:
            self.server.emit(name)

    async def reset(self) -> None:
        self.log.append("reset")

    async def digest(self) -> Mapping[str, Any]:
        raise RuntimeError("the hash machine\nis broken")

    def resize(self, keep_bytes: int) -> None:
        self.log.append(keep_bytes)

    def balloon_info(self) -> Mapping[str, Any]:
        return {"actual": 1 << 20, "x-kvmigrate-target": 1 << 20, "x-kvmigrate-driver": False}

    def press_power_button(self) -> None:
        self.log.append("power button")

    def quit(self) -> None:
        self.log.append("quit")

    def start_migration(self, address: Address) -> None:
        self.job = "migration"
        self.log.append(address)

    def start_check(self, address: Address) -> None:
        self.log.append(("check", address))

    def cancel_job(self) -> None:
        self.job = ""
        self.log.append("cancel")

    def start_snapshot(self, directory: Path, parameters: SnapshotParameters) -> None:
        self.log.append((directory, parameters))

    def migration_info(self) -> Mapping[str, Any]:
        return {}

    def job_info(self) -> Mapping[str, Any]:
        return {"kind": "none"}

    def resolve(self, action: str) -> Mapping[str, Any]:
        return {"action": action}


@contextmanager
def serving(vm: FakeVm, path: Path) -> Iterator[Server]:
    """A real server for ``vm`` at ``path``, in a thread with a loop of its own."""
    loop = asyncio.new_event_loop()
    server = Server(vm)
    vm.server = server
    ready = threading.Event()

    async def serve() -> None:
        await server.start(listen(path))
        ready.set()
        await stop.wait()
        await server.close()

    stop = asyncio.Event()
    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()
    try:
        assert ready.wait(10)
        yield server
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(10)
        loop.close()
        assert not thread.is_alive()
