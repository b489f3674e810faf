"""The command without any guest: that it answers at once, and that every error is one line that says what to do."""

from __future__ import annotations

import json
import re
import resource
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from kvmigrate.cli import report, show
from kvmigrate.cli.app import run_command

from .command import Host

VERBS = (
    "run", "receive", "send", "check", "snapshot", "restore", "list", "query", "pause", "resume", "console", "cancel",
    "balloon", "powerdown", "reset", "stop", "inspect", "verify", "resolve", "doctor", "cpu-baseline", "demo",
)  # fmt: skip


def cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_help_answers_in_under_300_ms(host: Host) -> None:
    """By processor time, which a busy machine does not add to; the best of three, since caches are cold at first."""
    times = []
    for _ in range(3):
        before = cpu_seconds()
        assert host("--help").status == 0
        times.append(cpu_seconds() - before)
    assert min(times) < 0.3, times


@pytest.mark.parametrize("arguments", [["--help"], ["send", "--help"], ["--version"], ["list"]])
def test_nothing_heavy_is_imported_before_it_is_needed(arguments: list[str], host: Host) -> None:
    code = f"import sys; from kvmigrate.cli.app import run_command; run_command({arguments!r}); print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={"XDG_RUNTIME_DIR": str(host.run_dir)},
    )
    loaded = set(done.stdout.split())
    assert "kvmigrate.cli.app" in loaded
    assert not loaded & {"rich", "msgpack", "zstandard", "xxhash", "asyncio", "kvmigrate._core", "kvmigrate.contract"}


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command([verb, "--help"]) == 0
    assert capsys.readouterr().out.startswith(f"Usage: kvmigrate {verb}")


def test_every_verb_is_listed_with_a_whole_sentence(host: Host) -> None:
    lines = host("--help").out.partition("Commands:")[2].strip().splitlines()
    assert [line.split()[0] for line in lines] == list(VERBS)
    assert all(line.endswith(".") and not line.endswith("...") for line in lines), lines


ERRORS = [
    (["frobnicate"], "No such command 'frobnicate'"),
    (["send"], "Missing argument 'NAME'"),
    (["send", "vm"], "Missing argument"),
    (["run", "x", "--cpus", "many"], "--cpus"),
    (["run", "x", "--colour"], "No such option"),
    (["run", "x", "--memory", "5 elephants"], "'5 elephants' is not a size: write it like"),
    (["run", "x", "--memory", "5000"], "5000 bytes of memory cannot be had: take a multiple of 4096"),
    (["run", "x", "--memory", "1000T"], "bytes of memory cannot be had"),
    (["run", "x", "--cpus", "0"], "0 vCPUs cannot be had"),
    (["run", "x", "--name", "../x"], "is not a name"),
    (["run", "x", "--boot", "floppy"], "'floppy' is not a boot method"),
    (["run", "x", "--boot", "flat@here"], "'here' is not an address"),
    (["run", "x", "--console", "stdio"], "--serial and --console cannot both be stdio"),
    (["receive", "unix:/x", "--console", "stdio"], "--serial and --console cannot both be stdio"),
    (["restore", "absent", "--console", "stdio"], "--serial and --console cannot both be stdio"),
    (["receive", "http://localhost"], "is not an address: write tcp://HOST:PORT"),
    (["receive", "tcp://localhost:99999"], "is not an address"),
    (["receive", "tcp://127.0.0.1:0", "--prefault", "9999G"], "--prefault 10238976 MiB: this host has"),
    (["receive", "tcp://127.0.0.1:0", "--prefault", "lots"], "'lots' is not a size"),
    (["run", "x", "--memory-backend", "tape"], "'tape' is not one of 'anonymous', 'memfd', 'hugetlbfs'"),
    (["receive", "tcp://127.0.0.1:0", "--prefault", "900G", "--memory-backend", "hugetlbfs"], "460800 huge pages of"),
    (["receive", "tcp://127.0.0.1:0", "--prefault", "9999G", "--memory-backend", "memfd"], "this host has"),
    (["send", "vm", "nowhere"], "is not an address"),
    (["check", "vm", "nowhere"], "is not an address"),
    (["check", "vm", "tcp://h:1", "--timeout", "soon"], "is not a duration"),
    (["send", "vm", "tcp://h:1", "--downtime-limit", "soon"], "'soon' is not a duration"),
    (["send", "vm", "tcp://h:1", "--downtime-limit", "0"], "a downtime limit of 0 ms cannot be meant"),
    (["send", "vm", "tcp://h:1", "--bandwidth", "fast"], "'fast' is not a size"),
    (["send", "vm", "tcp://h:1", "--compress", "rar"], "'rar' is not a compression"),
    (["send", "vm", "tcp://h:1", "--compress", "zstd:99"], "zstd level 99 is out of range"),
    (["send", "vm", "tcp://h:1", "--max-rounds", "0"], "max-rounds"),
    (["send", "vm", "tcp://h:1"], "no VM named vm is running here: none is running"),
    (["snapshot", "vm", "dir"], "no VM named vm is running here"),
    (["query", "vm"], "no VM named vm is running here"),
    (["query", "a/b"], "'a/b' is not a name"),
    (["pause", "vm"], "no VM named vm is running here"),
    (["resume", "vm"], "no VM named vm is running here"),
    (["cancel", "vm"], "no VM named vm is running here"),
    (["stop", "vm"], "no VM named vm is running here"),
    (["reset", "vm"], "no VM named vm is running here"),
    (["resolve", "vm"], "say --run if"),
    (["resolve", "vm", "--run", "--discard"], "say --run if"),
    (["resolve", "vm", "--run"], "no guest named vm is in doubt here"),
    (["restore", "absent"], "absent"),
    (["inspect", "absent"], "absent"),
]


