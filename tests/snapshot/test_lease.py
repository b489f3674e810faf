"""A snapshot is held by one at a time, also where the file system has no locks."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

import pytest

from kvmigrate.control import runtime
from kvmigrate.control.leases import leased
from kvmigrate.errors import SnapshotError
from kvmigrate.snapshot.lease import Taken, take_lease


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "run").mkdir(mode=0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))
    (tmp_path / "snap").mkdir()
    (tmp_path / "snap" / "state").write_bytes(b"as it was")
    return tmp_path / "snap"


def test_a_lease_excludes_others_until_it_is_released_and_writes_nothing(directory: Path) -> None:
    lease = take_lease(directory)
    with pytest.raises(Taken, match="another host or user"):
        take_lease(directory)
    lease.release()
    take_lease(directory).release()
    assert (directory / "state").read_bytes() == b"as it was"
    assert [path.name for path in directory.iterdir()] == ["state"]


def test_a_copy_of_a_snapshot_is_another_one(directory: Path, tmp_path: Path) -> None:
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "state").write_bytes(b"as it was")
    first, second = take_lease(directory), take_lease(tmp_path / "copy")
    assert first.key != second.key
    first.release()
    second.release()


def test_a_symbolic_link_is_not_followed(directory: Path) -> None:
    (directory / "state").rename(directory / "elsewhere")
    (directory / "state").symlink_to("elsewhere")
    with pytest.raises(SnapshotError, match="cannot read"):
        take_lease(directory)


@pytest.mark.parametrize("locks", [True, False], ids=["with_locks", "without_locks"])
def test_the_holder_is_named(directory: Path, monkeypatch: pytest.MonkeyPatch, locks: bool) -> None:
    one, two = runtime.claim("one"), runtime.claim("two")
    if not locks:
        monkeypatch.setattr("kvmigrate.snapshot.lease.fcntl.flock", without_locks_on(directory))
    try:
        with leased(directory, one):
            with pytest.raises(Taken, match=rf"as VM one \(process {os.getpid()}\)"), leased(directory, two):
                pass
            assert not two.lease_path.exists()
        with leased(directory, two):
            assert two.lease_path.exists()
    finally:
        one.release()
        two.release()


def without_locks_on(directory: Path) -> object:
    """flock(2) as a file system answers that has no locks, for files in ``directory`` alone."""
    really = fcntl.flock

    def flock(fd: int, operation: int) -> None:
        if Path(f"/proc/self/fd/{fd}").readlink().is_relative_to(directory):
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        really(fd, operation)

    return flock
