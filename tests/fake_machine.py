"""A guest without /dev/kvm: real memory and a real dirty log from the C core, whose guest writes by the VMM's accessor.

State is plain dicts. It counts pauses and resumes and records when it ran, so that a test can say that no two copies
of it ever ran at once and that a destination never ran at all.
"""

from __future__ import annotations

import random
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from kvmigrate.config import PAGE_BYTES, MemoryBackend
from kvmigrate.contract import RunState
from kvmigrate.errors import BadField, StateError
from kvmigrate.memory.dirty import DirtyLog, LogMode
from kvmigrate.memory.region import GuestMemory
from kvmigrate.state.fidelity import Fidelity
from kvmigrate.state.section import Fields, Section, Value, by_name, require_version

MIB = 1 << 20


@dataclass
class Faults:
    """Exceptions to raise from the named method, each once: ``Faults(once={"save": OSError()})``."""

    once: dict[str, Exception] = field(default_factory=dict)
    refuse: str = ""
    """The item that a load reports as refused."""

    def hit(self, where: str) -> None:
        error = self.once.pop(where, None)
        if error is not None:
            raise error


class FakeMachine:
    """Implements :class:`kvmigrate.contract.Migratable`."""

    def __init__(
        self,
        memory_bytes: int = 8 * MIB,
        *,
        name: str = "fake",
        mode: LogMode = LogMode.GET,
        running: bool = False,
        backend: MemoryBackend = MemoryBackend.ANONYMOUS,
    ) -> None:
        self.memory = GuestMemory(memory_bytes, backend)
        self.dirty_log = DirtyLog(self.memory, mode)
        self.name = name
        self.uuid = str(uuid.uuid4())
        self.faults = Faults()
        self.warmed_in: list[RunState] = []
        """The run state at each :meth:`warm_up`."""
        self.nr_resumes = 0
        self.nr_pauses = 0
        self.nr_samples = 0
        self._first_part: Sequence[Section] = ()
        self.trials: list[FakeTrial] = []
        self.prepare_trial: Callable[[FakeTrial], None] = lambda _: None
        self.ran: list[tuple[float, float]] = []
        self.state: dict[str, dict[str, Value]] = {"cpu0": {"rip": 0x7C00, "rsp": 0}, "serial0": {"lcr": 3}}
        self.closed = False
        self.writes_when_saved = False
        """As a device does that completes its last request: saving then dirties page 1."""
        self._ran_since: float | None = None
        self._runstate = RunState.INMIGRATE
        self._writer: _Writer | None = None
        if running:
            self.resume()

    @property
    def runstate(self) -> RunState:
        return self._runstate

    @property
    def running(self) -> bool:
        return self._runstate is RunState.RUNNING

    @property
    def ever_ran(self) -> bool:
        return self.nr_resumes > 0

    def describe(self) -> Mapping[str, Value]:
        return {
            "name": self.name,
            "uuid": self.uuid,
            "memory_bytes": self.memory.size_bytes,
            "slots": [[s.id, s.base_gfn, s.nr_pages] for s in self.memory.slots],
        }

    @classmethod
    def build(cls, description: Mapping[str, Value]) -> FakeMachine:
        """The builder of a destination: an empty machine, or a refusal."""
        fields = Fields(dict(description), "config")
        memory_bytes = fields.integer("memory_bytes", PAGE_BYTES, 64 * MIB)
        machine = cls(memory_bytes, name=fields.text("name", 64))
        machine.uuid = fields.text("uuid", 64)
        if fields.sequence("slots", 32) != [[s.id, s.base_gfn, s.nr_pages] for s in machine.memory.slots]:
            machine.close()
            raise BadField("config: the slots do not fit the memory size")
        return machine

    def warm_up(self) -> None:
        """Nothing here is slower the first time, but it is to be called while the guest runs."""
        self.warmed_in.append(self._runstate)

    def rehearse(self) -> None:
        """The same, and it does not matter when."""

    def pause(self, reason: RunState) -> None:
        self.faults.hit("pause")
        if self._runstate in (RunState.SHUTDOWN, RunState.INTERNAL_ERROR):
            raise StateError(self._runstate.value, "running or paused")
        self.nr_pauses += 1
        if self._writer is not None:
            self._writer.park()
        if self._ran_since is not None:
            self.ran.append((self._ran_since, time.monotonic()))
            self._ran_since = None
        self._runstate = reason

    def resume(self) -> None:
        self.faults.hit("resume")
        self.nr_resumes += 1
        self._ran_since = time.monotonic()
        self._runstate = RunState.RUNNING
        if self._writer is not None:
            self._writer.unpark()

    def end(self, state: RunState = RunState.SHUTDOWN) -> None:
        """The guest ends by itself."""
        if self._writer is not None:
            self._writer.park()
        self._runstate = state

    def save(self) -> Sequence[Section]:
        self.faults.hit("save")
        if self.writes_when_saved:
            self.memory.write(PAGE_BYTES, b"completed while saving")
        return [Section(name, 1, dict(body)) for name, body in sorted(self.state.items())]

    def save_parts(self) -> Iterator[Sequence[Section]]:
        sections = self.save()
        yield sections[:1]
        yield sections[1:]

    def sample(self) -> tuple[Sequence[Section], float]:
        self.faults.hit("sample")
        self.nr_samples += 1
        return [Section(name, 1, dict(body)) for name, body in sorted(self.state.items())], 0.5

    def trial(self) -> FakeTrial:
        self.trials.append(FakeTrial(self, own=False))
        self.prepare_trial(self.trials[-1])
        return self.trials[-1]

    def load(self, sections: Sequence[Section], *, more: bool = False) -> Fidelity:
        if more:
            self._first_part = sections
            return Fidelity()
        self.faults.hit("load")
        fidelity = self.set_state([*self._first_part, *sections])
        if self.faults.refuse:
            fidelity.refused(self.faults.refuse, 1, 2, "the host took the value and holds another")
        return fidelity

    def set_state(self, sections: Sequence[Section]) -> Fidelity:
        """What a load and a trial have in common."""
        found = by_name(sections)
        fidelity = Fidelity()
        for name, body in self.state.items():
            if name not in found:
                raise BadField(f"section {name} is missing")
            require_version(found[name], 1)
            body.clear()
            body.update(found[name].body)
            fidelity.compare(name, dict(found[name].body), body)
        return fidelity

    def close(self) -> None:
        if self._writer is not None:
            self._writer.stop()
            self._writer = None
        if self._ran_since is not None:
            self.ran.append((self._ran_since, time.monotonic()))
            self._ran_since = None
        self.memory.close()
        self.closed = True

    def write(self, gpa: int, data: bytes) -> None:
        """The guest writes."""
        self.memory.write(gpa, data)

    def fill(self, nr_pages: int, seed: int = 1, first: int = 0) -> None:
        """Pages of noise from page ``first`` on."""
        self.memory.write(first * PAGE_BYTES, random.Random(seed).randbytes(nr_pages * PAGE_BYTES))

    def start_writer(self, nr_pages: int, pages_per_s: float, first: int = 0) -> None:
        """A guest that goes on writing one page after the other, ``nr_pages`` of them in turn."""
        self._writer = _Writer(self.memory, nr_pages, pages_per_s, first)
        if self.running:
            self._writer.unpark()

    def digest(self) -> tuple[list[bytes], dict[str, dict[str, Value]]]:
        """Every page's hash and the state, as they are now."""
        return self.memory.hash_all(), {name: dict(body) for name, body in self.state.items()}


