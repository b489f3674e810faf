"""The verb demo: a busy guest moves from one process to another over TCP, and an observer of its heartbeats tells what
it saw. Everything is the real thing: two ``kvmigrate`` processes, and the verb send between them."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from ..config import parse_size
from ..errors import GuestError, KvmigrateError
from ..guests import path as guest_image
from ..record import dataclass
from . import show

BEAT_MS = 5
GUEST_SECONDS = 8
LEDGER_PAGES = 4096
WAIT_S = 30.0
_HEARTBEAT = re.compile(rb"H 0 (\d+) (\d+) (\d+)")
_ADDRESS = re.compile(r"(tcp://\S+:\d+)")


class DemoFailed(KvmigrateError):
    """The demonstration did not show what it is to show."""


@dataclass(frozen=True, slots=True)
class Beat:
    """One heartbeat as the observer saw it: when (ns, its own clock), its number, and the guest's work so far."""

    time_ns: int
    number: int
    updates: int


def _beat(line: bytes, now_ns: int) -> Beat | None:
    found = _HEARTBEAT.fullmatch(line)
    return None if found is None else Beat(now_ns, int(found[1]), int(found[3]))


class Observer:
    """Listens where a guest's serial port connects to, and takes the time of every heartbeat."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.beats: list[Beat] = []
        self.verdict = ""
        self.first_line = (0, b"")
        self.unfinished = b""
        """The begin of a line that the guest finished elsewhere: it may move between any two bytes."""
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(1)
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError:
            return
        with connection:
            while data := connection.recv(1 << 16):
                now_ns = time.monotonic_ns()
                *lines, self.unfinished = (self.unfinished + data).split(b"\n")
                for line in lines:
                    self._line(line.rstrip(b"\r"), now_ns)

    def _line(self, line: bytes, now_ns: int) -> None:
        if not self.first_line[0]:
            self.first_line = now_ns, line
        beat = _beat(line, now_ns)
        if beat is not None:
            self.beats.append(beat)
        elif line.startswith((b"OK", b"BAD")):
            self.verdict = line.decode("ascii", "replace")

    def join(self) -> None:
        """Wait until all that an ended process sent has been seen."""
        self._thread.join(WAIT_S)

    def close(self) -> None:
        """Stop listening and watching."""
        # Closing alone would leave a thread in accept(2).
        try:
            self._listener.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
        self._listener.close()


class Vm:
    """A ``kvmigrate`` process in the foreground of nobody; ended and waited for, whatever happens."""

    def __init__(self, arguments: Sequence[str], log: Path) -> None:
        self._log = log
        with log.open("wb") as out:
            command = [sys.executable, "-m", "kvmigrate", *arguments]
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out)

    @property
    def said(self) -> str:
        return self._log.read_text(errors="replace").strip()

    def wait_for(self, what: str, seen: Callable[[], bool]) -> None:
        """Until ``seen``; raises :class:`DemoFailed` when the process ends before, or nothing is seen for long."""
        deadline = time.monotonic() + WAIT_S
        while not seen():
            if self.process.poll() is not None and not seen():
                raise DemoFailed(f"the process ended before {what}: {self.said or self.process.returncode}")
            if time.monotonic() > deadline:
                raise DemoFailed(f"{what} did not come within {WAIT_S:.0f} s: {self.said or 'nothing was said'}")
            time.sleep(0.01)

    def close(self) -> None:
        """End the process if it lives."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


