"""VM processes as a user meets them: how they start, what they answer, how they end, and that they leave nothing."""

from __future__ import annotations

import asyncio
import functools
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from qemu.qmp import ExecuteError, QMPClient

from tests.qemu_qmp import ask, next_event

from . import sectors
from .command import Host, wait_until

pytestmark = [pytest.mark.kvm, pytest.mark.timeout(300)]

SMALL = ("--memory", "8M", "--serial", "null", "--boot", "flat")


@contextmanager
def running(host: Host, name: str, code: bytes = sectors.SLEEP, *options: str) -> Iterator[subprocess.Popen[str]]:
    """A VM process called ``name`` whose control socket answers."""
    with host.start("run", sectors.sector(host.directory, code), "--name", name, *SMALL, *options) as process:
        wait_until(lambda: process.poll() is not None or host.ask(name, "query-status"), f"VM {name}")
        assert process.poll() is None, process.communicate()
        yield process


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    """The exit status and what was said on standard error."""
    _, err = process.communicate(timeout=30)
    return process.returncode, err


@pytest.mark.parametrize(
    ("code", "status", "text"),
    [
        (sectors.POWER_OFF, 0, ""),
        (sectors.DEBUG_EXIT_3, 7, ""),
        (sectors.RESET, 10, "the guest asked for a reset"),
    ],
)
def test_the_exit_status_says_how_the_guest_ended(host: Host, code: bytes, status: int, text: str) -> None:
    done = host("run", sectors.sector(host.directory, code), *SMALL, "--no-reboot")
    assert (done.status, done.out) == (status, "")
    assert (text in done.err) if text else (done.err == "")
    assert len(done.err.splitlines()) <= 1
    assert host.left_behind == []


def test_a_crash_is_named(host: Host) -> None:
    image = sectors.triple_fault(host.directory)
    done = host("run", image, "--memory", "8M", "--serial", "null", "--boot", "multiboot")
    assert done.status == 4
    assert "SHUTDOWN" in done.err
    assert len(done.err.splitlines()) == 1


def test_a_running_vm_is_listed_queried_paused_resumed_and_stopped(host: Host) -> None:
    with running(host, "one", sectors.SLEEP, "--cpus", "2") as process:
        (row,) = host("list", "--json").json["vms"]
        expected = {"name": "one", "status": "running", "memory-bytes": 8 << 20, "vcpus": 2, "pid": process.pid}
        assert row == expected
        assert "one" in host("list").out
        assert host("pause", "one").out == "one: paused\n"
        assert host("pause", "one").status == 0
        assert host("query", "one", "--json").json["status"] == "paused"
        assert host("resume", "one").out == "one: running\n"
        asked = host("query", "one", "--json").json
        assert {key: asked[key] for key in expected} == expected
        assert asked["job"] == {"kind": "none"}
        assert asked["uuid"] in host("query", "one").out
        assert host("stop", "one").out == "one: stopped\n"
        assert ended(process) == (8, "kvmigrate: VM one was stopped by the operator\n")
    assert host.left_behind == []


def test_a_vm_can_be_started_paused(host: Host) -> None:
    with running(host, "one", sectors.POWER_OFF, "--paused") as process:
        assert host.ask("one", "query-status")["status"] == "prelaunch"
        host("resume", "one")
        assert ended(process)[0] == 0


def test_the_balloon_is_shown_and_refused_where_nobody_drives_it(host: Host) -> None:
    with running(host, "one"):
        asked = host("balloon", "one", "--json").json
        whole = {"target-bytes": 8 << 20, "actual-bytes": 8 << 20, "memory-bytes": 8 << 20}
        assert asked == {"name": "one", "driver": False, **whole}
        assert host("balloon", "one").out.startswith(
            "one: has 8 MiB of 8 MiB, is to keep 8 MiB; it has no balloon driver"
        )
        for size, text in (
            ("4M", "the guest has no balloon driver"),
            ("0", "expects a value from 1"),
            ("x", "not a size"),
        ):
            done = host("balloon", "one", size)
            assert (done.status, len(done.err.splitlines())) == (2, 1)
            assert text in done.err


