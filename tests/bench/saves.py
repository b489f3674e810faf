"""Groups of snapshots and restores."""

from __future__ import annotations

import mmap
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path
from typing import TypeVar

from .embedded import Embedded
from .goals import Goal, Group
from .lineage import READY_S, SETTLE_S, since_ms
from .ours import Ours
from .qemu import Qemu, QemuVariant
from .samples import Sample, Series
from .scratch import allocated_mib, scratch
from .sizes import filled, untouched
from .vm import Guest, Vm
from .warm import MADV_POPULATE_WRITE, warm

MIB = 1 << 20
PLAIN = "plain copy"
HEARD = "first heartbeat ms"
AnyVm = TypeVar("AnyVm", bound=Vm)


@contextmanager
def save(files: Path) -> Iterator[Group]:
    """Snapshots of one guest after the other, each guest standing still while the other one is measured."""
    with scratch() as directory, scratch(files) as saved, ExitStack() as stack:
        ours = _held(stack, lambda: Ours.run(directory / "ours", filled(1024)))
        qemu = _held(stack, lambda: _qemu(directory / "qemu", filled(1024)))
        # Not made anew for each copy: what is freed is on the hypervisor's mind while the next row runs.
        as_much = stack.enter_context(mmap.mmap(-1, filled(1024).data_mib * MIB))
        as_much.madvise(MADV_POPULATE_WRITE)
        rows = [
            Series("QEMU, migrate to exec:cat > FILE", partial(_qemu_save, qemu, "exec", saved / "exec")),
            Series("QEMU, migrate to fd:FILE", partial(_qemu_save, qemu, "fd", saved / "fd")),
            Series(f"{PLAIN} of as many bytes", partial(_plain_copy, as_much, saved / "plain")),
            Series("kvmigrate snapshot", partial(_our_save, ours, saved / "snapshot"), ours=True),
        ]
        goals = [
            Goal("snapshot of 1 GiB to tmpfs: time", "total ms", 1.3, "p50", PLAIN),
            Goal("snapshot of 1 GiB to tmpfs: guest pause", "longest silence ms", 5, "p50", None),
        ]
        title = "Snapshot of the idle guest with 1 GiB of incompressible data to tmpfs, while it runs"
        yield Group(title, rows, ["total ms", "longest silence ms"], goals)


def _held(stack: ExitStack, boot: Callable[[], AnyVm]) -> AnyVm:
    vm = boot()
    stack.callback(vm.close)
    vm.heartbeats.wait_first(READY_S)
    vm.hold()
    return vm


def _qemu(directory: Path, guest: Guest, incoming: str = "") -> Qemu:
    return Qemu(directory, guest, memory=QemuVariant().memory(guest, prealloc=False), incoming=incoming)


def _measured_save(vm: Vm, path: Path, start: Callable[[], object], event: str) -> Sample:
    """Time from ``start`` until ``event`` says completed; the longest silence is from before that until after."""
    shutil.rmtree(path, ignore_errors=True)
    path.unlink(missing_ok=True)
    warm(vm.guest.data_mib)
    vm.run_on()
    time.sleep(SETTLE_S)
    vm.qmp.events.clear()
    vm.heartbeats.longest_silence_ns = 0
    started = time.monotonic_ns()
    start()
    vm.qmp.wait_completed(event)
    total_ms = since_ms(started)
    if isinstance(vm, Qemu):
        vm.resume()
    vm.heartbeats.wait_after(time.monotonic_ns(), READY_S)
    vm.heartbeats.check()
    figures = {"total ms": total_ms, "longest silence ms": vm.heartbeats.longest_silence_ns / 1e6}
    vm.hold()
    return Sample(figures | {"on disk MiB": allocated_mib(path)})


def _qemu_save(vm: Qemu, how: str, path: Path) -> Sample:
    QemuVariant().prepare(vm)
    if how == "exec":
        return _measured_save(vm, path, lambda: vm.qmp.execute("migrate", uri=f"exec:cat > {path}"), "MIGRATION")
    return _measured_save(vm, path, lambda: vm.save_to_fd(path), "MIGRATION")


