"""The machine: owns all parts, starts, pauses and resumes them, and saves and loads their state."""

from __future__ import annotations

import base64
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

from ..config import ClockPolicy, HostSide, MachineConfig, MemoryBackend
from ..contract import RunState
from ..devices.end import CRASH, RESET, GuestEnd
from ..devices.power import NEW_GENERATION, POWER_BUTTON
from ..errors import ConfigError, KvmigrateError, StateError
from ..kvm.cpuid import guest_cpuid
from ..kvm.system import System
from ..memory.dirty import DirtyLog, LogMode
from ..memory.region import GuestMemory
from ..state.fidelity import Fidelity
from ..state.section import Section, Value, encode, pack
from . import spare_vm
from .boot_source import BootSource
from .cpus import PAUSE_TIMEOUT_MS, CpuThreads
from .description import Description
from .exits import ExitHandler
from .generation import new_generation_id, write_generation
from .loading import load_image
from .own_trial import OwnTrial
from .platform import Platform
from .rehearsal import load_own, rehearse, rehearse_load, warm_up, warm_up_resume
from .reset import Boot, PowerOn, pending_section, take_pending
from .runstate import RunStateBox
from .sampling import Sampler
from .sections import load_devices, load_kernel, load_sections, save_devices, save_kernel, save_sections

_RESETTABLE = frozenset({RunState.RUNNING, RunState.PAUSED, RunState.PRELAUNCH})


