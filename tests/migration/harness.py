"""A source and a destination of one fake guest, and a proxy between them that can hurt any frame either way."""

from __future__ import annotations

import select
import socket
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from kvmigrate.config import Address, Compression, MigrationParameters
from kvmigrate.contract import RunState
from kvmigrate.errors import KvmigrateError, StateError
from kvmigrate.migration.address import Listener
from kvmigrate.migration.channel import kind_name
from kvmigrate.migration.destination import Arrived, Destination
from kvmigrate.migration.source import Source
from kvmigrate.migration.status import MigrationResult, Status
from kvmigrate.precopy.ledger import RoundRecord
from kvmigrate.state.frame import HEADER, decode_header
from kvmigrate.state.section import Value
from tests.fake_machine import FakeMachine, FakeTrial

LOCAL = Address("127.0.0.1", 0)
TIMEOUT_MS = 8000.0
"""Long, for a busy machine: only where a peer is silent on purpose is it worth waiting for less."""
SILENCE_MS = 400.0
SLOW_S = 0.1
"""For how long a proxy holds a frame that it slows down: far less than anybody's patience."""


def patience_ms(action: str) -> float:
    """How long to wait for a peer that a rule with ``action`` stands between."""
    return SILENCE_MS if action == "hold" else TIMEOUT_MS


@dataclass
class Watch:
    """An observer that writes down what it is told."""

    words: list[Status] = field(default_factory=list)
    rounds: list[RoundRecord] = field(default_factory=list)

    def status(self, word: Status) -> None:
        self.words.append(word)

    def round_done(self, record: RoundRecord) -> None:
        self.rounds.append(record)

    def event(self, name: str, data: Value) -> None:
        return


class Receiving:
    """A destination in its thread."""

    def __init__(
        self,
        directory: Path,
        *,
        name: str = "dst",
        in_doubt_ms: float = 1500.0,
        timeout_ms: float = TIMEOUT_MS,
        prepare: Callable[[FakeMachine], None] | None = None,
        prepare_trial: Callable[[FakeTrial], None] | None = None,
        listen: Address = LOCAL,
    ) -> None:
        self.machine: FakeMachine | None = None
        self.arrived: Arrived | None = None
        self.error: BaseException | None = None
        self.watch = Watch()
        self._prepare = prepare
        self._prepare_trial = prepare_trial
        self.checks: list[FakeTrial] = []
        self.listener = Listener(listen)
        self.address = self.listener.address
        self.destination = Destination(
            self.listener,
            self._build,
            self._examine,
            directory,
            name,
            self.watch,
            timeout_ms=timeout_ms,
            in_doubt_ms=in_doubt_ms,
        )
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _build(self, description: Mapping[str, Value]) -> FakeMachine:
        self.machine = FakeMachine.build(description)
        if self._prepare is not None:
            self._prepare(self.machine)
        if self._prepare_trial is not None:
            self.machine.prepare_trial = self._prepare_trial
        return self.machine

    def _examine(self, description: Mapping[str, Value]) -> FakeTrial:
        self.checks.append(FakeTrial(FakeMachine.build(description)))
        if self._prepare_trial is not None:
            self._prepare_trial(self.checks[-1])
        return self.checks[-1]

    @property
    def trials(self) -> list[FakeTrial]:
        """All of them: those of checks, and the guest's own."""
        return self.checks + (self.machine.trials if self.machine is not None else [])

    def _run(self) -> None:
        try:
            self.arrived = self.destination.run()
        except BaseException as error:
            self.error = error

    def join(self, timeout_s: float = 10.0) -> None:
        self.thread.join(timeout_s)
        assert not self.thread.is_alive(), "the destination hangs"

    def close(self) -> None:
        if self.thread.is_alive():
            with suppress(StateError):
                self.destination.cancel()
            self.thread.join(10.0)
        self.destination.close(0.0)
        if self.machine is not None:
            self.machine.close()

    @property
    def ran(self) -> bool:
        return self.machine is not None and self.machine.ever_ran