def _our_save(vm: Vm, path: Path) -> Sample:
    start = partial(vm.qmp.execute, "x-kvmigrate-snapshot", directory=str(path))
    return _measured_save(vm, path, start, "X_KVMIGRATE_SNAPSHOT")


def _plain_copy(memory: mmap.mmap, path: Path) -> Sample:
    """All of ``memory``, which was touched, by write() in pieces of 1 MiB."""
    path.unlink(missing_ok=True)
    warm(len(memory) // MIB)
    with path.open("wb", buffering=0) as file, memoryview(memory) as pieces:
        started = time.monotonic_ns()
        for at in range(0, len(pieces), MIB):
            file.write(pieces[at : at + MIB])
        total_ms = since_ms(started)
    return Sample({"total ms": total_ms, "longest silence ms": 0.0, "on disk MiB": allocated_mib(path)})


@contextmanager
def restore(files: Path) -> Iterator[Group]:
    """From exec to the first heartbeat, of 1 GiB."""
    guest = filled(1024)
    _make_snapshot(guest, files / "full")
    _make_state(guest, files / "state")
    rows = [
        Series("QEMU, -incoming exec:cat FILE", partial(_qemu_restore, guest, files / "state")),
        Series("kvmigrate restore", partial(_our_restore, guest, files / "full"), ours=True),
    ]
    goals = [Goal("restore of 1 GiB: exec to first instruction", HEARD, 120, "p50", None)]
    yield Group("Restore of 1 GiB from tmpfs: from exec to the first heartbeat", rows, [HEARD], goals)


@contextmanager
def restore_sparse(files: Path) -> Iterator[Group]:
    """The same of 16 GiB that are nearly all untouched."""
    guest = untouched(16384)
    _make_snapshot(guest, files / "sparse")
    rows = [Series("kvmigrate restore", partial(_our_restore, guest, files / "sparse"), ours=True)]
    goals = [Goal("restore of 16 GiB (sparse): exec to first instruction", HEARD, 120, "p50", None)]
    yield Group("Restore of 16 GiB, sparse, from tmpfs: from exec to the first heartbeat", rows, [HEARD], goals)


@contextmanager
def restore_embedded(files: Path) -> Iterator[Group]:
    """The same of 1 GiB inside of a process that runs already, by the Python interface."""
    _make_snapshot(filled(1024), files / "full")
    with scratch() as directory, closing(Embedded(files / "full", directory)) as process:
        rows = [Series("kvmigrate.api.restore", lambda: Sample({HEARD: process.restore_ms()}), ours=True)]
        goals = [Goal("restore inside a running process", HEARD, 5, "p90", None)]
        title = "Restore of 1 GiB inside a running process: from the call to the first heartbeat"
        yield Group(title, rows, [HEARD], goals)


def _make_snapshot(guest: Guest, path: Path) -> None:
    """Unless another group has."""
    if path.exists():
        return
    with scratch() as directory, closing(Ours.run(directory / "s", guest)) as vm:
        vm.heartbeats.wait_first(READY_S)
        vm.qmp.execute("x-kvmigrate-snapshot", directory=str(path))
        vm.qmp.wait_completed("X_KVMIGRATE_SNAPSHOT")


def _make_state(guest: Guest, path: Path) -> None:
    with scratch() as directory, closing(_qemu(directory / "s", guest)) as vm:
        vm.heartbeats.wait_first(READY_S)
        QemuVariant().prepare(vm)
        vm.save_to_fd(path)
        vm.qmp.wait_completed()


def _qemu_restore(guest: Guest, state: Path) -> Sample:
    with scratch() as directory:
        warm(guest.data_mib)
        started = time.monotonic_ns()
        with closing(_qemu(directory / "r", guest, f"exec:cat {state}")) as vm:
            return Sample({HEARD: since_ms(started, vm.heartbeats.wait_first(READY_S))})


def _our_restore(guest: Guest, path: Path) -> Sample:
    with scratch() as directory:
        warm(guest.data_mib)
        started = time.monotonic_ns()
        with closing(Ours(directory / "r", guest, "restore", str(path))) as vm:
            sample = Sample({HEARD: since_ms(started, vm.heartbeats.wait_first(READY_S))})
            vm.connect()
            vm.heartbeats.check()
            return sample