def test_a_taken_name_is_refused_and_the_holder_unharmed(host: Host) -> None:
    with running(host, "one"):
        done = host("run", sectors.sector(host.directory, sectors.SLEEP), "--name", "one", *SMALL)
        assert done.status == 2
        assert "a VM named one is running already" in done.err
        assert host.ask("one", "query-name")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_it_in_good_order(host: Host, number: signal.Signals) -> None:
    with running(host, "one") as process:
        process.send_signal(number)
        assert ended(process) == (8, f"kvmigrate: VM one was stopped by {number.name}\n")
    assert host.left_behind == []


SWALLOWED = """
import os, signal, sys
from kvmigrate.cli.app import run_command
from kvmigrate.control import processes

class Finalized:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)

serve = processes._serve

def serve_after(claim, machine):
    Finalized()
    return serve(claim, machine)

processes._serve = serve_after
sys.exit(run_command(sys.argv[1:]))
"""
"""Python drops what a signal's handler raises inside of a finalizer, as while it imports."""


def test_a_signal_that_comes_inside_of_a_finalizer_is_not_lost(host: Host) -> None:
    image = sectors.sector(host.directory, sectors.SLEEP)
    command = [sys.executable, "-c", SWALLOWED, "run", str(image), "--name", "one", *SMALL]
    environment = os.environ | {"XDG_RUNTIME_DIR": str(host.run_dir)}
    done = subprocess.run(command, check=False, env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (8, "kvmigrate: VM one was stopped by SIGTERM\n")
    assert host.left_behind == []


def test_a_killed_process_leaves_its_name_free(host: Host) -> None:
    with running(host, "one") as process:
        process.kill()
        process.wait()
        assert host("list").out == "no VM is running\n"
        assert host.left_behind == []
        with running(host, "one"):
            assert host.ask("one", "query-name") == {"name": "one"}


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["absent"], "absent"),
        (["/"], "/"),
        (["/dev/null"], "/dev/null"),
        (["IMAGE", "--initrd", "absent"], "absent"),
        (["IMAGE", "--serial", "carrier-pigeon"], "is not a serial backend"),
        (["IMAGE", "--serial", "unix:/absent/socket"], "/absent/socket"),
        (["IMAGE", "--console", "carrier-pigeon"], "is not a console backend"),
        (["IMAGE", "--console", "unix:/absent/socket"], "console unix:/absent/socket"),
        (["IMAGE", "--boot", "linux"], "IMAGE"),
        (["FOREIGN"], "not a kernel for x86-64"),
        (["IMAGE", "--initrd", "LARGE"], "LARGE: the initrd is larger than"),
        (["IMAGE", "--disk", "root=absent"], "disk root: absent: No such file"),
        (["IMAGE", "--disk", "root=FOREIGN"], "disk root: FOREIGN has 100 bytes"),
        (["IMAGE", "--disk", "root=LARGE", "--disk", "data=LARGE"], "disk data: LARGE is in use by another VM"),
        (["IMAGE", "--net", "lan=tap:kmig-absent"], "kmig-absent"),
    ],
)
def test_what_cannot_start_is_one_line_and_leaves_nothing(host: Host, arguments: list[str], text: str) -> None:
    image = sectors.sector(host.directory, sectors.SLEEP)
    foreign, large = host.directory / "foreign", host.directory / "large"
    foreign.write_bytes(bytes(0x38) + b"ARMd" + bytes(40))
    with large.open("wb") as file:
        file.truncate(64 << 20)
    paths = {"IMAGE": image, "FOREIGN": foreign, "LARGE": large}

    def spell(text: str) -> str:
        return functools.reduce(lambda done, word: done.replace(word, str(paths[word])), paths, text)

    given = [spell(word) for word in arguments]
    done = host("run", *given, "--name", "one", "--memory", "8M")
    assert done.status == 2
    assert spell(text) in done.err
    assert len(done.err.splitlines()) == 1, done.err
    assert host.left_behind == []


def test_several_processes_live_side_by_side(host: Host) -> None:
    with running(host, "a"), running(host, "b"):
        assert [vm["name"] for vm in host("list", "--json").json["vms"]] == ["a", "b"]
        host("stop", "a")
        assert [vm["name"] for vm in host("list", "--json").json["vms"]] == ["b"]