@dataclass
class Outcome:
    """How a migration ended at the source: with a result or with an error."""

    result: MigrationResult | None = None
    error: BaseException | None = None


def migrate(
    machine: FakeMachine,
    address: Address,
    directory: Path,
    *,
    ask_for_ms: float | None = 3000.0,
    compression: str = "none",
    timeout_ms: float = TIMEOUT_MS,
    watch: Watch | None = None,
    **parameters: float,
) -> Outcome:
    """One whole migration, from this thread."""
    source = make_source(
        machine,
        address,
        directory,
        ask_for_ms=ask_for_ms,
        compression=compression,
        timeout_ms=timeout_ms,
        watch=watch,
        **parameters,
    )
    return run(source)


def make_source(
    machine: FakeMachine,
    address: Address,
    directory: Path,
    *,
    ask_for_ms: float | None = 3000.0,
    compression: str = "none",
    timeout_ms: float = TIMEOUT_MS,
    watch: Watch | None = None,
    **parameters: float,
) -> Source:
    settings = MigrationParameters(
        timeout_ms=timeout_ms,
        compression=Compression.parse(compression),
        # One, whatever processors there are, unless a test is about several.
        **{"connections": 1, **parameters},  # type: ignore[arg-type]
    )
    return Source(machine, address, settings, directory, watch or Watch(), ask_for_ms=ask_for_ms)


def run(source: Source) -> Outcome:
    try:
        return Outcome(result=source.run())
    except KvmigrateError as error:
        return Outcome(error=error)


@dataclass
class Rule:
    """What to do to frame ``number`` (from 0) of one direction: cut the link before it, at a byte of it or after it,
    hold it for ever or for a moment (slow), or flip one of its bits. ``link_stays_down`` refuses later connections
    too."""

    direction: str
    number: int
    action: str
    at: int = 0
    link_stays_down: bool = False
    connection: int = 1
    """Which one of those that come; the later ones are further connections, or those that ask."""
    kind: str = ""
    """Every frame of this kind, in place of the one with that number."""


