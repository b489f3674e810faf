"""Whatever fails, the guest goes on with logging off, nothing is left behind, and the next snapshot loses nothing."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvmigrate.config import Compression, SnapshotParameters
from kvmigrate.contract import RunState
from kvmigrate.errors import Cancelled, HostError, NotConverged, SnapshotError, StateError
from kvmigrate.memory.dirty import DirtyLog, LogMode
from kvmigrate.precopy.converge import Decision, Limits
from kvmigrate.precopy.ledger import RoundRecord
from kvmigrate.precopy.rounds import PreCopy
from kvmigrate.snapshot.save import take
from kvmigrate.snapshot.sink import open_sink
from kvmigrate.snapshot.staging import Staging
from kvmigrate.snapshot.verify import verify
from tests.snapshot.tools import PAUSED, RAW, ZSTD, Guest, Watcher, assert_unharmed, guest, page, restored

BOTH = pytest.mark.parametrize("parameters", [RAW, ZSTD], ids=["raw", "zstd"])
THREE = pytest.mark.parametrize("parameters", [RAW, ZSTD, PAUSED], ids=["raw", "zstd", "paused"])


@pytest.fixture
def machine() -> Iterator[Guest]:
    with guest() as running:
        running.fill(600)
        yield running


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB. Needs root, as all that needs a mount does; fails where it cannot be had."""
    mount = tmp_path / "small"
    mount.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(mount)], check=True)
    try:
        yield mount
    finally:
        subprocess.run(["umount", str(mount)], check=True)


def fails(machine: Guest, target: Path, parameters: SnapshotParameters, kind: type[Exception] = SnapshotError) -> str:
    """Take a snapshot that fails; returns the one line that says why."""
    with pytest.raises(kind) as raised:
        take(machine, target, parameters)
    text = str(raised.value)
    assert "\n" not in text
    return text


def assert_next_one_is_whole(machine: Guest, target: Path, parameters: SnapshotParameters = RAW) -> None:
    """After a failure: the next snapshot holds all that the guest holds."""
    take(machine, target, parameters)
    with restored(target) as copy:
        assert copy.machine.digest() == machine.saved  # type: ignore[attr-defined]
    assert verify(target).ok


@THREE
def test_full_disk_leaves_nothing_and_the_next_snapshot_is_whole(
    machine: Guest, small_disk: Path, tmp_path: Path, parameters: SnapshotParameters
) -> None:
    machine.start_writer(40, 5_000)
    text = fails(machine, small_disk / "s", parameters)
    assert str(small_disk / "s") in text and "No space left on device" in text and "free some space" in text
    assert_unharmed(machine, small_disk)
    assert_next_one_is_whole(machine, tmp_path / "next", parameters)


@pytest.mark.parametrize("compression", [RAW.compression, ZSTD.compression], ids=["raw", "zstd"])
def test_pages_that_were_not_written_stay_pending(machine: Guest, small_disk: Path, compression: Compression) -> None:
    (small_disk / "filler").write_bytes(bytes(512 << 10))
    with Staging(small_disk / "s") as staging:
        sink = open_sink(staging, machine.memory, compression)
        precopy = PreCopy(machine.memory, machine.dirty_log, sink, Limits(300, 30))
        with pytest.raises((OSError, HostError)):
            precopy.run()
        # A chunk is up to 256 pages, and the disk has no room for the first: all of them are still to do.
        assert machine.dirty_log.sync() == machine.memory.resident_pages()
        precopy.stop()


@BOTH
def test_disk_that_fills_up_after_the_pause_lets_the_guest_run(
    machine: Guest, small_disk: Path, tmp_path: Path, parameters: SnapshotParameters
) -> None:
    machine.write(0, bytes(page(600)))

    def fill_up(record: RoundRecord, decision: Decision | None) -> None:
        if decision is None:
            with pytest.raises(OSError, match="No space"), (small_disk / "filler").open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))

    with pytest.raises(SnapshotError, match="No space left"):
        take(machine, small_disk / "s", parameters, Watcher(machine, fill_up))
    assert_unharmed(machine, small_disk, left=["filler"])
    assert_next_one_is_whole(machine, tmp_path / "next")


