"""A driver that breaks a console's rules has the device marked broken, by itself alone: the reset brings it back."""

from __future__ import annotations

import struct

import pytest

from kvmigrate.devices.virtio import registers as reg
from kvmigrate.devices.virtio.console import RX, TX

from .port import PIPE_BYTES, TX_BYTES, Pipes, Port
from .queues import BUFFERS, INDIRECT, MEMORY_BYTES, NEXT, WRITE, wait_for

AT = BUFFERS + 0x10000
Chain = list[tuple[int, int, int]]
NO_TX: dict[str, Chain] = {
    "a buffer that the device writes": [(AT, 16, WRITE)],
    "one behind good output": [(AT, 16, 0), (AT, 16, WRITE)],
    "a buffer outside of RAM": [(MEMORY_BYTES, 16, 0)],
    "a buffer over the end of RAM": [(MEMORY_BYTES - 8, 16, 0)],
    "an address that wraps around": [(2**64 - 8, 16, 0)],
    "the largest length": [(AT, 0xFFFFFFFF, 0)],
    "an empty buffer": [(AT, 0, 0)],
    "an indirect table that was not agreed on": [(AT, 32, INDIRECT)],
}
NO_RX: dict[str, Chain] = {
    "a buffer that the device reads": [(AT, 16, 0)],
    "one before room for input": [(AT, 16, 0), (AT, 16, WRITE)],
    "a buffer outside of RAM": [(MEMORY_BYTES, 16, WRITE)],
    "the largest length": [(AT, 0xFFFFFFFF, WRITE)],
    "an empty buffer": [(AT, 0, WRITE)],
}


def require_broken_then_reset(port: Port, pipes: Pipes) -> None:
    wait_for(port.broken, "the device is broken")
    assert port.get(reg.INTERRUPT_STATUS) & 2
    assert not any(ring.nr_used() for ring in port.rings)
    # What is typed meanwhile and afterwards is not lost.
    pipes.type(b"one ")
    port.set(reg.STATUS, 0)
    assert not port.broken()
    port.set_up_anew()
    pipes.type(b"two")
    received = b""
    while len(received) < 7:
        [at] = port.offer(100)
        [(_, written)] = port.rings[RX].wait_used()
        received += port.memory.read(at, written)
    assert received.endswith(b"one two")
    port.send(b"alive")
    assert pipes.show_all(5) == b"alive"


@pytest.mark.parametrize("chain", NO_TX.values(), ids=NO_TX.keys())
def test_wrong_output_breaks_the_device_and_nothing_of_it_comes_out(port: Port, pipes: Pipes, chain: Chain) -> None:
    port.rings[TX].put(*chain)
    port.kick(TX)
    require_broken_then_reset(port, pipes)


@pytest.mark.parametrize("chain", NO_RX.values(), ids=NO_RX.keys())
def test_wrong_room_for_input_breaks_the_device(port: Port, pipes: Pipes, chain: Chain) -> None:
    port.rings[RX].put(*chain)
    port.kick(RX)
    pipes.type(b"a")
    wait_for(port.broken, "the device is broken")
    assert port.console.own_state()["rx"] == b"a"


@pytest.mark.parametrize("queue", [RX, TX])
def test_a_chain_that_loops_breaks_the_device(port: Port, pipes: Pipes, queue: int) -> None:
    ring = port.rings[queue]
    flags = NEXT | (WRITE if queue == RX else 0)
    ring.describe(0, AT, 16, flags, 1)
    ring.describe(1, AT, 16, flags, 0)
    ring.offer(0)
    port.kick(queue)
    pipes.type(b"a")
    wait_for(port.broken, "the device is broken")


@pytest.mark.parametrize("queue", [RX, TX])
def test_an_available_index_that_jumps_breaks_the_device(port: Port, pipes: Pipes, queue: int) -> None:
    ring = port.rings[queue]
    port.memory.write(ring.avail + 2, struct.pack("<H", ring.size + 1))
    port.kick(queue)
    pipes.type(b"a")
    wait_for(port.broken, "the device is broken")


@pytest.mark.parametrize("size", [1, 70_000, 200_000])
def test_a_request_that_changes_half_done_hurts_only_its_output(port: Port, pipes: Pipes, size: int) -> None:
    port.send(bytes(TX_BYTES + PIPE_BYTES + 5000))
    wait_for(lambda: port.held(TX) == TX_BYTES, "the buffer is full")
    port.rings[TX].describe(0, AT, size, 0, 0)
    wait_for(lambda: not pipes.show() and port.rings[TX].nr_used() == 1, "the request comes to its end")
    port.send(b"alive")
    shown = b""
    while not shown.endswith(b"alive"):
        shown += pipes.show_all(1)
    assert not port.broken()


def test_a_saved_request_further_on_than_it_is_long_comes_to_its_end(port: Port, pipes: Pipes) -> None:
    port.console.pause()
    state = port.console.save()
    port.console.load(state | {"passed": 0xFFFFFFFF})
    port.console.resume()
    port.send(b"gone")
    assert port.rings[TX].wait_used() == [(0, 0)]
    port.send(b"alive")
    assert pipes.show_all(5) == b"alive"