class Proxy:
    """Passes frames between one source and one destination, by the frame, and applies ``rule`` once.

    ``seen`` lists the kinds of all frames that were passed whole, per direction (``"out"`` from the source);
    ``seen_on`` the same of each connection.
    """

    def __init__(self, target: Address, rule: Rule | None = None) -> None:
        self._target = target
        self.rule = rule
        self.seen: dict[str, list[str]] = {"out": [], "back": []}
        self.seen_on: list[dict[str, list[str]]] = []
        self.hit = threading.Event()
        self._down = threading.Event()
        self._quit = threading.Event()
        self._server = socket.create_server(("127.0.0.1", 0))
        self._server.settimeout(0.05)
        self.address = Address("127.0.0.1", self._server.getsockname()[1])
        self._threads: list[threading.Thread] = []
        self._spawn(self._accept)

    def close(self) -> None:
        self._quit.set()
        for thread in self._threads:
            thread.join(5)
        self._server.close()

    def _spawn(self, target: Callable[..., None], *args: object) -> None:
        thread = threading.Thread(target=target, args=args, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while not self._quit.is_set():
            try:
                near = self._server.accept()[0]
            except TimeoutError:
                continue
            if self._down.is_set():
                near.close()
                continue
            try:
                far = socket.create_connection((self._target.host, self._target.port), 2)
            except OSError:
                near.close()
                continue
            pair = _Pair(near, far)
            seen: dict[str, list[str]] = {"out": [], "back": []}
            self.seen_on.append(seen)
            rule = self.rule if self.rule is not None and self.rule.connection == len(self.seen_on) else None
            self._spawn(self._pass, pair, near, far, "out", rule, seen)
            self._spawn(self._pass, pair, far, near, "back", rule, seen)

    def _pass(
        self,
        pair: _Pair,
        near: socket.socket,
        far: socket.socket,
        direction: str,
        rule: Rule | None,
        seen: dict[str, list[str]],
    ) -> None:
        mine = rule if rule is not None and rule.direction == direction else None
        number = 0
        while (data := self._frame(near, pair)) is not None:
            kind = kind_name(decode_header(data[:32]).kind)
            hit = mine is not None and (mine.number == number if not mine.kind else kind == mine.kind)
            if mine is not None and hit and not self._apply(mine, data, far, pair):
                return
            if mine is None or not hit or mine.action in ("cut-after", "pass", "slow"):
                if not _send(far, data):
                    break
                self.seen[direction].append(kind)
                seen[direction].append(kind)
            if mine is not None and hit and mine.action == "cut-after":
                time.sleep(0.03)
                self._cut(mine, pair)
                return
            number += 1
        pair.close()

    def _apply(self, rule: Rule, data: bytes, far: socket.socket, pair: _Pair) -> bool:
        """True when the stream goes on."""
        self.hit.set()
        if rule.action in ("cut", "cut-at"):
            if rule.action == "cut-at":
                _send(far, data[: rule.at])
            self._cut(rule, pair)
            return False
        if rule.action == "hold":
            if rule.link_stays_down:
                self._down.set()
            while not self._quit.wait(0.02) and not pair.closed:
                pair.probe()
            pair.close()
            return False
        if rule.action == "slow":
            time.sleep(SLOW_S)
        if rule.action == "flip":
            at = rule.at % len(data)
            _send(far, data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        return True

    def _cut(self, rule: Rule, pair: _Pair) -> None:
        if rule.link_stays_down:
            self._down.set()
        pair.close()

    def link_up(self) -> None:
        """Let later connections through again."""
        self._down.clear()

    def _frame(self, near: socket.socket, pair: _Pair) -> bytes | None:
        head = self._exactly(near, HEADER.size, pair)
        if head is None:
            return None
        body = self._exactly(near, decode_header(head).length, pair)
        return None if body is None else head + body

    def _exactly(self, sock: socket.socket, size: int, pair: _Pair) -> bytes | None:
        data = bytearray()
        while len(data) < size:
            if self._quit.is_set() or pair.closed:
                return None
            try:
                if not select.select([sock], [], [], 0.05)[0]:
                    continue
                got = sock.recv(size - len(data))
            except (OSError, ValueError):
                return None
            if not got:
                return None
            data += got
        return bytes(data)


class _Pair:
    """Both sockets of one connection through the proxy."""

    def __init__(self, *socks: socket.socket) -> None:
        self._socks = socks
        self.closed = False

    def close(self) -> None:
        self.closed = True
        for sock in self._socks:
            try:
                sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass
            sock.close()

    def probe(self) -> None:
        """Notice that an end has hung up."""
        for sock in self._socks:
            try:
                if select.select([sock], [], [], 0)[0] and not sock.recv(1, socket.MSG_PEEK):
                    self.closed = True
            except (OSError, ValueError):
                self.closed = True


def _send(sock: socket.socket, data: bytes) -> bool:
    try:
        sock.sendall(data)
    except OSError:
        return False
    return True


def check_never_two(source: FakeMachine, receiving: Receiving) -> None:
    """The two never ran at the same time, and no side runs that must not."""
    assert not (source.running and receiving.ran and receiving.machine is not None and receiving.machine.running)
    if receiving.ran:
        assert not source.running, "the guest ran at the destination and runs at the source"


def check_resumed(source: FakeMachine) -> None:
    """The source is as it was before: running, logging off, nothing pending."""
    assert source.runstate is RunState.RUNNING
    assert not source.dirty_log.active


def check_no_files(directory: Path) -> None:
    """No journal, no temporary file, no socket."""
    left = [path.name for path in directory.iterdir()]
    assert left == []