@BOTH
def test_limit_on_file_sizes_is_named(machine: Guest, tmp_path: Path, parameters: SnapshotParameters) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        text = fails(machine, tmp_path / "s", parameters)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "File too large" in text and "ulimit -f" in text
    assert_unharmed(machine, tmp_path)
    assert_next_one_is_whole(machine, tmp_path / "next")


@THREE
@pytest.mark.parametrize("failing", [0, 1, 2, 3])
def test_disk_that_fails_while_flushing_leaves_nothing(
    machine: Guest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parameters: SnapshotParameters, failing: int
) -> None:
    calls: list[int] = []

    def fsync(fd: int) -> None:
        calls.append(fd)
        if len(calls) == failing + 1:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        text = fails(machine, tmp_path / "s", parameters)
    assert len(calls) == failing + 1
    assert "Input/output error" in text and str(tmp_path / "s") in text
    assert_unharmed(machine, tmp_path)
    assert_next_one_is_whole(machine, tmp_path / "s")


def test_both_files_and_both_directories_are_flushed(
    machine: Guest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda fd: flushed.append(str(Path(f"/proc/self/fd/{fd}").readlink())))
    take(machine, tmp_path / "s", RAW)
    assert [Path(path).name.partition(".tmp-")[0] for path in flushed] == ["memory.raw", "state", "s", tmp_path.name]
    # The directory above comes after the rename: by then its entry is the target's.
    assert ".tmp-" in flushed[2] and flushed[3] == str(tmp_path)


