"""The choice between raw pages and zstd: what follows from which numbers, and what a whole migration makes of it."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from kvmigrate.config import Address, Compression, SnapshotParameters
from kvmigrate.errors import ConfigError
from kvmigrate.migration.codec import Auto, Choice, Part, Sample, Sent, choose
from kvmigrate.precopy.rounds import Round
from tests.fake_machine import MIB, FakeMachine

from .harness import Receiving, migrate
from .shaped import THERE, ShapedLink, possible

Receive = Callable[..., Receiving]

TEXT, NOISE = Sample(0.4, 200e6), Sample(1.0, 3e9)
SLOW, LOOPBACK = 12.5e6, 2e9


@pytest.mark.parametrize(
    ("link", "samples", "level"),
    [
        (SLOW, {1: TEXT}, 1),
        (SLOW, {1: NOISE}, None),
        (SLOW, {1: TEXT, 3: Sample(0.34, 100e6)}, 3),
        (SLOW, {1: TEXT, 3: Sample(0.39, 100e6)}, 1),
        (125e6, {1: TEXT, 3: Sample(0.34, 100e6)}, 1),
        (190e6, {1: TEXT}, None),
        (LOOPBACK, {1: TEXT}, None),
        (LOOPBACK, {}, None),
    ],
)
def test_zstd_is_chosen_where_it_moves_more_pages_than_the_link_alone(
    link: float, samples: dict[int, Sample], level: int | None
) -> None:
    assert choose(None, link, samples, 4).level == level


def test_a_small_gain_neither_begins_nor_ends_compression() -> None:
    little = {1: Sample(0.9, 1e9)}
    assert choose(None, SLOW, little, 2).level is None
    assert choose(1, SLOW, little, 2).level == 1
    assert choose(1, SLOW, {1: Sample(0.97, 1e9)}, 2).level is None


def test_one_core_has_to_do_both_in_turn() -> None:
    samples = {1: Sample(0.5, 200e6)}
    assert choose(None, 100e6, samples, 2).level == 1
    assert choose(None, 100e6, samples, 1).level is None


def test_the_reason_names_the_numbers() -> None:
    why = choose(None, SLOW, {1: TEXT}, 2).why
    assert why == "link 11.9 MiB/s, zstd:1 leaves 40% at 190.7 MiB/s: 2.50 × raw"


class World:
    """A link and pages of which :class:`Auto` sees only what a real one would show, on a clock that it moves."""

    def __init__(self, link: float, pages: Sample, cap: int = 0) -> None:
        self.link, self.pages = link, pages
        self.now = 0.0
        self.nr_samples = 0
        self.auto = Auto(2, lambda: self.now)
        self.round = Round(0, abort_fd=-1, timeout_ms=1000, bandwidth_bytes_s=cap)

    def sample(self, level: int) -> Sample | None:
        self.nr_samples += 1
        return self.pages if level == 1 else Sample(self.pages.ratio, self.pages.packer / 2)

    def step(self) -> Choice:
        part = self.auto.next(self.round, self.sample)
        self.auto.sent(self.round, part, self._send(part))
        return part.choice

    def _send(self, part: Part) -> Sent:
        page_bytes = min(part.most_pages * 4096, 64 * MIB)
        packed = part.choice.level is not None
        out = int(page_bytes * (self.pages.ratio if packed else 1))
        work_s = page_bytes / self.pages.packer if packed else 0.0
        busy_s = max(out / self.link - work_s, out / LOOPBACK)
        self.now += work_s + busy_s
        queued = MIB if out / self.link > work_s else 0
        return Sent(page_bytes, out, out, queued, busy_s, work_s)

    def run(self, steps: int) -> list[int | None]:
        return [self.step().level for _ in range(steps)]


def test_a_slow_link_gets_zstd_after_three_looks_and_keeps_it() -> None:
    assert World(SLOW, TEXT).run(20) == [None, None, None, *[1] * 17]


def test_a_fast_link_is_not_even_sampled() -> None:
    world = World(LOOPBACK, TEXT)
    assert set(world.run(20)) == {None} and world.nr_samples == 0


def test_under_a_low_cap_nothing_has_to_be_measured_first() -> None:
    assert World(LOOPBACK, TEXT, cap=12_500_000).run(2) == [1, 1]


def test_pages_that_stop_shrinking_go_raw_and_those_that_shrink_again_packed() -> None:
    world = World(SLOW, TEXT)
    world.run(5)
    world.pages = NOISE
    assert world.run(3)[1:] == [None, None]
    world.pages = TEXT
    assert world.run(10)[-1] == 1


def test_a_link_that_became_fast_is_noticed_though_the_compressor_hides_it() -> None:
    world = World(SLOW, TEXT)
    world.run(5)
    world.link = LOOPBACK
    assert world.run(40)[-5:] == [None] * 5


@pytest.mark.parametrize("before", [0, 1, 5])
def test_two_stalled_parts_are_no_slow_link(before: int) -> None:
    world = World(LOOPBACK, TEXT)
    world.run(before)
    world.link = 20e6
    assert world.run(2) == [None, None]
    world.link = LOOPBACK
    assert set(world.run(5)) == {None}


def test_the_blackout_tries_nothing() -> None:
    world = World(SLOW, TEXT)
    world.round = Round(1, abort_fd=-1, timeout_ms=1000, bandwidth_bytes_s=0, last=True)
    assert world.run(3) == [None] * 3 and world.nr_samples == 0


def test_a_snapshot_has_no_link_to_go_by() -> None:
    with pytest.raises(ConfigError, match="auto"):
        SnapshotParameters(compression=Compression.parse("auto"))
    assert str(Compression.parse("auto")) == "auto"


class Narrow:
    """A proxy that carries ``rate`` bytes per second towards ``target``, and has small buffers."""

    def __init__(self, target: Address, rate: float) -> None:
        self._target, self._rate = target, rate
        self._server = socket.create_server(("127.0.0.1", 0))
        self._server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        self.address = Address("127.0.0.1", self._server.getsockname()[1])
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        near, _ = self._server.accept()
        with near, socket.create_connection((self._target.host, self._target.port)) as far:
            threading.Thread(target=self._pass_on, args=(far, near, 0.0), daemon=True).start()
            self._pass_on(near, far, self._rate)

    @staticmethod
    def _pass_on(source: socket.socket, sink: socket.socket, rate: float) -> None:
        due = time.monotonic()
        with suppress(OSError):
            while data := source.recv(1 << 16):
                due = max(due, time.monotonic() - 0.01) + (len(data) / rate if rate else 0)
                time.sleep(max(due - time.monotonic(), 0))
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self._server.close()


@pytest.fixture
def narrow() -> Iterator[Callable[[Address], Address]]:
    links: list[Narrow] = []

    def make(target: Address) -> Address:
        links.append(Narrow(target, 16e6))
        return links[-1].address

    yield make
    for link in links:
        link.close()


def text_like(machine: FakeMachine, nr_bytes: int) -> None:
    """RAM of short words, of which zstd leaves about a third."""
    line = b"".join(b"%d times %d is %d; " % (a, b, a * b) for a in range(100) for b in range(100))
    machine.memory.write(MIB, (line * (nr_bytes // len(line) + 1))[:nr_bytes])


def test_a_narrow_link_is_filled_with_compressed_pages_and_the_ledger_says_why(
    tmp_path: Path, receive: Receive, narrow: Callable[[Address], Address]
) -> None:
    machine = FakeMachine(48 * MIB, running=True)
    text_like(machine, 44 * MIB)
    receiving = receive()
    outcome = migrate(machine, narrow(receiving.address), tmp_path, compression="auto")
    receiving.join()
    assert outcome.error is None and outcome.result is not None
    first = outcome.result.rounds[0]
    assert first.codec.startswith("zstd:") and "link" in first.codec_why and "× raw" in first.codec_why
    assert first.bytes_sent < 0.6 * 44 * MIB
    assert receiving.machine is not None and receiving.machine.digest() == machine.digest()
    machine.close()


def test_what_was_asked_for_is_the_reason_when_it_was_asked_for(tmp_path: Path, receive: Receive) -> None:
    machine = FakeMachine(8 * MIB, running=True)
    text_like(machine, 4 * MIB)
    outcome = migrate(machine, receive().address, tmp_path, compression="zstd:2")
    assert outcome.result is not None
    told = outcome.result.rounds[0].to_value()
    assert (told["compression"], told["compression-why"]) == ("zstd:2", "as asked for")
    machine.close()


@pytest.mark.skipif(not possible(), reason="a shaped link takes root, ip and tc")
def test_a_shaped_link_carries_less_than_half_of_compressible_pages(tmp_path: Path) -> None:
    machine = FakeMachine(32 * MIB, running=True)
    text_like(machine, 28 * MIB)
    link = ShapedLink("100mbit")
    try:
        with link.there():
            receiving = Receiving(tmp_path, listen=Address(THERE, 0))
        outcome = migrate(machine, receiving.address, tmp_path, compression="auto")
        receiving.join()
        receiving.close()
    finally:
        link.close()
        machine.close()
    assert outcome.error is None and outcome.result is not None
    assert outcome.result.rounds[0].bytes_sent < 0.5 * 28 * MIB
