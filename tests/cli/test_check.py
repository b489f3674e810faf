"""The verb check: what it answers, in words, in JSON and by its exit status, and that nothing changes by it."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvmigrate.guests import path as guest_image

from .command import Host, wait_until
from .test_moves import beats, busy_guest, runs_on
from .test_vm import ended, running, waiting

pytestmark = [pytest.mark.kvm, pytest.mark.timeout(300)]


def test_a_guest_that_could_go_on_there_is_told_so_and_goes_on_here(host: Host) -> None:
    with busy_guest(host, "one") as source, waiting(host, "two") as (target, address):
        found = host("check", "one", address, "--json")
        assert (found.status, found.err) == (0, "")
        value = found.json
        assert (value["kind"], value["target"], value["status"]) == ("check", address, "completed")
        assert value["fits"] is True
        assert value["counts"]["refused"] == 0 < value["counts"]["exact"]
        assert 0 < value["pause-time"] < value["total-time"]
        told = host("check", "one", address, "--verbose")
        assert told.status == 0
        assert "this guest can go on" in told.out
        assert "kvmclock goes on from the saved value" in told.out
        assert "this guest can go on" in host("query", "one").out
        assert host.ask("one", "query-migrate") == {}
        assert host.ask("one", "query-status")["status"] == "running"
        runs_on(host, "one")
        assert host("send", "one", address).status == 0
        assert ended(source)[0] == 6
        host("stop", "two")
        assert ended(target)[0] == 8
    assert host.left_behind == []


def test_a_disk_that_is_not_there_is_told_with_status_1(host: Host) -> None:
    image = host.directory / "root.img"
    image.write_bytes(bytes(1 << 16))
    append = ("--append", "beat=20")
    with host.start(
        "run", guest_image("ledger"), "--name", "one", "--memory", "32M", "--serial", f"file:{host.directory}/one.log",
        "--disk", f"root={image}", *append,
    ) as source:  # fmt: skip
        wait_until(lambda: source.poll() is not None or beats(host, "one") > 3, "heartbeats")
        with waiting(host, "two", "--disk", f"root={host.directory}/none") as (_, address):
            found = host("check", "one", address)
            assert found.status == 1
            assert "disk-root" in found.out
            assert "No such file" in found.out
        runs_on(host, "one")
        # Here the source has the image locked, which goes with the guest.
        with waiting(host, "three") as (target, address):
            assert host("check", "one", address).status == 0
            assert host("send", "one", address).status == 0
            assert ended(source)[0] == 6
            host("stop", "three")
            assert ended(target)[0] == 8


def test_no_answer_is_an_error_in_one_line(host: Host, tmp_path: Path) -> None:
    with running(host, "one") as process:
        found = host("check", "one", "tcp://127.0.0.1:1")
        assert found.status == 2
        assert "nothing listens there" in found.err
        assert len(found.err.splitlines()) == 1
        found = host("check", "none", "tcp://127.0.0.1:1")
        assert found.status == 2
        assert "no VM named none" in found.err
        assert host.ask("one", "query-status")["status"] == "running"
        host("stop", "one")
        ended(process)
