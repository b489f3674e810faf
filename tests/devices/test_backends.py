"""Where the serial port leads to: every backend against the real thing on its other side."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import signal
import socket
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path

import pytest

from kvmigrate.devices.backends import Backend, PtyBackend, open_backend
from kvmigrate.devices.serial import Serial
from kvmigrate.errors import ConfigError, HostError

from .conftest import Line, wait_until

ECHO_GUEST = """
import sys, time
from kvmigrate.devices.backends import open_backend
from kvmigrate.devices.serial import Serial
backend = open_backend(sys.argv[1])
uart = Serial(lambda level: None, backend)
uart.resume()
for value in b"ready\\n":
    uart.write(0, 1, value)
end = time.monotonic() + 20
while time.monotonic() < end:
    if uart.read(5, 1) & 1:
        value = uart.read(0, 1)
        uart.write(0, 1, value)
        if value == ord("q"):
            break
    time.sleep(0.001)
backend.close()
"""


def echo_guest(spec: str, stdin: int, stdout: int) -> subprocess.Popen[bytes]:
    """A process whose guest says ``ready`` and echoes its input up to a q."""
    command = [sys.executable, "-c", ECHO_GUEST, spec]
    return subprocess.Popen(command, stdin=stdin, stdout=stdout, stderr=subprocess.PIPE)


def running(backend: Backend) -> Serial:
    uart = Serial(lambda level: None, backend)
    uart.resume()
    return uart


def say(uart: Serial, text: bytes) -> None:
    for value in text:
        uart.write(0, 1, value)


def read_until(fd: int, end: bytes) -> bytes:
    data = b""
    while end not in data:
        assert select.select([fd], [], [], 20)[0], f"only {data!r} came"
        data += os.read(fd, 1024)
    return data


@pytest.mark.parametrize(
    "spec", ["", "tty", "null:", "null:x", "stdio:x", "file", "file:", "unix:", "exec:ls", "file:a\0b"]
)
def test_a_word_that_is_no_backend_is_refused(spec: str) -> None:
    with pytest.raises(ConfigError, match="serial backend"):
        open_backend(spec)


def test_null_drops_output_and_has_no_thread() -> None:
    before = threading.active_count()
    uart = running(open_backend("null"))
    say(uart, b"x" * 10000)
    assert uart.read(5, 1) == 0x60
    assert threading.active_count() == before


def test_file_gets_the_output_and_keeps_what_was_there(tmp_path: Path) -> None:
    log = tmp_path / "log"
    for text in (b"first\n", b"second\n"):
        backend = open_backend(f"file:{log}")
        say(running(backend), text)
        assert log.read_bytes().endswith(text), "written before close"
        backend.close()
    assert log.read_bytes() == b"first\nsecond\n"


def test_a_full_disk_drops_output_with_one_line_and_the_guest_runs_on(capsys: pytest.CaptureFixture[str]) -> None:
    backend = open_backend("file:/dev/full")
    uart = running(backend)
    say(uart, b"abc")
    assert uart.read(5, 1) == 0x60
    backend.close()
    assert capsys.readouterr().err == (
        "kvmigrate: serial file:/dev/full: No space left on device: its output is dropped from now on\n"
    )


@pytest.mark.parametrize("spec", ["file:/nonexistent/log", "unix:/nonexistent/socket"])
def test_a_path_that_is_not_there_is_named(spec: str) -> None:
    with pytest.raises(HostError, match=f"serial {spec}: No such file"):
        open_backend(spec)


def test_a_socket_that_nobody_listens_on_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "dead"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    with pytest.raises(HostError, match=f"serial unix:{path}: Connection refused .*listening"):
        open_backend(f"unix:{path}")


def test_a_socket_path_that_is_too_long_is_refused() -> None:
    with pytest.raises(ConfigError, match="too long"):
        open_backend("unix:/" + "x" * 200)


def test_a_fifo_without_a_reader_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(HostError, match="fifo"):
        open_backend(f"file:{tmp_path / 'fifo'}")


def test_a_peer_that_goes_away_does_not_stop_the_guest(line: Line, capsys: pytest.CaptureFixture[str]) -> None:
    line.peer.close()
    began = time.monotonic()
    say(line.uart, b"x" * 10000)
    assert line.uart.read(5, 1) == 0x60
    assert time.monotonic() - began < 5
    assert capsys.readouterr().err.count("dropped from now on") == 1


def test_a_peer_that_goes_away_while_output_waits_frees_the_guest(line: Line) -> None:
    line.stuff()
    line.peer.close()
    wait_until(lambda: line.uart.read(5, 1) == 0x60, "the transmitter is empty")


def test_an_idle_backend_uses_no_time(line: Line) -> None:
    time.sleep(0.05)
    before = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - before < 0.05


def test_the_end_of_input_costs_no_time_and_leaves_the_output(line: Line) -> None:
    line.peer.shutdown(socket.SHUT_WR)
    time.sleep(0.05)
    before = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - before < 0.05
    say(line.uart, b"still here")
    assert line.received(10) == b"still here"


def test_close_leaves_no_thread_and_no_descriptor(tmp_path: Path) -> None:
    def descriptors() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    before, threads = descriptors(), threading.active_count()
    for spec in ("pty", f"file:{tmp_path / 'log'}", "stdio"):
        backend = open_backend(spec)
        running(backend)
        backend.close()
        backend.close()
    assert (descriptors(), threading.active_count()) == (before, threads)


def test_pty_tells_its_path_once_and_carries_both_ways(capsys: pytest.CaptureFixture[str]) -> None:
    backend = PtyBackend()
    uart = running(backend)
    assert capsys.readouterr().err == f"kvmigrate: the serial port is {backend.path}\n"
    terminal = os.open(backend.path, os.O_RDWR | os.O_NOCTTY)
    say(uart, b"hello\n")
    assert read_until(terminal, b"\n") == b"hello\n"
    os.write(terminal, b"k\r\x03")
    got = bytearray()
    while len(got) < 3:
        wait_until(lambda: bool(uart.read(5, 1) & 1), "input from the terminal")
        got.append(uart.read(0, 1))
    assert got == b"k\r\x03", "nothing is translated on the way"
    os.close(terminal)
    wait_until(lambda: not uart.tx_waiting(), "the line is free")
    backend.close()


def test_pty_without_a_reader_drops_output_and_the_guest_runs_on() -> None:
    backend = PtyBackend()
    uart = running(backend)
    for _ in range(30_000):
        uart.write(0, 1, 0x78)
    assert uart.read(5, 1) == 0x60
    terminal = os.open(backend.path, os.O_RDWR | os.O_NOCTTY)
    say(uart, b"new\n")
    assert read_until(terminal, b"\n") == b"new\n"
    os.close(terminal)
    backend.close()


def test_pty_whose_reader_stalls_makes_the_guest_wait_until_it_leaves() -> None:
    backend = PtyBackend()
    uart = running(backend)
    terminal = os.open(backend.path, os.O_RDWR | os.O_NOCTTY)
    while uart.read(5, 1) & 0x20:
        uart.write(0, 1, 0x78)
    os.close(terminal)
    wait_until(lambda: uart.read(5, 1) == 0x60, "the guest goes on")
    backend.close()


def test_pty_takes_a_new_reader_after_the_last_one_left() -> None:
    backend = PtyBackend()
    uart = running(backend)
    for _ in range(2):
        terminal = os.open(backend.path, os.O_RDWR | os.O_NOCTTY)
        os.write(terminal, b"!")
        wait_until(lambda: bool(uart.read(5, 1) & 1), "input from the terminal")
        assert uart.read(0, 1) == ord("!")
        os.close(terminal)
    backend.close()


def test_stdio_carries_both_ways_over_pipes() -> None:
    with echo_guest("stdio", stdin=subprocess.PIPE, stdout=subprocess.PIPE) as guest:
        out, err = guest.communicate(b"some text and a q", timeout=30)
    assert (out, err, guest.returncode) == (b"ready\nsome text and a q", b"", 0)


def test_stdio_output_goes_on_after_the_end_of_input() -> None:
    with echo_guest("stdio", stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as guest:
        assert guest.stdout is not None
        assert read_until(guest.stdout.fileno(), b"\n") == b"ready\n"
        guest.terminate()


def test_stdio_works_with_both_streams_closed() -> None:
    program = [sys.executable, "-c", ECHO_GUEST.replace("+ 20", "+ 0.2"), "stdio"]
    shell = ["sh", "-c", 'exec "$@" <&- >&-', "sh", *program]
    done = subprocess.run(shell, check=False, stderr=subprocess.PIPE, timeout=30)
    assert (done.returncode, done.stderr) == (0, b"")


def test_stdio_does_not_wait_for_a_reader_that_stalls() -> None:
    program = """