@pytest.mark.parametrize(("arguments", "text"), ERRORS, ids=[" ".join(arguments) for arguments, _ in ERRORS])
def test_an_error_is_one_line_with_status_2(
    host: Host,
    arguments: list[str],
    text: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(host.run_dir))
    monkeypatch.delenv("KVMIGRATE_TRACEBACK", raising=False)
    assert run_command(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(r"kvmigrate: [^\n]+\n", err), err
    assert text in err
    assert host.left_behind == []


def test_the_process_ends_with_the_status_of_the_verb(host: Host) -> None:
    done = host("query", "vm")
    assert (done.status, done.out) == (2, "")
    assert done.err == "kvmigrate: no VM named vm is running here: none is running\n"


def test_a_fault_of_our_own_is_one_line_too_and_tells_how_to_see_more(host: Host) -> None:
    (host.run_dir / "kvmigrate").mkdir(mode=0o700)
    code = "import kvmigrate.cli.query as q; q.list_vms = None; from kvmigrate.cli.app import main; main()"
    for traceback, lines in ({}, 1), ({"KVMIGRATE_TRACEBACK": "1"}, 2):
        done = subprocess.run(
            [sys.executable, "-c", code, "list"],
            capture_output=True,
            text=True,
            check=False,
            env={"XDG_RUNTIME_DIR": str(host.run_dir), **traceback},
        )
        assert done.returncode == 2
        assert len(done.stderr.splitlines()) >= lines
        assert (len(done.stderr.splitlines()) == 1) == (not traceback)
        assert "kvmigrate: unexpected TypeError" in done.stderr


def test_an_empty_list_is_told_to_people_and_programs(host: Host) -> None:
    assert host("list").out == "no VM is running\n"
    assert host("list", "--json").json == {"vms": []}


def test_no_runtime_directory_is_an_error_that_says_what_to_set(host: Host) -> None:
    done = host("list", XDG_RUNTIME_DIR="relative/path")
    assert done.status == 2
    assert "XDG_RUNTIME_DIR" in done.err


def test_a_reader_that_goes_away_is_no_error_message(host: Host) -> None:
    done = subprocess.run(
        f"{sys.executable} -m kvmigrate --help | true",
        shell=True,
        capture_output=True,
        text=True,
        check=False,
        env={"XDG_RUNTIME_DIR": str(host.run_dir), "PATH": "/usr/bin:/bin"},
    )
    assert done.stderr == ""


def test_a_socket_that_nobody_serves_is_an_error_of_one_line(host: Host) -> None:
    """A process that holds the name and does not answer: here, one that does not even listen."""
    code = "import sys; from kvmigrate.control import runtime as r; h = r.claim('mute'); print(flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={"XDG_RUNTIME_DIR": str(host.run_dir)},
    ) as mute:
        assert mute.stdout is not None
        mute.stdout.readline()
        done = host("query", "mute")
        listed = host("list", "--json").json["vms"]
        mute.kill()
    assert done.status == 2
    assert "cannot talk to VM mute" in done.err
    assert [(vm["name"], vm["status"], vm["pid"]) for vm in listed] == [("mute", "no answer", mute.pid)]


