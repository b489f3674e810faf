"""What the launcher changes in a kvmigrate process for the tests' sake; none of it is in the package."""

from __future__ import annotations

import base64
import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from kvmigrate.contract import RunState
from kvmigrate.machine.machine import Machine
from kvmigrate.machine.platform import Platform
from kvmigrate.memory.dirty import LogMode
from kvmigrate.state.section import Section, pack

HOST_GPA, HOST_PAGES, HOST_WRITE_S = 0x50000, 64, 0.001
LEAVING = (RunState.FINISH_MIGRATE, RunState.SAVE_VM)


def witness(directory: Path) -> None:
    """Write ``TIME.out.json`` when a guest has been saved at its last stop, ``TIME.in.json`` before it first runs
    elsewhere: its digest, over the test's own channel and never in the stream."""
    save_parts, resume, digest = Machine.save_parts, Machine.resume, Machine.digest

    def witnessed_save(self: Machine) -> Iterator[list[Section]]:
        parts = save_parts(self)
        yield (first := next(parts))
        second = next(parts)
        if self.runstate in LEAVING:
            # The state that leaves, and not a second look at it: the PIT ticks on while the guest stands still.
            state = {s.name: base64.b64encode(pack(s.body)).decode() for s in (*first, *second)}
            unwitnessed(self, lambda: _write(directory, "out", digest(self) | {"state": state}))
        yield second

    def witnessed_resume(self: Machine) -> None:
        if self.runstate is RunState.INMIGRATE:
            unwitnessed(self, lambda: _write(directory, "in", digest(self)))
        resume(self)

    def unwitnessed(self: Machine, work: Callable[[], None]) -> None:
        """``work`` with a save as it was, since a digest saves too."""
        self.save_parts = lambda: save_parts(self)  # type: ignore[method-assign]
        try:
            work()
        finally:
            del self.save_parts

    Machine.save_parts = witnessed_save  # type: ignore[method-assign]
    Machine.resume = witnessed_resume  # type: ignore[method-assign]


def _write(directory: Path, direction: str, digest: Mapping[str, object]) -> None:
    path = directory / f"{time.monotonic_ns():020d}.{direction}.json"
    beside = path.with_suffix(f".{os.getpid()}")
    beside.write_text(json.dumps(digest))
    beside.rename(path)


def write_from_host() -> None:
    """While a guest runs, write to its memory from the VMM, as a device would: to pages that no guest here uses."""
    start, pause = Machine.start, Machine.pause
    lock = threading.Lock()

    def write_on(machine: Machine) -> None:
        number = 0
        while machine.end is None:
            with lock:
                if machine.runstate is RunState.RUNNING:
                    machine.memory.write(HOST_GPA + number % HOST_PAGES * 4096, number.to_bytes(8, "little"))
                    number += 1
            time.sleep(HOST_WRITE_S)

    def started(self: Machine) -> None:
        start(self)
        threading.Thread(target=write_on, args=(self,), daemon=True).start()

    def paused(self: Machine, reason: RunState = RunState.PAUSED) -> None:
        with lock:
            pause(self, reason)

    Machine.start = started  # type: ignore[method-assign]
    Machine.pause = paused  # type: ignore[method-assign]


def use_log_mode(name: str) -> None:
    """Let every machine log in the mode ``name``, whatever the kernel has."""
    Platform.best_log_mode = lambda self: LogMode[name]  # type: ignore[method-assign]