class FakeTrial:
    """Implements :class:`kvmigrate.contract.Trial` by a :class:`FakeMachine`: one of its own, or the guest's."""

    def __init__(self, machine: FakeMachine, *, own: bool = True) -> None:
        self.machine = machine
        self.own = own
        self.closed = False
        self._before = machine.digest()[1]
        self.refuse: tuple[str, ...] = ()
        """The items that a load reports as refused."""
        self.error: Exception | None = None
        """What a load raises."""

    def load(self, sections: Sequence[Section], resident_bytes: int) -> Fidelity:
        if self.error is not None:
            raise self.error
        fidelity = self.machine.set_state(sections)
        for item in self.refuse:
            fidelity.refused(item, 1, 2, "the host took the value and holds another")
        return fidelity

    def close(self) -> None:
        if self.own:
            self.machine.close()
        else:
            self.machine.state = self._before
        self.closed = True


class _Writer:
    """The guest's vCPU: writes while it is not parked."""

    def __init__(self, memory: GuestMemory, nr_pages: int, pages_per_s: float, first: int) -> None:
        self._memory = memory
        self._nr_pages = nr_pages
        self._pages_per_s = pages_per_s
        self._first = first
        self._lock = threading.Lock()
        self._may_run = threading.Event()
        self._quit = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        count = 0
        begin, begin_count = time.monotonic(), 0
        while not self._quit:
            if not self._may_run.wait(0.05):
                begin, begin_count = time.monotonic(), count
                continue
            due = int((time.monotonic() - begin) * self._pages_per_s) + begin_count
            with self._lock:
                while count < due and self._may_run.is_set():
                    page = self._first + count % self._nr_pages
                    self._memory.write(page * PAGE_BYTES, count.to_bytes(8, "little") + b"\x01" * 8)
                    count += 1
            time.sleep(0.0005)

    def park(self) -> None:
        """Stop writing; none is under way when this returns."""
        self._may_run.clear()
        with self._lock:
            pass

    def unpark(self) -> None:
        self._may_run.set()

    def stop(self) -> None:
        self._quit = True
        self._may_run.clear()
        self._thread.join(5)