async def _fail_quietly(client: QMPClient) -> None:
    """A migration to nowhere; without the capability ``events`` it is told to those who ask alone, as by QEMU."""
    with client.listener(("MIGRATION", "MIGRATION_PASS")) as listener:
        await client.execute("migrate", {"uri": "tcp:127.0.0.1:1"})
        while (info := await ask(client, "query-migrate"))["status"] != "failed":
            await asyncio.sleep(0.05)
        assert "Connection refused" in info["error-desc"]
        assert listener.empty()


async def _script_for_qemu(socket: Path, uri: str) -> list[str]:
    """Moves a guest as one would move QEMU's, with QEMU's own library. Returns the statuses that were told."""
    client = QMPClient("script")
    await client.connect(str(socket))
    assert (await client.execute("query-kvm")) == {"enabled": True, "present": True}
    assert (await client.execute("query-migrate")) == {}
    assert (await ask(client, "query-status"))["running"] is True
    assert len(await ask(client, "query-cpus-fast")) == 1
    await _fail_quietly(client)
    capabilities = [{"capability": "events", "state": True}, {"capability": "multifd", "state": False}]
    await client.execute("migrate-set-capabilities", {"capabilities": capabilities})
    await client.execute("migrate-set-parameters", {"downtime-limit": 500, "max-bandwidth": 1 << 40})
    statuses: list[str] = []
    with client.listener(("MIGRATION", "STOP")) as listener:
        await client.execute("migrate", {"uri": uri})
        while "completed" not in statuses:
            told = await next_event(listener, 30)
            statuses.append(told["data"]["status"] if told["event"] == "MIGRATION" else told["event"])
    figures = await ask(client, "query-migrate")
    assert figures["status"] == "completed"
    assert figures["ram"]["total"] == 8 << 20
    assert figures["ram"]["remaining"] == 0
    assert figures["ram"]["transferred"] > 0
    assert figures["ram"]["dirty-sync-count"] >= 1
    assert {"total-time", "downtime", "setup-time"} <= figures.keys()
    assert (await ask(client, "query-status"))["status"] == "postmigrate"
    with pytest.raises(ExecuteError, match="postmigrate"):
        await client.execute("cont")
    await client.execute("quit")
    await client.disconnect()
    return statuses


@pytest.mark.parametrize("form", ["tcp:127.0.0.1:{port}", "tcp://127.0.0.1:{port}"])
def test_a_script_for_qemu_moves_a_guest_unchanged(host: Host, form: str) -> None:
    with running(host, "one") as source, waiting(host, "two") as (target, address):
        uri = form.format(port=address.rpartition(":")[2])
        statuses = asyncio.run(_script_for_qemu(host.socket("one"), uri))
        assert [word for word in statuses if word != "STOP"] == ["setup", "active", "device", "completed"]
        assert "STOP" in statuses
        assert ended(source) == (6, f"kvmigrate: VM one has moved to {address}\n")
        assert host.ask("two", "query-status")["status"] == "running"
        host("stop", "two")
        assert ended(target)[0] == 8
    assert host.left_behind == []


@contextmanager
def waiting(host: Host, name: str, *options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A process that waits for a guest, and the address it waits at."""
    with host.start("receive", "tcp://127.0.0.1:0", "--name", name, "--serial", "null", *options) as process:
        assert process.stderr is not None
        said = process.stderr.readline()
        if "--prefault" in options:
            assert re.fullmatch(r"kvmigrate: touching \d+ MiB of memory\n", said)
            said = process.stderr.readline()
        assert said.startswith(f"kvmigrate: {name} waits for a guest at tcp://127.0.0.1:"), said
        wait_until(host.socket(name).exists, f"the socket of {name}")
        yield process, said.split()[-1]


def test_a_waiting_process_says_so_and_can_be_ended(host: Host) -> None:
    with waiting(host, "two") as (process, _):
        (row,) = host("list", "--json").json["vms"]
        assert (row["status"], row["memory-bytes"]) == ("inmigrate", 0)
        for verb in ("pause", "resume"):
            assert "inmigrate" in host(verb, "two").err or "under way" in host(verb, "two").err
        assert host("stop", "two").status == 0
        assert ended(process)[0] == 8
    assert host.left_behind == []
