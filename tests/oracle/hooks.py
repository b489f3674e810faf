"""What the launcher changes in a kvmigrate process for the tests' sake; none of it is in the package."""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path

from kvmigrate.contract import RunState
from kvmigrate.machine.machine import Machine
from kvmigrate.machine.platform import Platform
from kvmigrate.memory.dirty import LogMode
from kvmigrate.state.section import Section

HOST_GPA, HOST_PAGES, HOST_WRITE_S = 0x50000, 64, 0.001
LEAVING = (RunState.FINISH_MIGRATE, RunState.SAVE_VM)


def witness(directory: Path) -> None:
    """Write ``TIME.out.json`` when a guest has been saved at its last stop, ``TIME.in.json`` before it first runs
    elsewhere: its digest, over the test's own channel and never in the stream."""
    save, resume = Machine.save, Machine.resume
    digesting: set[int] = set()

    def witnessed_save(self: Machine) -> list[Section]:
        sections = save(self)
        if self.runstate in LEAVING and id(self) not in digesting:
            digesting.add(id(self))
            _write(directory, "out", self)
            digesting.discard(id(self))
        return sections

    def witnessed_resume(self: Machine) -> None:
        if self.runstate is RunState.INMIGRATE:
            _write(directory, "in", self)
        resume(self)

    Machine.save = witnessed_save  # type: ignore[method-assign]
    Machine.resume = witnessed_resume  # type: ignore[method-assign]


def _write(directory: Path, direction: str, machine: Machine) -> None:
    path = directory / f"{time.monotonic_ns():020d}.{direction}.json"
    beside = path.with_suffix(f".{os.getpid()}")
    beside.write_text(json.dumps(machine.digest()))
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
