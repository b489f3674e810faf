"""Guests that move, are saved and are restored by the command; and what is left when that fails half-way."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kvmigrate.guests import path as guest_image
from kvmigrate.memory import huge
from kvmigrate.state.frame import FrameKind

from .command import Host, wait_until
from .proxy import Cutter
from .test_vm import ended, waiting

pytestmark = [pytest.mark.kvm, pytest.mark.timeout(300)]

SLOW = ("--bandwidth", "4M")
"""So that a guest with 20 MiB of data is on its way for seconds."""


@contextmanager
def busy_guest(host: Host, name: str, parameters: str = "") -> Iterator[subprocess.Popen[str]]:
    """A guest that writes and checks its memory, with 20 MiB of data; its heartbeats go to ``name``.log."""
    log = host.directory / f"{name}.log"
    arguments = ("--name", name, "--memory", "64M", "--serial", f"file:{log}")
    append = f"fill=20 beat=20 {parameters}"
    with host.start("run", guest_image("ledger"), *arguments, "--append", append) as process:
        wait_until(lambda: process.poll() is not None or beats(host, name) > 3, f"heartbeats of {name}")
        assert process.poll() is None, process.communicate()
        yield process


def beats(host: Host, name: str) -> int:
    """How many heartbeats were logged, and that nothing else was."""
    log = host.directory / f"{name}.log"
    lines = log.read_text().splitlines() if log.exists() else []
    assert not any(line.startswith("BAD") for line in lines), lines[-1]
    return len(lines)


def runs_on(host: Host, name: str) -> None:
    """Wait for three more heartbeats."""
    before = beats(host, name)
    wait_until(lambda: beats(host, name) > before + 3, f"more heartbeats of {name}")


def on_its_way(host: Host) -> bool:
    """Whether pages of the guest ``one`` are being sent."""
    return bool((host.ask("one", "query-migrate") or {}).get("status") == "active")


def test_a_guest_is_sent_with_figures_for_programs_and_goes_on(host: Host) -> None:
    log = f"file:{host.directory / 'two.log'}"
    with busy_guest(host, "one") as source, waiting(host, "two", "--serial", log) as (target, address):
        before = host("query", "two")
        assert before.status == 0 and f"incoming migration at {address}: none\n" in before.out
        refused = host("send", "one", "tcp://127.0.0.1:1", "--json")
        assert refused.status == 2
        assert refused.json["status"] == "failed"
        assert refused.json["error"]["class"] == "HostError"
        assert "Connection refused (nothing listens there" in refused.err
        runs_on(host, "one")

        sent = host("send", "one", address, "--json", "--compress", "zstd:1")
        assert (sent.status, sent.err) == (0, "")
        value = sent.json
        assert value["status"] == "completed"
        assert value["ram"]["normal"] == sum(record["pages-sent"] for record in value["rounds"])
        parts = value["downtime-parts"]
        measured = sum(parts[part] for part in ("stop", "state", "last-pages", "send", "load", "resume"))
        assert parts["total"] == pytest.approx(measured, abs=0.1)
        assert value["fidelity"]["counts"]["refused"] == 0
        assert value["fidelity"]["counts"]["exact"] > 100
        assert ended(source) == (6, f"kvmigrate: VM one has moved to {address}\n")
        runs_on(host, "two")
        after = host("query", "two")
        assert after.status == 0 and f"incoming migration at {address}: completed\n" in after.out
        assert host("stop", "two").status == 0
        assert ended(target)[0] == 8
    assert host.left_behind == []


def test_without_a_copy_the_result_says_what_it_brought(host: Host) -> None:
    log = f"file:{host.directory / 'two.log'}"
    unix = f"unix://{host.directory}/there.sock"
    with busy_guest(host, "one") as source, waiting(host, "two", "--serial", log) as (target, address):
        refused = host("send", "one", unix, "--zerocopy")
        assert refused.status == 2
        assert refused.err == f"kvmigrate: {unix}: a UNIX socket always copies: leave out --zerocopy, or go by tcp:\n"
        runs_on(host, "one")
        sent = host("send", "one", address, "--zerocopy")
        assert sent.status == 0
        # Over the loopback, so that it brings nothing.
        assert re.search(r"^zero-copy: copied by the kernel anyway: [1-9]\d* of \d+ sends", sent.out, re.MULTILINE), (
            sent.out
        )
        assert ended(source)[0] == 6
        runs_on(host, "two")
        assert host("stop", "two").status == 0
        assert ended(target)[0] == 8
    assert host.left_behind == []


@pytest.mark.parametrize("prefault", ["64M", "32M"], ids=["of its size", "of another size"])
def test_a_guest_goes_to_a_destination_that_touched_memory_before_it_came(host: Host, prefault: str) -> None:
    log = f"file:{host.directory / 'two.log'}"
    with (
        busy_guest(host, "one") as source,
        waiting(host, "two", "--serial", log, "--prefault", prefault) as (target, address),
    ):
        size_kib = int(prefault.removesuffix("M")) << 10
        status = Path(f"/proc/{target.pid}/status").read_text()
        assert int(re.search(r"RssAnon:\s+(\d+) kB", status)[1]) > size_kib  # type: ignore[index]
        assert host("send", "one", address).status == 0
        assert ended(source)[0] == 6
        runs_on(host, "two")
        assert host("stop", "two").status == 0
        assert ended(target)[0] == 8
    assert host.left_behind == []


def test_a_destination_without_the_huge_pages_is_refused_before_a_page_moves(host: Host) -> None:
    if huge.free_bytes() >= 64 << 20:
        pytest.skip("this host has huge pages to give")
    with busy_guest(host, "one"), waiting(host, "two", "--memory-backend", "hugetlbfs") as (target, address):
        would = host("check", "one", address)
        assert would.status == 1 and "32 huge pages of 2 MiB are needed" in would.out
        sent = host("send", "one", address, "--json")
        assert sent.status == 2 and "64 MiB of guest memory: 32 huge pages of 2 MiB are needed" in sent.err
        assert len(sent.err.splitlines()) == 1
        assert "ram" not in sent.json, "no round has begun"
        runs_on(host, "one")
        assert ended(target)[0] == 2


def test_a_destination_that_dies_costs_nothing_and_the_next_one_gets_the_guest(host: Host) -> None:
    with busy_guest(host, "one") as source:
        with waiting(host, "two") as (target, address), host.start("send", "one", address, *SLOW) as sending:
            wait_until(lambda: on_its_way(host), "the first round")
            target.kill()
            status, err = ended(sending)
        assert status == 2
        assert len(err.splitlines()) == 1, err
        assert host.ask("one", "query-status")["status"] == "running"
        runs_on(host, "one")
        with waiting(host, "three", "--paused") as (target, address):
            sent = host("send", "one", address, "--verbose")
            assert sent.status == 0
            assert "the guest stood still for" in sent.out
            assert "(paused)" in sent.out
            assert "exact" in sent.out
            assert ended(source)[0] == 6
            wait_until(lambda: host.ask("three", "query-status")["status"] == "paused", "the guest at three")
            host("stop", "three")
            assert ended(target)[0] == 8
    # Of a killed destination only the journal stays, which can tell its source that the guest never ran there.
    assert host("list").out == "no VM is running\n"
    assert host.left_behind == ["two.journal"]


def test_what_failed_after_its_rounds_can_be_asked_for(host: Host) -> None:
    with busy_guest(host, "one"), waiting(host, "two") as (_, address):
        never = ("--bandwidth", "20M", "--max-rounds", "2", "--downtime-limit", "1ms")
        sent = host("send", "one", address, *never)
        assert sent.status == 2 and "after 2 rounds" in sent.err
        told = host("query", "one")
        assert (told.status, told.err) == (0, "")
        assert f"migration to {address}: failed\n  {sent.err.removeprefix('kvmigrate: ')}" in told.out
        assert "as asked for" in told.out, "the table of rounds"
        runs_on(host, "one")
        host("stop", "one")


def test_a_send_is_cancelled_by_the_verb_and_by_ctrl_c(host: Host) -> None:
    with busy_guest(host, "one"):
        for by_verb in (True, False):
            with waiting(host, "two") as (target, address), host.start("send", "one", address, *SLOW) as sending:
                wait_until(lambda: on_its_way(host), "the first round")
                if by_verb:
                    assert host("cancel", "one").status == 0
                else:
                    sending.send_signal(signal.SIGINT)
                status, err = ended(sending)
                assert (status, err) == (2, "kvmigrate: cancelled by the operator: the guest runs on here\n")
                assert ended(target)[0] == 2
            runs_on(host, "one")


def test_a_guest_that_ends_on_its_way_ends_both_sides_cleanly(host: Host) -> None:
    with busy_guest(host, "one", "seconds=6") as source, waiting(host, "two") as (target, address):
        done = host("send", "one", address, "--bandwidth", "1M")
        assert done.status == 2
        assert done.err == "kvmigrate: the guest came to its end: it switched itself off\n"
        assert ended(source)[0] == 0
        assert ended(target)[0] == 2
    assert "OK" in (host.directory / "one.log").read_text().splitlines()[-1]
    assert host.left_behind == []


@pytest.mark.parametrize("junk", [b"", b"GET / HTTP/1.0\r\n\r\n", os.urandom(100), b"KVMG" + bytes(28)])
def test_a_stranger_costs_the_waiting_process_one_line(host: Host, junk: bytes) -> None:
    with waiting(host, "two") as (process, address):
        with socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2]))) as stranger:
            stranger.sendall(junk)
        status, err = ended(process)
        assert status == 2
        assert len(err.splitlines()) == 1, err
    assert host.left_behind == []


def test_a_guest_is_saved_while_it_runs_and_restored(host: Host) -> None:
    with busy_guest(host, "one") as process:
        saved = host("snapshot", "one", "snap", "--json")
        assert saved.status == 0
        assert saved.json["status"] == "completed"
        assert f"{host.directory}/snap exists: remove it" in host("snapshot", "one", "snap").err
        packed = host("snapshot", "one", "packed", "--paused", "--compress", "zstd")
        assert "the guest was paused for" in packed.out
        runs_on(host, "one")
        host("stop", "one")
        assert ended(process)[0] == 8
    assert host("inspect", "snap", "--json").json["description"]["memory_bytes"] == 64 << 20
    assert "rip" in host("inspect", "packed").out
    restored_runs_on(host, "snap")
    restored_runs_on(host, "packed")
    memory = host.directory / "snap" / "memory.raw"
    memory.write_bytes(memory.read_bytes()[:-4096] + os.urandom(4096))
    damaged = host("verify", "snap")
    assert damaged.status == 1
    assert "memory.raw, byte" in damaged.out
    assert host.left_behind == []


def restored_runs_on(host: Host, name: str) -> None:
    """Check the snapshot ``name`` and restore it paused; resumed, its guest beats on and ends by ``stop``."""
    assert host("verify", name, "--json").json["ok"] is True
    serial = f"file:{host.directory / name}.log"
    with host.start("restore", name, "--name", name, "--serial", serial, "--paused") as restored:
        wait_until(lambda: (host.ask(name, "query-status") or {}).get("status") == "paused", f"VM {name}")
        assert beats(host, name) == 0
        host("resume", name)
        runs_on(host, name)
        host("stop", name)
        assert ended(restored)[0] == 8


def test_a_snapshot_that_cannot_be_written_leaves_nothing_and_the_guest_running(host: Host) -> None:
    with busy_guest(host, "one"):
        done = host("snapshot", "one", "absent/snap")
        assert done.status == 2
        assert "absent" in done.err
        runs_on(host, "one")


@pytest.mark.parametrize("action", ["--run", "--discard"])
def test_a_guest_in_doubt_stays_paused_until_the_operator_resolves_it(host: Host, action: str) -> None:
    """The link dies while the destination says RUNNING, so that the source cannot know."""
    with busy_guest(host, "one") as source, waiting(host, "two") as (target, address):
        cutter = Cutter(int(address.rpartition(":")[2]), FrameKind.RUNNING)
        done = host("send", "one", f"tcp://127.0.0.1:{cutter.port}", "--timeout", "1s", "--connections", "1")
        assert cutter.cut.is_set()
        assert done.status == 2
        assert "kvmigrate resolve one" in done.err
        assert host.ask("one", "query-migrate")["status"] == "commit-unknown"
        assert host.ask("one", "query-status")["running"] is False
        assert host("resume", "one").status == 2
        journal = json.loads((host.run_dir / "kvmigrate" / "one.journal").read_text())
        assert (journal["role"], journal["state"]) == ("source", "committed")

        if action == "--run":
            target.kill()
            target.wait()
        assert host("resolve", "one", action).status == 0
        if action == "--run":
            runs_on(host, "one")
            assert host.ask("one", "query-migrate")["status"] == "failed"
            host("stop", "one")
            assert ended(source)[0] == 8
        else:
            assert ended(source)[0] == 6
            assert host.ask("two", "query-status")["status"] == "running"
    assert not (host.run_dir / "kvmigrate" / "one.journal").exists()


def test_the_demonstration_shows_what_it_says(host: Host, tmp_path: Path) -> None:
    done = host("demo", "--memory", "64M", TMPDIR=str(tmp_path))
    assert (done.status, done.err) == (0, "")
    assert "heartbeats, each exactly once" in done.out
    assert "the guest stood still for" in done.out
    assert host.left_behind == []
    assert not list(tmp_path.glob("kvmigrate-demo-*"))