def test_read_only_file_system_is_named(machine: Guest, small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert "mounted read-only: choose another place" in fails(machine, small_disk / "s", RAW)
    assert_unharmed(machine, small_disk)


def make_file(path: Path) -> None:
    path.write_text("mine")


@pytest.mark.parametrize(
    "make",
    [make_file, Path.mkdir, lambda path: path.symlink_to("nowhere")],
    ids=["file", "directory", "dangling link"],
)
def test_target_that_exists_is_refused_untouched(machine: Guest, tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "s")
    before = os.lstat(tmp_path / "s")
    text = fails(machine, tmp_path / "s", RAW)
    assert text == f"{tmp_path / 's'} exists: remove it or choose another name"
    assert os.lstat(tmp_path / "s") == before
    assert machine.nr_pauses == 0
    assert_unharmed(machine, tmp_path, left=["s"])


def test_target_that_appears_meanwhile_is_refused_untouched(machine: Guest, tmp_path: Path) -> None:
    def intrude(record: RoundRecord, decision: Decision | None) -> None:
        if decision is None:
            (tmp_path / "s").mkdir()
            (tmp_path / "s" / "state").write_text("another's")

    with pytest.raises(SnapshotError, match="exists"):
        take(machine, tmp_path / "s", RAW, Watcher(machine, intrude))
    assert (tmp_path / "s" / "state").read_text() == "another's"
    assert_unharmed(machine, tmp_path, left=["s"])


def test_own_backing_directory_is_refused(machine: Guest, tmp_path: Path) -> None:
    take(machine, tmp_path / "s", RAW)
    with restored(tmp_path / "s") as copy:
        copy.machine.resume()
        with pytest.raises(SnapshotError, match="exists"):
            take(copy.machine, tmp_path / "s", RAW)
        assert copy.machine.memory.hash_all() == machine.memory.hash_all()


def test_missing_and_impossible_parents_are_named(machine: Guest, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "create the directory above it first" in fails(machine, tmp_path / "no" / "s", RAW)
    assert "is not a directory: choose another" in fails(machine, tmp_path / "file" / "s", RAW)
    assert machine.nr_pauses == 0
    assert_unharmed(machine, tmp_path, left=["file"])


@THREE
@pytest.mark.parametrize("where", ["pause", "save"])
def test_machine_that_fails_runs_on(machine: Guest, tmp_path: Path, parameters: SnapshotParameters, where: str) -> None:
    machine.faults.once = {where: HostError("KVM_GET_REGS", errno.EINVAL)}
    assert "KVM_GET_REGS" in fails(machine, tmp_path / "s", parameters, HostError)
    assert_unharmed(machine, tmp_path)
    assert_next_one_is_whole(machine, tmp_path / "s")


@BOTH
def test_guest_that_ends_while_it_is_copied_is_not_resumed(
    machine: Guest, tmp_path: Path, parameters: SnapshotParameters
) -> None:
    with pytest.raises(StateError, match="shutdown"):
        take(machine, tmp_path / "s", parameters, Watcher(machine, lambda record, decision: machine.end()))
    assert machine.runstate is RunState.SHUTDOWN and machine.nr_resumes == 1
    assert not machine.dirty_log.active and not list(tmp_path.iterdir())


@pytest.mark.parametrize("state", [RunState.SHUTDOWN, RunState.INMIGRATE, RunState.POSTMIGRATE])
def test_guest_that_is_not_ours_to_save_is_refused(tmp_path: Path, state: RunState) -> None:
    with guest() as machine:
        machine.end(state)
        assert state.value in fails(machine, tmp_path / "s", RAW, StateError)
    assert not list(tmp_path.iterdir())


def test_log_that_another_job_uses_is_left_on(machine: Guest, tmp_path: Path) -> None:
    machine.dirty_log.start()
    fails(machine, tmp_path / "s", RAW, StateError)
    assert machine.dirty_log.active
    machine.dirty_log.stop()
    assert_unharmed(machine, tmp_path)


@THREE
@pytest.mark.parametrize("at", ["start", "round", "end"])
def test_cancelled_snapshot_leaves_nothing(
    machine: Guest, tmp_path: Path, parameters: SnapshotParameters, at: str
) -> None:
    abort_fd = os.eventfd(1 if at == "start" else 0)

    def cancel(record: RoundRecord, decision: Decision | None) -> None:
        if (decision is None) == (at == "end") or parameters is PAUSED:
            os.eventfd_write(abort_fd, 1)

    try:
        with pytest.raises(Cancelled):
            take(machine, tmp_path / "s", parameters, Watcher(machine, cancel), abort_fd)
    finally:
        os.close(abort_fd)
    assert_unharmed(machine, tmp_path)
    assert_next_one_is_whole(machine, tmp_path / "s", parameters)


class BusyLog(DirtyLog):
    """Before each sync the guest writes 2000 pages anew: rounds never shrink."""

    guest: Guest
    nr_syncs = 0

    def sync(self) -> int:
        self.nr_syncs += 1
        self.guest.fill(2000, seed=self.nr_syncs)
        return super().sync()


def test_guest_that_writes_too_fast_is_given_up_with_a_way_out(machine: Guest, tmp_path: Path) -> None:
    busy = BusyLog(machine.memory, LogMode.GET)
    busy.guest = machine
    machine.dirty_log = busy
    parameters = SnapshotParameters(downtime_limit_ms=0.001, max_rounds=3)
    text = fails(machine, tmp_path / "s", parameters, NotConverged)
    assert text.endswith("or stop the guest for all of it with --paused")
    assert machine.nr_pauses == 0 and busy.nr_syncs == 3
    assert_unharmed(machine, tmp_path)
    assert_next_one_is_whole(machine, tmp_path / "s", PAUSED)


def test_leftovers_of_a_killed_process_are_removed_and_those_of_a_living_one_are_not(
    machine: Guest, tmp_path: Path
) -> None:
    script = (
        "import os, sys; from pathlib import Path; from kvmigrate.snapshot.staging import Staging\n"
        "staging = Staging(Path(sys.argv[1])); staging.create('memory.raw')\n"
        "print('ready', flush=True); sys.stdin.read(1); os._exit(1)"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "s")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline() == b"ready\n"
        take(machine, tmp_path / "s", RAW)
        assert len(list(tmp_path.iterdir())) == 2
        other.kill()
    (tmp_path / "s").rename(tmp_path / "kept")
    take(machine, tmp_path / "s", RAW)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept", "s"]