import sys, time
from kvmigrate.devices.backends import open_backend
from kvmigrate.devices.serial import Serial
uart = Serial(lambda level: None, open_backend("stdio"))
uart.resume()
written = 0
while uart.read(5, 1) & 0x20:
    uart.write(0, 1, 0x78)
    written += 1
print(written, file=sys.stderr)
sys.stderr.flush()
time.sleep(20)
"""
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=writer, stderr=subprocess.PIPE) as guest:
        assert guest.stderr is not None
        assert int(read_until(guest.stderr.fileno(), b"\n")) > 0, "the guest saw a full line instead of waiting"
        guest.terminate()
    os.close(reader)
    os.close(writer)


def spawn_on_terminal() -> tuple[int, int]:
    """The echo guest in the foreground of a terminal of its own; returns its pid and the terminal's master."""
    pid, master = pty.fork()
    if pid == 0:
        os.execv(sys.executable, [sys.executable, "-c", ECHO_GUEST, "stdio"])
    return pid, master


def test_terminal_is_raw_while_running_and_set_back_at_the_end() -> None:
    pid, master = spawn_on_terminal()
    before = termios.tcgetattr(master)[3]
    assert before & termios.ECHO and before & termios.ICANON
    read_until(master, b"\n")
    during = termios.tcgetattr(master)[3]
    assert not during & (termios.ECHO | termios.ICANON) and during & termios.ISIG
    os.write(master, b"a")
    assert read_until(master, b"a") == b"a", "echoed by the guest, not by the terminal"
    os.write(master, b"q")
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert termios.tcgetattr(master)[3] == before
    os.close(master)


def test_ctrl_c_ends_the_process_and_sets_the_terminal_back() -> None:
    pid, master = spawn_on_terminal()
    before = termios.tcgetattr(master)[3]
    read_until(master, b"\n")
    os.write(master, b"\x03")
    status = os.waitpid(pid, 0)[1]
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGINT
    assert termios.tcgetattr(master)[3] == before
    os.close(master)


BACKGROUND = """
import os, select, subprocess, sys, time
guest = subprocess.Popen([sys.executable, "-c", sys.argv[1], "stdio"], process_group=0)
select.select([0], [], [])
time.sleep(0.5)
pid, _ = os.waitpid(guest.pid, os.WNOHANG | os.WUNTRACED)
guest.kill()
sys.exit(1 if pid else 0)
"""


def test_a_process_in_the_background_is_not_stopped_by_its_terminal() -> None:
    pid, master = pty.fork()
    if pid == 0:
        os.execv(sys.executable, [sys.executable, "-c", BACKGROUND, ECHO_GUEST])
    read_until(master, b"ready")
    os.write(master, b"for the foreground\n")
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    os.close(master)
