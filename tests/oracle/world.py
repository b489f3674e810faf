"""Real kvmigrate processes, as a user would start them, in a runtime directory of their own."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvmigrate import guests
from kvmigrate.control.client import Client
from kvmigrate.errors import ControlError

from .recorder import Recorder, SerialLog

READY_S = 60.0
END_S = 60.0
POLL_S = 0.01
"""How often to look; an emulated processor does little else at this rate."""
POWERED_OFF, ERROR, CRASHED, MOVED, STOPPED = 0, 2, 4, 6, 8
ENDED = ("completed", "failed", "cancelled", "commit-unknown")
LAUNCHER = Path(__file__).with_name("launcher.py")


@dataclass
class Process:
    """One ``kvmigrate run``, ``receive`` or ``restore``, and what its guest wrote."""

    name: str
    popen: subprocess.Popen[str]
    log: SerialLog
    runtime: Path

    @property
    def stderr(self) -> str:
        """What it said so far."""
        return self._errors_path.read_text()

    @property
    def _errors_path(self) -> Path:
        return self.runtime / f"{self.name}.stderr"

    def client(self) -> Client:
        return Client(self.runtime / "kvmigrate" / f"{self.name}.sock", self.name)

    def execute(self, command: str, **arguments: Any) -> Any:
        """One QMP command over a connection of its own."""
        with self.client() as client:
            return client.execute(command, arguments)

    def status(self) -> str:
        """The run state, or ``gone`` when the process has ended."""
        try:
            return str(self.execute("query-status")["status"])
        except ControlError:
            return "gone"

    def wait_status(self, *wanted: str, timeout_s: float = READY_S) -> str:
        deadline = time.monotonic() + timeout_s
        while (found := self.status()) not in wanted:
            assert time.monotonic() < deadline, f"{self.name} is {found}, not {' or '.join(wanted)}: {self.stderr}"
            time.sleep(POLL_S)
        return found

    def wait_ready(self) -> None:
        """Return once the control socket answers."""
        deadline = time.monotonic() + READY_S
        while self.status() == "gone":
            assert self.popen.poll() is None, f"{self.name} ended with {self.popen.returncode}: {self.stderr}"
            assert time.monotonic() < deadline, f"{self.name} does not answer: {self.stderr}"
            time.sleep(POLL_S)

    def wait_end(self, timeout_s: float = END_S) -> int:
        """The exit status."""
        return self.popen.wait(timeout_s)

    def kill(self) -> None:
        self.popen.kill()
        self.popen.wait()


class World:
    """All processes of one test, each with a serial log. ``environment`` is added to that of new processes, and
    ``options`` to what starts a guest."""

    def __init__(self, directory: Path, recorder: Recorder) -> None:
        self.directory = directory
        self.recorder = recorder
        self.processes: list[Process] = []
        self.environment: dict[str, str] = {}
        self.options: tuple[str, ...] = ()

    @property
    def logs(self) -> list[SerialLog]:
        """The serial logs in the order in which the processes were started, which is the order of the hops."""
        return [process.log for process in self.processes]

    def _environment(self) -> dict[str, str]:
        return os.environ | {"XDG_RUNTIME_DIR": str(self.directory)} | self.environment

    def start(self, verb: str, name: str, *arguments: str) -> Process:
        """Start a process that stays with its guest; see :meth:`Process.wait_ready`."""
        log, serial = self.recorder.listen(name)
        command = [sys.executable, str(LAUNCHER), verb, *arguments, "--name", name, "--serial", serial, *self.options]
        with (self.directory / f"{name}.stderr").open("w") as errors:
            popen = subprocess.Popen(
                command, env=self._environment(), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=errors,
                text=True,
            )  # fmt: skip
        process = Process(name, popen, log, self.directory)
        self.processes.append(process)
        return process

    def run(self, guest: str, parameters: str, *, memory: str = "32M", cpus: int = 1, name: str = "vm0") -> Process:
        """Boot one of the package's guests and wait for its first heartbeat."""
        process = self.start(
            "run", name, str(guests.path(guest)), "--memory", memory, "--cpus", str(cpus),
            "--append", f"{parameters} cpus={cpus}",
        )  # fmt: skip
        process.wait_ready()
        process.log.wait_for("H 0 3 ")
        return process

    def receive(self, address: str, *options: str, name: str = "") -> Process:
        """Start a destination and wait until it listens."""
        process = self.start("receive", name or f"vm{len(self.processes)}", address, *options)
        process.wait_ready()
        wait_listening(address)
        return process

    def restore(self, directory: Path, *options: str, name: str = "") -> Process:
        process = self.start("restore", name or f"vm{len(self.processes)}", str(directory), *options)
        process.wait_ready()
        return process

    def command(self, *arguments: str, timeout_s: float = END_S) -> subprocess.CompletedProcess[str]:
        """Run a verb that ends by itself."""
        return subprocess.run(
            [sys.executable, str(LAUNCHER), *arguments],
            env=self._environment(), stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout_s,
            check=False,
        )  # fmt: skip

    def send(self, source: Process, address: str, *options: str) -> Mapping[str, Any]:
        """Migrate ``source`` to ``address``; the JSON of the result. Raises :class:`AssertionError` with the error."""
        return self._json(self.command("send", source.name, address, "--json", *options))

    def snapshot(self, source: Process, directory: Path, *options: str) -> Mapping[str, Any]:
        return self._json(self.command("snapshot", source.name, str(directory), "--json", *options))

    @staticmethod
    def _json(done: subprocess.CompletedProcess[str]) -> Mapping[str, Any]:
        assert done.returncode == 0, f"exit status {done.returncode}: {done.stderr}"
        result: Mapping[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return result

    def hop(self, source: Process, address: str, **parameters: Any) -> Process:
        """Migrate by QMP to a new process at ``address``; returns the destination, with the source ended as moved."""
        destination = self.receive(address)
        job = migrate(source, address, **parameters)
        assert job["status"] == "completed", job
        status = source.wait_end()
        assert status == MOVED, f"exit status {status}: {source.stderr} {destination.stderr}"
        return destination

    def tcp(self, host: str = "127.0.0.1") -> str:
        return f"tcp://{host}:{free_port()}"

    def unix(self) -> str:
        return f"unix://{self.directory}/{len(self.processes)}.sock"

    def close(self) -> None:
        for process in self.processes:
            if process.popen.poll() is None:
                process.kill()


def migrate(source: Process, address: str, *, zero_copy: bool = False, **parameters: Any) -> Mapping[str, Any]:
    """Migrate ``source`` by QMP, with migrate-set-parameters first; the last report of the job, however it ended."""
    with source.client() as client:
        if zero_copy:
            wanted = [{"capability": "zero-copy-send", "state": True}]
            client.execute("migrate-set-capabilities", {"capabilities": wanted})
        if parameters:
            client.execute("migrate-set-parameters", parameters)
        client.execute("migrate", {"uri": address})
        return wait_job(client)


def wait_job(client: Client, timeout_s: float = END_S) -> Mapping[str, Any]:
    """The report of the job under way once it has ended, or cannot end by itself."""
    deadline = time.monotonic() + timeout_s
    while True:
        job: Mapping[str, Any] = client.execute("x-kvmigrate-job")
        if job["status"] in ENDED:
            return job
        assert time.monotonic() < deadline, f"still {job['status']}"
        time.sleep(2 * POLL_S)


@contextmanager
def open_world() -> Iterator[World]:
    """A world in a short temporary directory, since the paths of sockets are limited to 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="kvm-") as name, Recorder(Path(name)) as recorder:
        world = World(Path(name), recorder)
        try:
            yield world
        finally:
            world.close()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def wait_listening(address: str) -> None:
    """Return once somebody listens at ``address``; a connection to find out would be taken for the source's."""
    deadline = time.monotonic() + READY_S
    while not is_listening(address):
        assert time.monotonic() < deadline, f"nobody listens at {address}"
        time.sleep(POLL_S)


def is_listening(address: str) -> bool:
    if address.startswith("unix://"):
        path = address.removeprefix("unix://")
        return any(_listens(row, path) for row in Path("/proc/net/unix").read_text().splitlines())
    port = f":{int(address.rpartition(':')[2]):04X}"
    rows = [row.split() for row in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return any(row[1].endswith(port) and row[3] == "0A" for row in rows)


def _listens(row: str, path: str) -> bool:
    words = row.split()
    return words[-1] == path and int(words[3], 16) & 0x10000 != 0  # __SO_ACCEPTCON
