"""A saved guest is restored once at a time, or as clones; what it sees of the time since; what a restore renews."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from .command import Host, wait_until
from .test_moves import busy_guest
from .test_vm import ended

pytestmark = [pytest.mark.kvm, pytest.mark.timeout(300)]


@pytest.fixture
def saved(host: Host) -> str:
    """The snapshot of a guest that was ended; returns the guest's UUID."""
    with busy_guest(host, "one") as process:
        uuid: str = host("query", "one", "--json").json["uuid"]
        assert host("snapshot", "one", "snap").status == 0
        host("stop", "one")
        assert ended(process)[0] == 8
    return uuid


@contextmanager
def restored(host: Host, name: str, *options: str, directory: str = "snap") -> Iterator[subprocess.Popen[str]]:
    arguments = (directory, "--name", name, "--serial", "null", "--paused", *options)
    with host.start("restore", *arguments) as process:
        wait_until(
            lambda: process.poll() is not None or (host.ask(name, "query-status") or {}).get("status") == "paused",
            f"VM {name}",
        )
        assert process.poll() is None, process.communicate()
        yield process


def test_a_second_restore_is_refused_while_the_first_lives_and_a_clone_is_not(host: Host, saved: str) -> None:
    with restored(host, "two") as first:
        refused = host("restore", "snap", "--name", "three")
        assert refused.status == 2
        assert f"as VM two (process {first.pid}): end it, or restore with --clone" in refused.err
        with restored(host, "four", "--clone"), restored(host, "five", "--clone"):
            uuids = [host("query", name, "--json").json["uuid"] for name in ("two", "four", "five")]
        assert uuids[0] == saved
        assert len(set(uuids)) == 3
        host("stop", "two")
        assert ended(first)[0] == 8
    with restored(host, "three"):
        pass


def test_a_killed_process_gives_its_snapshot_back(host: Host, saved: str) -> None:
    with restored(host, "two") as first:
        first.kill()
        first.wait()
        with restored(host, "three"):
            assert "as VM three" in host("restore", "snap").err


def test_a_snapshot_that_may_only_be_read_is_held_all_the_same(host: Host, saved: str) -> None:
    for path in ("snap/state", "snap/memory.raw"):
        (host.directory / path).chmod(0o400)
    with restored(host, "two"):
        assert "as VM two" in host("restore", "snap").err


def test_what_is_no_snapshot_is_one_line(host: Host, saved: str) -> None:
    refused = host("restore", "absent")
    assert refused.status == 2
    assert "absent/state: No such file or directory" in refused.err
    assert len(refused.err.splitlines()) == 1
    assert host.left_behind == []


def test_the_clock_may_count_the_time_since_or_not(host: Host, saved: str) -> None:
    with restored(host, "two", "--clock", "host"):
        pass
    assert "'continue', 'host'" in host("restore", "snap", "--clock", "yesterday").err
