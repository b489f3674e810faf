"""One guest, one hop (or one snapshot), and what each oracle has to say about it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvmigrate.state.frame import FrameKind

from ..faults.proxy import Action, Proxy, Strike
from ..oracle.digest import compare_pages, load_pairs, require_state
from ..oracle.heartbeat import OracleError, judge, judge_restored, require_progress
from ..oracle.recorder import SerialLog
from ..oracle.world import Process, World, free_port, migrate, wait_listening

LEDGER = "beat=10 fill=4 irq=1 state=1 ymm=1"
MEMORY = "64M"
PATIENCE_S = 60.0
BROKEN_PATIENCE_S = 8.0
"""How long a guest is waited for that is expected to be silent: nothing else in such a run depends on it."""


@dataclass
class Findings:
    """The oracles that objected, with what they said."""

    patience_s: float
    objections: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, world: World) -> Findings:
        broken = world.environment.keys() & {"KVMIGRATE_TEST_FAULT", "KVMIGRATE_PLANT"}
        return cls(BROKEN_PATIENCE_S if broken else PATIENCE_S)

    @contextmanager
    def asking(self) -> Iterator[None]:
        """Note an oracle's objection and go on to the next."""
        try:
            yield
        except OracleError as error:
            self.objections.setdefault(error.oracle, str(error))


def boot(world: World, *, cpus: int = 1, rate: int = 20, pages: int = 4000, memory: str = MEMORY) -> Process:
    world.environment["KVMIGRATE_TEST_WITNESS"] = str(witness_directory(world))
    world.environment["KVMIGRATE_TEST_HOST_WRITES"] = "1"
    return world.run("ledger", f"{LEDGER} rate={rate} pages={pages}", memory=memory, cpus=cpus)


def witness_directory(world: World) -> Path:
    directory = world.directory / "witness"
    directory.mkdir(exist_ok=True)
    return directory


def examine_hop(
    world: World,
    *,
    cpus: int = 1,
    hops: int = 1,
    compression: str = "none",
    cap: int = 64 << 20,
    downtime_limit_ms: int = 300,
    connections: int = 1,
    zero_copy: bool = False,
    by_copy: bool = False,
    **guest: Any,
) -> Findings:
    """Move a guest, booted as :func:`boot` says, and ask all oracles; up to ``hops`` times, until one objects.

    With ``by_copy`` neither side takes the other for a peer on this host, so that its pages go as to another one.
    ``cap``, in bytes per second, makes the rounds long, so that the guest writes while pages are on their way.
    """
    found = Findings.of(world)
    source = boot(world, cpus=cpus, **guest)
    for _ in range(hops):
        address = world.tcp("127.0.0.2" if by_copy else "127.0.0.1")
        destination = world.receive(address)
        parameters = {"max-bandwidth": cap, "downtime-limit": downtime_limit_ms, "x-kvmigrate-compression": compression}
        parameters["multifd-channels"] = connections
        job = migrate(source, address, zero_copy=zero_copy, **parameters)
        if zero_copy and job["status"] == "completed":
            assert job["result"]["zero-copy"]["sends"] > 0, "nothing went by reference"
        if job["status"] != "completed":
            found.objections["handover"] = str(job.get("error", {}).get("desc", job["status"]))
            break
        source.wait_end()
        ask_guest(found, destination, cpus)
        with found.asking():
            judge(world.logs)
        ask_digests(found, witness_directory(world))
        if found.objections:
            break
        source = destination
    return found


def ask_guest(found: Findings, process: Process, cpus: int) -> None:
    """Does it go on, on every vCPU, and do interrupts reach it?"""
    with found.asking():
        _require_progress(process, 30, found.patience_s)
    for cpu in range(cpus):
        with found.asking():
            _require(process.log, f"\nH {cpu} ", "heartbeat", found.patience_s)
    with found.asking():
        _require_echo(process, found.patience_s)
    with found.asking():
        if "BAD " in process.log.text:
            raise OracleError("ledger", process.log.text.rpartition("BAD ")[2])


def _require_progress(process: Process, beats: int, patience_s: float) -> None:
    """As :func:`require_progress`, for a guest that may come to its end instead: nothing more is to come from it."""
    deadline = time.monotonic() + patience_s
    before = len(process.log.data)
    while process.popen.poll() is None and time.monotonic() < deadline:
        if len(process.log.data) - before >= beats * 8:
            return
        time.sleep(0.01)
    # What is on its way from a process that ended just now.
    require_progress(process.log, max(beats - (len(process.log.data) - before) // 8, 0), 0.5)


def _require_echo(process: Process, patience_s: float) -> None:
    """Does what is typed reach the guest? Where it has come to its end, what it did not write says so."""
    if process.popen.poll() is not None or process.log.connection is None:
        return
    try:
        process.log.send("anybody there?\n")
    except OSError as error:
        raise OracleError("echo", f"the serial port was closed while it was typed on: {error.strerror}") from None
    _require(process.log, "E anybody there?\n", "echo", patience_s)


def _require(log: SerialLog, text: str, oracle: str, patience_s: float) -> None:
    if "BAD" in log.text:
        return  # the ledger's objection says more than silence after it
    try:
        log.wait_for(text, patience_s)
    except AssertionError as error:
        raise OracleError(oracle, str(error)) from None


def ask_digests(found: Findings, directory: Path) -> None:
    """Are RAM and state the same where the guest stopped and where it started?"""
    for out, into in load_pairs(directory):
        with found.asking():
            list(compare_pages(out, into))
        with found.asking():
            require_state(out, into)


def examine_snapshot(world: World) -> Findings:
    """Save a guest that runs on, restore it beside, and ask all oracles."""
    found = Findings.of(world)
    guest = boot(world)
    directory = world.directory / "saved"
    world.snapshot(guest, directory)
    # Not waited for: a guest that finds its memory damaged may end before its control socket answers.
    restored = world.start("restore", "vm1", str(directory))
    ask_guest(found, restored, 1)
    ask_guest(found, guest, 1)
    with found.asking():
        judge_restored(guest.log, restored.log)
    ask_digests(found, witness_directory(world))
    return found


def examine_stall(world: World, kind: FrameKind) -> Findings:
    """Stall the link at ``kind``; the source may dial anew. If both sides run the guest, its numbers come twice."""
    found = Findings.of(world)
    source = boot(world)
    port = free_port()
    address = f"tcp://127.0.0.1:{port}"
    destination = world.receive(address)
    wait_listening(address)
    with Proxy(("127.0.0.1", port), Strike(kind, Action.STALL)) as proxy:
        with source.client() as client:
            client.execute("migrate-set-parameters", {"x-kvmigrate-timeout": 700})
            client.execute("migrate", {"uri": proxy.address})
            settle(lambda: client.execute("x-kvmigrate-job")["status"] in ("failed", "completed"))
        with found.asking():
            owner = destination if source.popen.poll() is not None or destination.log.chunks else source
            require_progress(owner.log, 30, found.patience_s)
            judge([source.log, destination.log])
    return found


def settle(condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
    """Return once ``condition`` holds. Raises :class:`AssertionError` after ``timeout_s``."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it does not settle"
        time.sleep(0.02)
