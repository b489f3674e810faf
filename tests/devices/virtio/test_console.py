"""A console's bytes: what a driver writes comes out at the back-end, what is typed lies in the guest's memory; neither
side overruns the other, and over a move no byte is lost or comes twice."""

from __future__ import annotations

import random
import threading
import time
from typing import Any

import pytest

from kvmigrate.devices.backends import Backend
from kvmigrate.devices.virtio import registers as reg
from kvmigrate.devices.virtio.console import RX, TX, Console
from kvmigrate.errors import BadField
from kvmigrate.memory.region import GuestMemory

from .port import PIPE_BYTES, RX_BYTES, TX_BYTES, Pipes, Port, console_at
from .queues import clean, is_dirty, wait_for

NR_HOPS = 30


def noise(size: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(size)


def stuck(port: Port, pipes: Pipes) -> bytes:
    """Send until nothing more goes; what was sent, of which the last request waits for room."""
    data = noise(TX_BYTES + PIPE_BYTES + 5000)
    port.send(data[:70000], data[70000:])
    wait_for(lambda: (port.held(TX), pipes.nr_waiting()) == (TX_BYTES, PIPE_BYTES), "there is no room left")
    return data


def test_output_comes_in_order_and_every_buffer_goes_back(port: Port, pipes: Pipes) -> None:
    pieces = [noise(1 + 37 * at, at) for at in range(20)]
    for piece in pieces:
        port.send(piece)
    port.send(b"in ", b"three ", b"pieces")
    expected = b"".join(pieces) + b"in three pieces"
    assert pipes.show_all(len(expected)) == expected
    assert [written for _, written in port.rings[TX].wait_used(21)] == [0] * 21
    assert port.get(reg.INTERRUPT_STATUS) & 1


def test_input_lies_in_the_first_buffer_and_is_marked_dirty(port: Port, pipes: Pipes) -> None:
    at, after = port.offer(100, 100)
    clean(port.memory)
    pipes.type(b"hello")
    assert port.rings[RX].wait_used() == [(0, 5)]
    assert port.memory.read(at, 5) == b"hello"
    assert is_dirty(port.memory, at) and is_dirty(port.memory, port.rings[RX].used)
    assert not is_dirty(port.memory, after)
    assert port.get(reg.INTERRUPT_STATUS) & 1


def test_input_waits_for_buffers_and_then_fills_them_in_turn(port: Port, pipes: Pipes) -> None:
    data = noise(3000)
    pipes.type(data)
    wait_for(lambda: port.held(RX) == 3000, "the input is taken")
    places = port.offer(1000, 1, 1500, 2000)
    used = port.rings[RX].wait_used(4)
    assert [written for _, written in used] == [1000, 1, 1500, 499]
    whole = b"".join(port.memory.read(at, written) for at, (_, written) in zip(places, used, strict=True))
    assert whole == data


def test_a_guest_that_reads_nothing_holds_the_typist_up(port: Port, pipes: Pipes) -> None:
    data = noise(4 * RX_BYTES)
    typed = pipes.type(data)
    wait_for(lambda: port.held(RX) == RX_BYTES, "its buffer is full")
    typed += pipes.type(data[typed:])
    time.sleep(0.1)
    assert pipes.type(data[typed:]) == 0 and typed == RX_BYTES + PIPE_BYTES
    received = b""
    while len(received) < len(data):
        [at] = port.offer(3000)
        typed += pipes.type(data[typed:])
        [(_, written)] = port.rings[RX].wait_used()
        received += port.memory.read(at, written)
    assert received == data


def test_a_slow_reader_gets_every_byte(memory: GuestMemory, pipes: Pipes) -> None:
    with console_at(memory, pipes, stall_ms=1500) as port:
        data = noise(400_000)
        port.send(data)
        received = b""
        while len(received) < 40_000:
            # A little each time: the guest waits longer than a back-end may take nothing.
            received += pipes.show_all(2000)
            time.sleep(0.1)
        assert not port.rings[TX].nr_used()
        received += pipes.show_all(len(data) - len(received))
        assert received == data
        assert port.rings[TX].wait_used() == [(0, 0)]
        assert port.console.statistics() == {"dropped": 0}


def test_a_reader_that_takes_nothing_loses_output_and_the_guest_goes_on(memory: GuestMemory, pipes: Pipes) -> None:
    with console_at(memory, pipes, stall_ms=500) as port:
        sent = stuck(port, pipes)
        port.rings[TX].wait_used()
        port.send(b"into the void")
        port.rings[TX].wait_used()
        dropped = port.console.statistics()["dropped"]
        assert dropped == len(sent) - TX_BYTES - PIPE_BYTES + len(b"into the void")
        assert pipes.show_all(TX_BYTES + PIPE_BYTES) == sent[: TX_BYTES + PIPE_BYTES]
        port.send(b"there again")
        assert pipes.show_all(11) == b"there again"


def test_a_pause_waits_for_no_reader_and_its_time_does_not_count(memory: GuestMemory, pipes: Pipes) -> None:
    with console_at(memory, pipes, stall_ms=1500) as port:
        sent = stuck(port, pipes)
        begin = time.monotonic()
        port.console.pause()
        assert time.monotonic() - begin < 1
        state = port.console.save()
        assert state["passed"] == len(state["tx"]) + PIPE_BYTES and len(state["tx"]) == TX_BYTES
        time.sleep(2)
        assert pipes.show_all(PIPE_BYTES) == sent[:PIPE_BYTES]
        assert pipes.show(timeout_s=0.1) == b"", "a paused console sends nothing"
        port.console.resume()
        assert pipes.show_all(len(sent) - PIPE_BYTES) == sent[PIPE_BYTES:]
        assert port.console.statistics() == {"dropped": 0}


def test_a_paused_console_takes_no_input(port: Port, pipes: Pipes) -> None:
    port.offer(100)
    port.console.pause()
    pipes.type(b"later")
    time.sleep(0.1)
    assert port.held(RX) == 0 and not port.rings[RX].nr_used()
    port.console.resume()
    assert port.rings[RX].wait_used() == [(0, 5)]


class Typist(threading.Thread):
    """Types and reads while the console moves."""

    def __init__(self, pipes: Pipes, text: bytes, expected: int) -> None:
        super().__init__(daemon=True)
        self.pipes, self.text, self.expected = pipes, text, expected
        self.read = b""

    def run(self) -> None:
        typed = 0
        end = time.monotonic() + 60
        while time.monotonic() < end and (typed < len(self.text) or len(self.read) < self.expected):
            typed += self.pipes.type(self.text[typed : typed + 700])
            self.read += self.pipes.show(1500, 0.001)


def test_traffic_in_both_directions_goes_on_over_moves_once_and_in_order(port: Port, pipes: Pipes) -> None:
    text = noise(60_000, 2)
    draw = random.Random(3)
    sizes = [draw.choice((16, 500, 90_000, 120_000)) for _ in range(NR_HOPS)]
    output = noise(sum(sizes), 4)
    typist = Typist(pipes, text, len(output))
    typist.start()
    places: list[tuple[int, int]] = []
    received = b""
    half_done = sent = 0
    for size in sizes:
        port.send(output[sent : sent + size // 3 + 1], output[sent + size // 3 + 1 : sent + size])
        sent += size
        size_in = draw.choice((1, 50, 4000))
        places += [(at, size_in) for at in port.offer(size_in)]
        time.sleep(draw.random() / 1000)
        state = port.move_to(Console("console0", port.memory, pipes.backend(), 10_000))
        half_done += bool(state["passed"])
        # The ring has room for so many requests.
        port.rings[TX].wait_used(max(0, port.rings[TX].avail_idx - port.rings[TX].used_seen - 10))
    while len(received) < len(text):
        places += [(at, 4000) for at in port.offer(4000)] if not places else []
        [(_, written)] = port.rings[RX].wait_used()
        received += port.memory.read(places.pop(0)[0], written)
    typist.join()
    assert half_done > 3, "the moves did not meet a request half done"
    assert typist.read == output
    assert received == text


def test_what_waits_for_the_backend_is_saved_with_what_waits_for_the_guest(port: Port, pipes: Pipes) -> None:
    pipes.type(b"typed")
    wait_for(lambda: port.held(RX) == 5, "the input is taken")
    sent = stuck(port, pipes)
    port.console.pause()
    state = port.console.save()
    assert state["rx"] == b"typed"
    assert state["tx"] == sent[PIPE_BYTES : PIPE_BYTES + TX_BYTES]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rx", bytes(RX_BYTES + 1)),
        ("tx", bytes(TX_BYTES + 1)),
        ("rx", "text"),
        ("passed", -1),
        ("passed", 1 << 32),
        ("passed", True),
        ("more", 1),
        ("status", 0x40),
    ],
)
def test_a_state_that_cannot_be_is_refused_and_changes_nothing(port: Port, key: str, value: Any) -> None:
    port.console.pause()
    before = port.console.save()
    with pytest.raises(BadField, match="console0"):
        port.console.load(before | {"rx": b"other", "tx": b"other"} | {key: value})
    assert port.console.save() == before


@pytest.mark.parametrize("key", ["rx", "tx", "passed"])
def test_a_state_without_a_field_is_refused(port: Port, key: str) -> None:
    port.console.pause()
    state = port.console.save()
    del state[key]
    with pytest.raises(BadField, match=key):
        port.console.load(state)


def test_a_reset_forgets_the_request_but_not_what_was_sent_or_typed(port: Port, pipes: Pipes) -> None:
    sent = stuck(port, pipes)
    pipes.type(b"typed")
    wait_for(lambda: port.held(RX) == 5, "the input is taken")
    port.set(reg.STATUS, 0)
    assert port.console.own_state()["passed"] == 0
    assert pipes.show_all(PIPE_BYTES + TX_BYTES) == sent[: PIPE_BYTES + TX_BYTES]
    port.set_up_anew()
    [at] = port.offer(100)
    assert port.rings[RX].wait_used() == [(0, 5)] and port.memory.read(at, 5) == b"typed"
    port.send(b"new")
    assert pipes.show_all(3) == b"new"


def test_a_console_that_leads_nowhere_takes_all_output_and_keeps_none(memory: GuestMemory) -> None:
    port = Port(memory, Console("console0", memory, Backend()))
    try:
        port.set_up()
        port.send(noise(3 * TX_BYTES))
        assert port.rings[TX].wait_used() == [(0, 0)]
        port.console.pause()
        state = port.console.save()
        assert state["tx"] == b"" and port.console.statistics() == {"dropped": 0}
        port.console.load(state | {"tx": b"for where it came from"})
        port.console.resume()
        assert port.held(TX) == 0
    finally:
        port.console.close()


def test_the_last_words_are_sent_when_a_console_closes(memory: GuestMemory, pipes: Pipes) -> None:
    last = noise(3 * PIPE_BYTES)
    reader = Typist(pipes, b"", len(last))
    with console_at(memory, pipes) as port:
        port.send(last)
        port.rings[TX].wait_used()
        # Only now: the pipe is full, and most of it waits in the console.
        wait_for(lambda: pipes.nr_waiting() == PIPE_BYTES, "the pipe is full")
        reader.start()
    reader.join()
    assert reader.read == last


def test_a_paused_console_has_no_last_words(memory: GuestMemory, pipes: Pipes) -> None:
    with console_at(memory, pipes) as port:
        sent = stuck(port, pipes)
        port.console.pause()
    assert pipes.show_all(PIPE_BYTES) == sent[:PIPE_BYTES]
    assert pipes.show(timeout_s=0.1) == b""
