"""Terminals attached to the serial ports of running guests, as a user meets them: what is seen, and every way out."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kvmigrate.guests import path as guest_image

from . import sectors
from .command import Host, wait_until
from .test_vm import ended, running, waiting

pytestmark = [pytest.mark.kvm, pytest.mark.timeout(300)]

ECHO = sectors.echo()


class Screen:
    """``kvmigrate console`` in the foreground of a terminal of its own."""

    def __init__(self, host: Host, *arguments: str) -> None:
        self.seen = b""
        environment = dict(os.environ) | {"XDG_RUNTIME_DIR": str(host.run_dir), "COLUMNS": "120"}
        self.pid, self.master = pty.fork()
        if self.pid == 0:
            command = [sys.executable, "-m", "kvmigrate", "console", *arguments]
            os.execve(sys.executable, command, environment)
        self.before = termios.tcgetattr(self.master)

    @property
    def is_raw(self) -> bool:
        return not termios.tcgetattr(self.master)[3] & (termios.ECHO | termios.ICANON | termios.ISIG)

    @property
    def is_as_before(self) -> bool:
        return termios.tcgetattr(self.master) == self.before

    def read(self) -> None:
        readable, _, _ = select.select([self.master], [], [], 0.05)
        if readable:
            try:
                self.seen += os.read(self.master, 1 << 16)
            except OSError:
                time.sleep(0.05)

    def wait_for(self, text: bytes) -> None:
        def shown() -> bool:
            if text in self.seen:
                return True
            self.read()
            return False

        wait_until(shown, f"{text!r} on the terminal, which shows {self.seen!r}")

    def type(self, keys: bytes) -> None:
        os.write(self.master, keys)

    def ended(self) -> int:
        """The status with which it ended, negative for a signal."""
        found = (0, 0)

        def over() -> bool:
            nonlocal found
            self.read()
            found = os.waitpid(self.pid, os.WNOHANG) if not found[0] else found
            return found[0] != 0

        wait_until(over, "the end of the console")
        self.pid = 0
        self.read()
        return os.waitstatus_to_exitcode(found[1])

    def close(self) -> None:
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        os.close(self.master)


@contextmanager
def attached(host: Host, *arguments: str) -> Iterator[Screen]:
    """A console on a terminal; it has been told that it is attached."""
    screen = Screen(host, *arguments)
    try:
        screen.wait_for(b" detaches\r\n")
        wait_until(lambda: screen.is_raw, "a raw terminal")
        yield screen
    finally:
        screen.close()


def test_keys_reach_the_guest_untouched_and_the_escape_key_detaches(host: Host) -> None:
    with running(host, "one", ECHO) as process:
        for _ in range(2):
            with attached(host, "one") as screen:
                assert screen.seen.startswith(b"kvmigrate: attached to VM one, Ctrl-] detaches\r\n")
                screen.wait_for(b"ready\r\n")
                screen.type(b"\x03\x1a\r\x7fdone")
                screen.wait_for(b"\x03\x1a\r\x7fdone")
                screen.type(b"\x1d")
                assert screen.ended() == 0
                assert screen.is_as_before
                assert screen.seen.endswith(b"kvmigrate: detached from VM one\r\n")
        assert process.poll() is None


@pytest.mark.parametrize("key", ["ctrl-a", "^A"])
def test_another_escape_key_can_be_chosen(host: Host, key: str) -> None:
    with running(host, "one", ECHO), attached(host, "one", "--escape", key) as screen:
        assert b"Ctrl-A detaches" in screen.seen
        screen.type(b"\x1d!")
        screen.wait_for(b"\x1d!")
        screen.type(b"\x01")
        assert screen.ended() == 0


def test_what_is_no_key_or_no_vm_is_refused_in_one_line(host: Host) -> None:
    done = host("console", "one")
    assert (done.status, len(done.err.splitlines())) == (2, 1)
    assert "no VM named one is running here" in done.err
    with running(host, "one", ECHO):
        done = host("console", "one", "--escape", "x")
        assert (done.status, len(done.err.splitlines())) == (2, 1)
        assert "'x' is not an escape key" in done.err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGQUIT])
def test_a_signal_sets_the_terminal_back(host: Host, number: signal.Signals) -> None:
    with running(host, "one", ECHO) as process, attached(host, "one") as screen:
        os.kill(screen.pid, number)
        assert screen.ended() == -number
        assert screen.is_as_before
        assert process.poll() is None


def test_a_vm_that_is_killed_sets_the_terminal_back_and_is_an_error(host: Host) -> None:
    with running(host, "one", ECHO) as process, attached(host, "one") as screen:
        process.kill()
        assert screen.ended() == 2
        assert screen.is_as_before
        assert b"VM one hung up" in screen.seen


@pytest.mark.parametrize(
    ("code", "status", "text"),
    [
        (ECHO, 0, b"VM one has ended: the guest powered off"),
        (sectors.echo()[: -len(sectors.POWER_OFF)] + sectors.DEBUG_EXIT_3, 7, b"VM one has ended: the guest wrote 0x3"),
    ],
)
def test_the_end_of_the_guest_is_told_with_the_status_of_its_process(
    host: Host, code: bytes, status: int, text: bytes
) -> None:
    with running(host, "one", code) as process, attached(host, "one") as screen:
        screen.type(b"bye\x04")
        assert screen.ended() == status
        assert screen.is_as_before
        screen.wait_for(text)
        assert b"bye" in screen.seen
        assert ended(process)[0] == status


def test_a_stopped_vm_says_so(host: Host) -> None:
    with running(host, "one", ECHO), attached(host, "one") as screen:
        host("stop", "one")
        assert screen.ended() == 8
        screen.wait_for(b"VM one was stopped by the operator")
    assert host.left_behind == []


def test_a_paused_guest_takes_what_was_typed_once_it_runs_on(host: Host) -> None:
    with running(host, "one", ECHO), attached(host, "one") as screen:
        screen.wait_for(b"ready")
        host("pause", "one")
        screen.type(b"patience")
        time.sleep(0.3)
        screen.read()
        assert b"patience"[1:] not in screen.seen
        host("resume", "one")
        screen.wait_for(b"patience")


def test_two_share_a_console(host: Host) -> None:
    with running(host, "one", ECHO), attached(host, "one") as first, attached(host, "one") as second:
        assert b"1 others" in second.seen
        first.type(b"from the first")
        second.wait_for(b"from the first")
        second.type(b"from the second")
        first.wait_for(b"from the second")


def test_a_move_says_where_the_guest_went(host: Host) -> None:
    with running(host, "one", ECHO) as source, waiting(host, "two") as (_, address):
        with attached(host, "one") as screen, attached(host, "two") as there:
            screen.type(b"before")
            screen.wait_for(b"before")
            assert host("send", "one", address).status == 0
            assert screen.ended() == 6
            assert screen.is_as_before
            screen.wait_for(f"kvmigrate: VM one has moved to {address}\r\n".encode())
            there.type(b"after")
            there.wait_for(b"after")
        assert ended(source)[0] == 6


def test_a_pipe_goes_through_and_its_end_detaches(host: Host) -> None:
    text = bytes(range(256)).replace(b"\x04", b"") * 40
    with running(host, "one", ECHO) as process:
        command = [sys.executable, "-m", "kvmigrate", "console", "one"]
        environment = dict(os.environ) | {"XDG_RUNTIME_DIR": str(host.run_dir)}
        done = subprocess.run(command, check=False, input=text, capture_output=True, env=environment, timeout=120)
        assert done.returncode == 0
        assert done.stderr == b"kvmigrate: attached to VM one, the end of the input detaches\n"
        assert done.stdout == b"ready\r\n" + text
        assert process.poll() is None


def wait_until_longer(log: Path, by_bytes: int) -> None:
    """Until ``log`` has grown by more than that."""
    size = log.stat().st_size
    wait_until(lambda: log.stat().st_size > size + by_bytes, "more heartbeats")


def test_a_stopped_console_does_not_hold_up_the_guest_or_its_move(host: Host, tmp_path: Path) -> None:
    log = tmp_path / "one.log"
    options = ("--memory", "64M", "--serial", f"file:{log}", "--append", "fill=8 beat=1")
    with host.start("run", guest_image("ledger"), "--name", "one", *options) as source:
        wait_until(lambda: source.poll() is not None or host.ask("one", "query-status"), "VM one")
        with attached(host, "one") as screen, waiting(host, "two") as (_, address):
            os.kill(screen.pid, signal.SIGSTOP)
            for _ in range(2):
                wait_until_longer(log, 5000)
            sent = host("send", "one", address, "--json")
            assert sent.status == 0
            assert sent.json["downtime"] < 300
            os.kill(screen.pid, signal.SIGCONT)
            assert screen.ended() == 6
            assert screen.is_as_before
        assert ended(source)[0] == 6