JOURNAL = {
    "name": "lost", "uuid": "11111111-2222-4333-8444-555555555555", "epoch": 7,
    "role": "source", "state": "committed", "peer": "tcp://elsewhere:4444", "pid": 1,
}  # fmt: skip


def test_a_guest_in_doubt_keeps_its_name_until_it_is_resolved(host: Host, tmp_path: Path) -> None:
    (host.run_dir / "kvmigrate").mkdir(mode=0o700)
    (host.run_dir / "kvmigrate" / "lost.journal").write_text(json.dumps(JOURNAL))
    (tmp_path / "image").write_bytes(b"\xeb\xfe")
    refused = host("run", "image", "--boot", "flat", "--memory", "4M", "--name", "lost", "--serial", "null")
    assert refused.status == 2
    assert "kvmigrate resolve lost --discard" in refused.err
    assert "tcp://elsewhere:4444" in refused.err
    assert host.left_behind == ["lost.journal"]

    gone = host("resolve", "lost", "--run")
    assert gone.status == 2
    assert "cannot run here any more" in gone.err
    assert host.left_behind == ["lost.journal"]

    assert host("resolve", "lost", "--discard").status == 0
    assert host.left_behind == []


def test_a_journal_that_is_none_is_told(host: Host) -> None:
    (host.run_dir / "kvmigrate").mkdir(mode=0o700)
    (host.run_dir / "kvmigrate" / "lost.journal").write_text("{")
    done = host("resolve", "lost", "--discard")
    assert done.status == 2
    assert "is not a journal" in done.err


def test_doctor_tells_the_same_to_people_and_programs(host: Host) -> None:
    told = host("doctor", "--json")
    value = told.json
    assert told.status == (0 if value["ok"] else 1)
    assert value["ok"] == all(check["status"] != "fail" for check in value["checks"])
    assert {"host", "/dev/kvm", "runtime directory", "memory"} <= {check["check"] for check in value["checks"]}
    assert all(check["mend"] for check in value["checks"] if check["status"] == "fail")
    shown = host("doctor")
    assert shown.status == told.status
    assert all(check["check"] in shown.out for check in value["checks"])


def test_doctor_says_how_to_mend_a_runtime_directory(host: Host) -> None:
    (host.run_dir / "kvmigrate").mkdir(mode=0o755)
    done = host("doctor", "--json")
    assert done.status == 1
    assert next(c["text"] for c in done.json["checks"] if c["status"] == "fail").endswith("or remove it")


@pytest.mark.parametrize(
    ("shown", "text"),
    [
        (show.size(0), "0 B"),
        (show.size(1023), "1023 B"),
        (show.size(1536), "1.5 KiB"),
        (show.size(1 << 30), "1 GiB"),
        (show.size(1000 << 20), "1000 MiB"),
        (show.size(1 << 51), "2048 TiB"),
        (show.rate(0), "–"),
        (show.rate(3 << 20), "3 MiB/s"),
        (show.duration(0.256), "0.256 ms"),
        (show.duration(123.4), "123 ms"),
        (show.duration(1500), "1.5 s"),
        (show.duration(61_000), "1 min 1 s"),
    ],
)
def test_figures_are_shown_for_people(shown: str, text: str) -> None:
    assert shown == text


def test_an_address_in_use_is_told(host: Host) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        done = host("receive", f"tcp://127.0.0.1:{taken.getsockname()[1]}", "--serial", "null")
    assert done.status == 2
    assert "Address already in use" in done.err
    assert host.left_behind == []


def test_a_blackout_that_nobody_knows_is_not_told() -> None:
    """The answer to COMMIT was lost, and the destination, which was asked, has the guest."""
    value = {"kind": "migration", "target": "tcp://h:1", "result": {"total-time": 1500}}
    assert report.summary(value) == "moved to tcp://h:1: 1.5 s"