class Machine:
    """One guest. Build it with :meth:`create` or :meth:`build`; implements :class:`kvmigrate.contract.Migratable`.

    Methods are called by one thread at a time; the guest itself may end at any moment, in a vCPU's thread, which
    :meth:`wait_end` and ``on_end`` tell. When it asks for a reset a thread of its own resets the machine, unless the
    guest is being handed over or saved: then whoever lets it go on does. Without ``reboot`` that ends the guest.
    """

    def __init__(
        self,
        description: Description,
        serial: str,
        state: RunState,
        log_mode: LogMode | None = None,
        *,
        reboot: bool = True,
        make_memory: Callable[[int], GuestMemory] | None = None,
    ) -> None:
        self._clock = ClockPolicy.CONTINUE
        self._reboot = reboot
        self._end: GuestEnd | None = None
        self._ended = threading.Event()
        self._runstate = RunStateBox(state)
        self._guard = threading.Lock()
        self._ending = threading.Lock()
        self._pending_reset: GuestEnd | None = None
        self._begun: Fidelity | None = None
        self._resetter: threading.Thread | None = None
        self._closed = False
        self.on_end: Callable[[GuestEnd], None] = lambda _: None
        self.on_reset: Callable[[GuestEnd], None] = lambda _: None
        self.platform = Platform(
            description.memory_bytes,
            description.cpuid,
            serial,
            self._end_guest,
            description.virtio,
            make_base=partial(spare_vm.take, make_memory=make_memory),
        )
        self.description = description.completed(
            self.platform.device_versions(), self.platform.tsc_khz, self.platform.held_cpuid()
        )
        self._dirty_log = DirtyLog(self.platform.memory, log_mode or self.platform.best_log_mode())
        # Saved once for all who may want it back, while nobody waits: it also finds out what a later save will read.
        new = save_sections(self.platform)
        self._new = [encode(section) for section in new]
        self._power_on = PowerOn(self.platform, self.description.boot, new)
        handler = ExitHandler(self.platform.pio, self.platform.mmio, self._end_guest)
        self.cpus = CpuThreads(self.platform.vm.group, self.platform.vm.vcpus, handler, self._finish)

    @classmethod
    def create(cls, config: MachineConfig, *, log_mode: LogMode | None = None) -> Machine:
        """A new guest as ``config`` says, its image loaded, in PRELAUNCH: call :meth:`start`, then :meth:`resume`.

        Raises :class:`ConfigError` for an image that cannot be booted, :class:`HostError` when the host refuses.
        """
        # Not at the top: a machine that is restored or received does without, and should not wait for it.
        from ..boot import read_files
        from ..kvm.cpu_files import choose_cpu

        if config.boot is None:
            raise ConfigError("a machine needs an image to boot")
        with System.open() as system:
            cpu = choose_cpu(config.cpu, system.supported_cpuid())
            cpuid = tuple(guest_cpuid(cpu, at, config.nr_cpus) for at in range(config.nr_cpus))
        files = read_files(config.boot, config.memory_bytes)
        description = Description.new(config, cpuid, BootSource.of(config.boot, files))
        make_memory = _maker(config.memory_backend)
        machine = cls(
            description, config.serial, RunState.PRELAUNCH, log_mode, reboot=config.reboot, make_memory=make_memory
        )
        try:
            machine.platform.virtio.lock()
            load_image(machine.platform, config.boot, files, new_generation_id())
        except BaseException:
            machine.close()
            raise
        return machine

    @classmethod
    def build(
        cls,
        value: Mapping[str, Value],
        here: HostSide,
        *,
        log_mode: LogMode | None = None,
        clone: bool = False,
        clock: ClockPolicy = ClockPolicy.CONTINUE,
        make_memory: Callable[[int], GuestMemory] | None = None,
    ) -> Machine:
        """The empty machine that :meth:`describe` described elsewhere, in INMIGRATE: load its state, then resume.

        ``here`` is what it is called and has on this host; a ``clone`` is another guest than the described one;
        ``clock`` is what its clocks will make of the time since the save; ``make_memory`` gives it RAM that is there.

        Raises :class:`BadField` for a description that cannot be, :class:`RestoreRefused` when this host lacks a CPU
        feature that the guest knows of, :class:`ConfigError` or :class:`HostError` for a part that cannot be had.
        """
        description = Description.from_value(value)
        if clone:
            description = description.cloned()
        description = description.on(here)
        machine = cls(
            description,
            here.serial,
            RunState.INMIGRATE,
            log_mode,
            reboot=here.reboot,
            make_memory=make_memory or _maker(here.memory_backend),
        )
        machine._clock = clock
        try:
            machine.platform.compare_cpuid().require()
            description.require_devices(machine.description.devices)
            description.require_tsc(machine.description.tsc_khz, machine.platform.can_scale_tsc)
            # Parked threads now, so that none has to be started while the guest waits.
            machine.start()
        except BaseException:
            machine.close()
            raise
        return machine

    @property
    def memory(self) -> GuestMemory:
        return self.platform.memory

    @property
    def dirty_log(self) -> DirtyLog:
        return self._dirty_log

    @property
    def runstate(self) -> RunState:
        return self._runstate.state

    def on_change(self, told: Callable[[RunState], None]) -> None:
        """``told`` is called after each change of the run state, from the thread that made it; it must not block."""
        self._runstate.on_change = told

    def describe(self) -> dict[str, Value]:
        """See :meth:`Migratable.describe`; ``autostart`` says whether the guest runs, so that a paused one stays so."""
        running = self.runstate in (RunState.RUNNING, RunState.PRELAUNCH)
        return self.description.to_value() | {"autostart": running}

    def start(self) -> None:
        """Start the vCPUs' threads, parked. Idempotent."""
        self.cpus.start()

    def pause(self, reason: RunState = RunState.PAUSED) -> None:
        """See :meth:`Migratable.pause`. Raises :class:`StateError` when the guest has ended."""
        with self._guard:
            if reason is not self.runstate:
                self._runstate.require(reason)
            self.platform.park(PAUSE_TIMEOUT_MS)
            if reason is RunState.FINISH_MIGRATE:
                # From here on nothing of this VM writes a disk, and the destination locks them before it says READY:
                # there is no moment at which two could write. A snapshot's pause keeps them: the guest stays here.
                self.platform.virtio.unlock()
            elif reason is RunState.PAUSED:
                # After a migration that failed the guest is ours again, even when it stays paused.
                self.platform.virtio.lock()
            # The guest may have ended while its vCPUs were on their way out: then there is nothing to move any more.
            self._runstate.move(reason)

    def resume(self) -> None:
        """See :meth:`Migratable.resume`. Raises :class:`ConfigError` when another VM has taken a disk meanwhile; the
        guest stays paused then."""
        with self._guard:
            # Before anything runs: a destination that failed may still have them, and whatever runs may write.
            if self.runstate is not RunState.RUNNING:
                self._runstate.require(RunState.RUNNING)
            self.platform.virtio.lock()
            self._runstate.enter(RunState.RUNNING)
            try:
                self.cpus.start()
                if self._pending_reset is not None:
                    self._start_reset()
                else:
                    self.platform.let_go()
            finally:
                # The guest goes first: whoever is told may want the interpreter at once.
                self._runstate.tell()

    def reset(self) -> None:
        """Press the reset button of a guest that runs or stands still: it starts anew and does so again, or ends when
        it may not. Raises :class:`StateError` while it is being handed over or saved, :class:`ConfigError` when what it
        booted from is not here any more; it is unharmed then."""
        boot = self._power_on.read() if self._reboot else None
        with self._guard:
            if self.runstate not in _RESETTABLE:
                raise StateError(self.runstate.value, " or ".join(sorted(_RESETTABLE)))
            self._carry_out(GuestEnd.reset_button(), boot)

    def _start_reset(self) -> None:
        self._resetter = threading.Thread(target=self._reset_pending, name="reset", daemon=True)
        self._resetter.start()

    def _reset_pending(self) -> None:
        """Carry out the reset that was asked for. The body of a thread: no vCPU's own can wait for all to park."""
        with self._guard:
            pending = self._pending_reset
            # Paused meanwhile, it is the matter of whoever resumes it, here or elsewhere.
            if pending is not None and self.runstate is RunState.RUNNING and not self._closed:
                self._carry_out(pending)

    def _carry_out(self, reset: GuestEnd, boot: Boot | None = None) -> None:
        """Under the guard: reset the machine, and let it go on as before; ``boot`` has been read already or is not."""
        try:
            self.platform.park(PAUSE_TIMEOUT_MS)
            if not self._reboot:
                self._finish(reset)
            elif not self._runstate.ended:
                self._power_on.restore(boot or self._power_on.read())
                self._pending_reset = None
                self.on_reset(reset)
                if self.runstate is RunState.RUNNING:
                    self.platform.let_go()
        except KvmigrateError as error:
            self._finish(reset.but(str(error)))
        except Exception as error:
            self._finish(GuestEnd.crashed(f"the reset met a fault of kvmigrate's own: {error!r}"))

    def press_power_button(self) -> None:
        """Ask the guest's system to shut down, by an ACPI event: what it does is its own matter."""
        self.platform.power.raise_event(POWER_BUTTON)

    def new_generation(self) -> None:
        """Tell the guest, loaded and not run yet, that it goes on from a past that others may share: after every
        restore, never after a live migration. Linux then draws new random numbers."""
        if write_generation(self.memory):
            self.platform.power.raise_event(NEW_GENERATION)

    def rehearse(self) -> None:
        """See :meth:`Migratable.rehearse`."""
        rehearse()
        # What the disks' files have in the page cache must be on the storage before the locks go: most of it now.
        self.platform.virtio.flush()

    def warm_up(self) -> None:
        """See :meth:`Migratable.warm_up`."""
        if self.runstate is not RunState.INMIGRATE:
            warm_up()
            return
        if len(self.platform.vm.vcpus) > 1:
            # The source would be done with its save before all of them were gone through.
            rehearse_load()
        else:
            # It has never run, so it can go through its own load: that warms the kernel's side of it too.
            load_own(self.platform, self._new)
        warm_up_resume()

    def save(self) -> list[Section]:
        """See :meth:`Migratable.save`."""
        return [section for part in self.save_parts() for section in part]

    def save_parts(self) -> Iterator[list[Section]]:
        """See :meth:`Migratable.save_parts`."""
        yield save_kernel(self.platform)
        devices = save_devices(self.platform)
        yield devices if self._pending_reset is None else [*devices, pending_section()]

    def sample(self) -> tuple[list[Section], float]:
        """See :meth:`Migratable.sample`."""
        sampler = Sampler(self.platform, self._runstate, self._guard, self._may_run)
        return sampler.sample(), sampler.longest_ms

    def _may_run(self) -> bool:
        return self._runstate.runs and self._pending_reset is None

    def trial(self) -> OwnTrial:
        """See :meth:`Migratable.trial`."""
        return OwnTrial(self.platform, self._new)

    def load(self, sections: Sequence[Section], *, more: bool = False) -> Fidelity:
        """See :meth:`Migratable.load`. Raises :class:`ConfigError` when another VM has one of the disks."""
        count_downtime = self._clock is ClockPolicy.HOST
        if more:
            self._begun = load_kernel(self.platform, sections, count_downtime=count_downtime)
            return self._begun
        # Before READY is said, and so before COMMIT: the source gave the disks up when it paused, and can still go on
        # when we do not get them.
        self.platform.virtio.lock()
        pending, others = take_pending(sections)
        fidelity, self._begun = self._begun, None
        if fidelity is None:
            fidelity = load_sections(self.platform, others, count_downtime=count_downtime)
        else:
            load_devices(self.platform, others, fidelity)
        self._pending_reset = pending
        return fidelity

    def digest(self) -> dict[str, Value]:
        """All of a paused guest for comparison: the XXH3-64 of each page and every section, as JSON can carry them."""
        if self.runstate in (RunState.RUNNING, RunState.PRELAUNCH):
            raise StateError(self.runstate.value, "paused")
        # Other than a migration, this reads all pages of a guest that may be reset meanwhile.
        with self._guard:
            return self._digest()

    def _digest(self) -> dict[str, Value]:
        hashes = self.memory.hash_all()
        return {
            "slots": [
                {"base-gfn": slot.base_gfn, "nr-pages": slot.nr_pages, "hashes": base64.b64encode(words).decode()}
                for slot, words in zip(self.memory.slots, hashes, strict=True)
            ],
            "state": {s.name: base64.b64encode(pack(s.body)).decode() for s in self.save()},
            "entries": [vcpu.nr_entries for vcpu in self.platform.vm.vcpus],
        }

    @property
    def end(self) -> GuestEnd | None:
        """How the guest ended, or None while it has not."""
        return self._end

    def wait_end(self, timeout_s: float | None = None) -> GuestEnd | None:
        """Wait until the guest ends; None after ``timeout_s``."""
        self._ended.wait(timeout_s)
        return self._end

    def _end_guest(self, end: GuestEnd) -> None:
        """Called by devices in a vCPU's thread, and for its exits. The other vCPUs park."""
        if self._ended.is_set() or self._pending_reset is not None:
            return
        if end.kind == RESET and self._reboot:
            # Before the request to pause: whoever has paused the machine sees it.
            self._pending_reset = end
            self.platform.vm.group.request_pause()
            self._start_reset()
        else:
            self._finish(end)

    def _finish(self, end: GuestEnd) -> None:
        """The first end counts."""
        self.platform.vm.group.request_pause()
        # Not the guard, whose holder may be waiting for the vCPU in whose thread this is.
        with self._ending:
            if self._end is not None:
                return
            # Whoever hears of the end may look for the guest's last words.
            self.platform.serial.flush()
            self._end = end
        self._runstate.move(RunState.INTERNAL_ERROR if end.kind == CRASH else RunState.SHUTDOWN)
        self._ended.set()
        self.on_end(end)

    def close(self) -> None:
        """See :meth:`Migratable.close`; not from a vCPU's thread."""
        with self._guard:
            self._closed = True
        self.cpus.stop()
        if self._resetter is not None:
            self._resetter.join()
        self.platform.close()


def _maker(backend: MemoryBackend) -> Callable[[int], GuestMemory] | None:
    """What makes memory of ``backend``; None for anonymous memory, which may be there already."""
    return None if backend is MemoryBackend.ANONYMOUS else partial(GuestMemory, backend=backend)
