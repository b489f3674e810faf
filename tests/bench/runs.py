"""One run of each kind: a migration, a snapshot, a restore; by QEMU and by kvmigrate."""

from __future__ import annotations

import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from .ours import Ours
from .qemu import Qemu, QemuVariant
from .samples import Move, Restore, Save
from .vm import Guest, Vm

READY_S = 60.0
SETTLE_S = 0.3
TMPFS = Path("/dev/shm")


@contextmanager
def scratch(parent: Path | None = None) -> Iterator[Path]:
    """A directory with a short path (UNIX sockets want that) that is gone afterwards."""
    directory = Path(tempfile.mkdtemp(prefix="kvmigrate-bench-", dir=parent))
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def free_port() -> int:
    """A TCP port of the loopback that nobody has."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def since_ms(start_ns: int, end_ns: int | None = None) -> float:
    """Milliseconds from ``start_ns`` until ``end_ns``, or until now."""
    return ((time.monotonic_ns() if end_ns is None else end_ns) - start_ns) / 1e6


def wait_ready(vm: Vm) -> None:
    """The guest has filled its memory and beats; let it do so for a moment."""
    vm.heartbeats.wait_first(READY_S)
    time.sleep(SETTLE_S)


def measure_move(source: Vm, destination: Vm, start: Callable[[], object]) -> Move:
    """Start a migration that is set up and time it."""
    guest_kib = source.resident_guest_kib()
    started = time.monotonic_ns()
    start()
    source.qmp.wait_completed()
    completed_ms = since_ms(started)
    source.peak_kib()
    info = source.qmp.execute("query-migrate")
    first = destination.heartbeats.wait_first(READY_S)
    last = source.heartbeats.last_ns
    assert last is not None
    if first < last:
        raise RuntimeError("the guest was heard at the destination before its last heartbeat at the source")
    return Move(
        total_ms=max(completed_ms, since_ms(started, first)),
        completed_ms=completed_ms,
        blackout_ms=since_ms(last, first),
        reported_total_ms=info["total-time"],
        reported_downtime_ms=info["downtime"],
        transferred_mib=info["ram"]["transferred"] / (1 << 20),
        beyond_guest_mib=(source.peak_kib() - guest_kib) / 1024,
    )


def qemu_move(guest: Guest, variant: QemuVariant) -> Move:
    """One live migration between two QEMU processes over TCP."""
    with scratch() as directory, ExitStack() as stack:
        source = Qemu(directory / "s", guest)
        stack.callback(source.close)
        wait_ready(source)
        destination = Qemu(directory / "d", guest, incoming="defer", prealloc=variant.prealloc)
        stack.callback(destination.close)
        source.set_up(variant)
        destination.set_up(variant)
        uri = f"tcp:127.0.0.1:{free_port()}"
        destination.qmp.execute("migrate-incoming", uri=uri)
        return measure_move(source, destination, lambda: source.qmp.execute("migrate", uri=uri))


def our_move(guest: Guest) -> Move:
    """One live migration between two kvmigrate processes over TCP."""
    with scratch() as directory, ExitStack() as stack:
        source = Ours.run(directory / "s", guest)
        stack.callback(source.close)
        wait_ready(source)
        uri = f"tcp:127.0.0.1:{free_port()}"
        destination = Ours(directory / "d", guest, "receive", uri).connect()
        stack.callback(destination.close)
        return measure_move(source, destination, lambda: source.qmp.execute("migrate", uri=uri))


def allocated_mib(path: Path) -> float:
    """What a file, or all files of a directory, take of the file system."""
    files = [path] if path.is_file() else [one for one in path.rglob("*") if one.is_file()]
    return sum(one.stat().st_blocks * 512 for one in files) / (1 << 20)


def qemu_save(guest: Guest, how: str, path: Path) -> Save:
    """``migrate`` into a file on tmpfs: through ``exec:cat`` or straight into the file (``fd``)."""
    with scratch() as directory, ExitStack() as stack:
        vm = Qemu(directory / "s", guest)
        stack.callback(vm.close)
        wait_ready(vm)
        vm.set_up(QemuVariant())
        vm.heartbeats.longest_silence_ns = 0
        started = time.monotonic_ns()
        if how == "exec":
            vm.qmp.execute("migrate", uri=f"exec:cat > {path}")
        else:
            vm.save_to_fd(path)
        vm.qmp.wait_completed()
        total_ms = since_ms(started)
        vm.resume()
        time.sleep(SETTLE_S)
        return Save(total_ms, vm.heartbeats.longest_silence_ns / 1e6, allocated_mib(path))


def our_save(guest: Guest, path: Path) -> Save:
    """A live snapshot into the directory ``path``, in place of one that is there already."""
    with scratch() as directory, ExitStack() as stack:
        vm = Ours.run(directory / "s", guest)
        stack.callback(vm.close)
        wait_ready(vm)
        shutil.rmtree(path, ignore_errors=True)
        vm.heartbeats.longest_silence_ns = 0
        started = time.monotonic_ns()
        vm.qmp.execute("x-kvmigrate-snapshot", directory=str(path))
        vm.qmp.wait_completed("X_KVMIGRATE_SNAPSHOT")
        total_ms = since_ms(started)
        time.sleep(SETTLE_S)
        return Save(total_ms, vm.heartbeats.longest_silence_ns / 1e6, allocated_mib(path))


def qemu_restore(guest: Guest, uri: str) -> Restore:
    """Start QEMU on a saved state, until the guest is heard."""
    with scratch() as directory, ExitStack() as stack:
        started = time.monotonic_ns()
        vm = Qemu(directory / "r", guest, incoming=uri)
        stack.callback(vm.close)
        return Restore(since_ms(started, vm.heartbeats.wait_first(READY_S)))


def our_restore(guest: Guest, path: Path) -> Restore:
    """Start kvmigrate on a snapshot, until the guest is heard."""
    with scratch() as directory, ExitStack() as stack:
        started = time.monotonic_ns()
        vm = Ours(directory / "r", guest, "restore", str(path))
        stack.callback(vm.close)
        restored = Restore(since_ms(started, vm.heartbeats.wait_first(READY_S)))
        vm.connect()
        return restored