def demo(memory: str, *, verbose: bool) -> int:
    """Run the demonstration. Returns 0 when the guest was moved and noticed nothing."""
    nr_bytes = parse_size(memory)
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kvmigrate-demo-")))
        source, destination = (Observer(directory / f"{end}.sock") for end in ("source", "destination"))
        stack.callback(source.close)
        stack.callback(destination.close)

        waiting = _receive_guest(destination, directory)
        stack.callback(waiting.close)
        _say(f"starting a guest with {show.size(nr_bytes)} of memory, {show.size(nr_bytes // 2)} of it filled")
        running = _run_guest(source, directory, nr_bytes)
        stack.callback(running.close)
        waiting.wait_for("the address to send to", lambda: _ADDRESS.search(waiting.said) is not None)
        running.wait_for("the guest's first heartbeats", lambda: len(source.beats) > 20)
        _say(f"it runs in process {running.process.pid}, writing memory and checking every byte it wrote")
        address = _found_address(waiting.said)
        _say(f"process {waiting.process.pid} waits at {address}: kvmigrate send {_name('source')} {address}")

        _send(address, verbose=verbose)
        waiting.wait_for("the guest's verdict at the destination", lambda: bool(destination.verdict))
        statuses = running.process.wait(WAIT_S), waiting.process.wait(WAIT_S)
        return _conclude(source, destination, statuses)


def _name(end: str) -> str:
    return f"demo-{end}-{os.getpid()}"


def _run_guest(observer: Observer, directory: Path, nr_bytes: int) -> Vm:
    fill = (nr_bytes >> 20) // 2
    append = f"beat={BEAT_MS} seconds={GUEST_SECONDS} fill={fill} pages={LEDGER_PAGES}"
    arguments = ["--name", _name("source"), "--memory", str(nr_bytes), "--append", append]
    serial = ["--serial", f"unix:{observer.path}"]
    return Vm(["run", str(guest_image("ledger")), *arguments, *serial], directory / "source.log")


def _receive_guest(observer: Observer, directory: Path) -> Vm:
    arguments = ["--name", _name("destination"), "--serial", f"unix:{observer.path}"]
    return Vm(["receive", "tcp://127.0.0.1:0", *arguments], directory / "destination.log")


def _found_address(text: str) -> str:
    found = _ADDRESS.search(text)
    assert found is not None
    return found[1]


def _send(address: str, *, verbose: bool) -> None:
    command = [sys.executable, "-m", "kvmigrate", "send", _name("source"), address]
    status = subprocess.run([*command, *(["--verbose"] if verbose else [])], check=False).returncode
    if status:
        raise DemoFailed(f"kvmigrate send ended with status {status}")


def _conclude(source: Observer, destination: Observer, statuses: tuple[int, int]) -> int:
    """Say what was proven. Raises :class:`GuestError` or :class:`DemoFailed` when it was not."""
    if not destination.verdict.startswith("OK"):
        raise GuestError(f"the guest found its memory changed: {destination.verdict}")
    if statuses != (6, 0):
        raise DemoFailed(f"the processes ended with status {statuses[0]} and {statuses[1]}, not 6 (moved) and 0")
    source.join()
    destination.join()
    if source.unfinished:
        seen_ns, line = destination.first_line
        torn = _beat(source.unfinished + line, seen_ns)
        if torn is None:
            raise DemoFailed(f"a line was damaged on its way: {(source.unfinished + line).decode('ascii', 'replace')}")
        destination.beats.insert(0, torn)
    numbers = [beat.number for beat in source.beats + destination.beats]
    if numbers != list(range(numbers[0], numbers[0] + len(numbers))):
        raise DemoFailed("a heartbeat was lost or came twice")
    silence_ms = (destination.beats[0].time_ns - source.beats[-1].time_ns) / 1e6
    if silence_ms < 0:
        raise DemoFailed("both processes ran the guest at once")
    _say("what an observer of the guest's serial port saw:")
    print(f"  {len(numbers):,} heartbeats, each exactly once: {len(source.beats):,} from the source, then")
    print(f"  {len(destination.beats):,} from the destination; never both, and {show.duration(silence_ms)} of silence")
    print(f"  between them, where one comes every {BEAT_MS} ms.")
    print(f"  {destination.beats[-1].updates:,} updates of memory, each checked against the guest's own ledger.")
    return 0


def _say(text: str) -> None:
    print(f"demo: {text}", flush=True)
