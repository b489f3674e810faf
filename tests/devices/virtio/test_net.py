"""A network card's packets: what a driver queues arrives at the tap, what arrives there lies in the guest's memory."""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from kvmigrate.devices.virtio import registers as reg
from kvmigrate.devices.virtio.net import F_GUEST_ANNOUNCE, F_MRG_RXBUF, FEATURES, Net
from kvmigrate.errors import BadField, ConfigError
from kvmigrate.memory.region import GuestMemory

from .queues import (
    CTRL,
    MAC,
    MEMORY_BYTES,
    NO_HEADER,
    RX,
    TX,
    WRITE,
    Driver,
    clean,
    is_dirty,
    packets,
    wait_for,
)

LINK_UP, ANNOUNCE = 1, 2
ANNOUNCE_ACK = bytes((3, 0))
RARP = b"\xff" * 6 + MAC + bytes.fromhex("8035 0001 0800 06 04 0003") + MAC + bytes(4) + MAC + bytes(4 + 18)


@pytest.fixture
def tap() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = packets()
    with ours, theirs:
        yield ours, theirs


@pytest.fixture
def network(tap: tuple[socket.socket, socket.socket]) -> socket.socket:
    return tap[1]


@pytest.fixture
def new_driver(memory: GuestMemory, tap: tuple[socket.socket, socket.socket]) -> Iterator[Callable[[int], Driver]]:
    drivers: list[Driver] = []

    def make(features: int = FEATURES) -> Driver:
        drivers.append(Driver(memory, tap[0].fileno(), features))
        return drivers[-1]

    yield make
    for driver in drivers:
        driver.net.close()


@pytest.fixture
def driver(new_driver: Callable[..., Driver]) -> Driver:
    driver = new_driver()
    driver.set_up()
    return driver


def payload(size: int, seed: int = 1) -> bytes:
    return bytes((seed + at * 7 + at // 251) & 0xFF for at in range(size))


def header(nr_buffers: int) -> bytes:
    return bytes(10) + struct.pack("<H", nr_buffers)


def test_what_a_driver_sends_arrives_at_the_tap_in_order(driver: Driver, network: socket.socket) -> None:
    frames = [NO_HEADER + payload(60 + 13 * at, at) for at in range(20)]
    driver.send(*frames)
    assert [network.recv(1 << 17) for _ in frames] == frames
    assert [written for _, written in driver.rings[TX].wait_used(20)] == [0] * 20


def test_a_packet_in_several_buffers_leaves_in_one_piece(driver: Driver, network: socket.socket) -> None:
    frame = NO_HEADER + payload(60000)
    pieces = [frame[:12], frame[12:5000], frame[5000:]]
    places = [driver.buffer(len(piece)) for piece in pieces]
    for place, piece in zip(places, pieces, strict=True):
        driver.memory.write(place, piece)
    driver.rings[TX].put(*((place, len(piece), 0) for place, piece in zip(places, pieces, strict=True)))
    driver.kick(TX)
    assert network.recv(1 << 17) == frame


def test_what_arrives_lies_in_the_buffer_and_is_marked_dirty(driver: Driver, network: socket.socket) -> None:
    at, after = driver.offer(2)
    clean(driver.memory)
    network.send(NO_HEADER + payload(1000))
    assert driver.rings[RX].wait_used() == [(0, 1012)]
    assert driver.memory.read(at, 1012) == header(1) + payload(1000)
    assert is_dirty(driver.memory, at) and is_dirty(driver.memory, driver.rings[RX].used)
    assert not is_dirty(driver.memory, after)
    assert driver.get(reg.INTERRUPT_STATUS) & 1


def test_a_large_packet_is_spread_over_the_buffers_that_it_needs(driver: Driver, network: socket.socket) -> None:
    places = driver.offer(8, 1536)
    clean(driver.memory)
    packet = payload(5000)
    network.send(NO_HEADER + packet)
    used = driver.rings[RX].wait_used(4)
    assert used == [(0, 1536), (1, 1536), (2, 1536), (3, 5012 - 3 * 1536)]
    whole = b"".join(driver.memory.read(at, written) for at, (_, written) in zip(places, used, strict=False))
    assert whole == header(4) + packet
    assert [is_dirty(driver.memory, at) for at in places] == [True] * 4 + [False] * 4
    # The buffers after it are still there for the next one.
    network.send(NO_HEADER + payload(64, 9))
    assert driver.rings[RX].wait_used() == [(4, 76)]


def test_a_packet_waits_for_the_buffers_that_it_lacks(driver: Driver, network: socket.socket) -> None:
    places = driver.offer(2, 1536)
    network.send(NO_HEADER + payload(6000))
    network.send(NO_HEADER + payload(64, 5))
    time.sleep(0.05)
    assert driver.rings[RX].nr_used() == 0
    places += driver.offer(4, 1536)
    used = driver.rings[RX].wait_used(5)
    whole = b"".join(driver.memory.read(at, written) for at, (_, written) in zip(places, used, strict=False))
    assert whole == header(4) + payload(6000) + header(1) + payload(64, 5)
    assert driver.net.statistics()["dropped"] == 0


def test_packets_wait_in_the_tap_while_there_is_no_buffer(driver: Driver, network: socket.socket) -> None:
    for at in range(3):
        network.send(NO_HEADER + payload(100, at))
    places = driver.offer(3)
    driver.rings[RX].wait_used(3)
    assert [driver.memory.read(place + 12, 100) for place in places] == [payload(100, at) for at in range(3)]


def test_without_mergeable_buffers_what_does_not_fit_is_dropped(
    new_driver: Callable[..., Driver], network: socket.socket
) -> None:
    driver = new_driver(FEATURES & ~F_MRG_RXBUF)
    driver.set_up()
    (at, _) = driver.offer(2, 2048)
    network.send(NO_HEADER + payload(4000))
    network.send(NO_HEADER + payload(200, 3))
    assert driver.rings[RX].wait_used() == [(0, 212)]
    assert driver.memory.read(at, 212) == header(1) + payload(200, 3)
    assert driver.net.statistics()["dropped"] == 1


def test_a_tap_that_is_full_drops_what_is_too_much(driver: Driver, network: socket.socket) -> None:
    for _ in range(8):
        driver.send(*[NO_HEADER + payload(60000)] * 8)
        driver.rings[TX].wait_used(8)
    statistics = driver.net.statistics()
    assert statistics["dropped"] and statistics["dropped"] + statistics["sent"] == 64


def command(driver: Driver, request: bytes) -> int:
    """The device's answer to a command on the control queue."""
    out, answer = driver.buffer(), driver.buffer()
    driver.memory.write(out, request)
    driver.memory.write(answer, b"\xaa")
    driver.rings[CTRL].put((out, len(request), 0), (answer, 1, WRITE))
    driver.kick(CTRL)
    assert driver.rings[CTRL].wait_used()[0][1] == 1
    return driver.memory.read(answer, 1)[0]


def test_an_announcement_stands_in_the_status_until_the_driver_acknowledges_it(driver: Driver) -> None:
    assert driver.status() == LINK_UP
    driver.net.announce()
    assert driver.status() == LINK_UP | ANNOUNCE
    assert driver.get(reg.INTERRUPT_STATUS) & 2
    assert command(driver, ANNOUNCE_ACK) == 0
    assert driver.status() == LINK_UP


@pytest.mark.parametrize("request_", [bytes((0, 0, 1)), bytes((1, 0, 0)), bytes((3, 1)), bytes((255, 255)) * 600])
def test_a_command_that_is_not_known_is_refused(driver: Driver, request_: bytes) -> None:
    assert command(driver, request_) == 1
    assert not driver.broken()


def test_a_card_that_moved_is_made_known_by_five_rarp_requests(driver: Driver, network: socket.socket) -> None:
    began = time.monotonic()
    driver.net.announce()
    assert [network.recv(1 << 16) for _ in range(5)] == [NO_HEADER + RARP] * 5
    assert time.monotonic() - began < 2
    network.settimeout(0.25)
    with pytest.raises(TimeoutError):
        network.recv(1 << 16)


def test_a_driver_that_cannot_announce_is_not_asked_to(
    new_driver: Callable[..., Driver], network: socket.socket
) -> None:
    driver = new_driver(FEATURES & ~F_GUEST_ANNOUNCE)
    driver.set_up()
    driver.net.announce()
    assert driver.status() == LINK_UP
    assert network.recv(1 << 16) == NO_HEADER + RARP


def test_a_tap_that_goes_away_is_a_cable_that_is_pulled(driver: Driver, network: socket.socket) -> None:
    driver.offer(4)
    network.close()
    wait_for(lambda: driver.status() == 0, "the link goes down")
    assert driver.get(reg.INTERRUPT_STATUS) & 2
    driver.send(NO_HEADER + payload(64))
    driver.rings[TX].wait_used()
    assert not driver.broken()


def test_a_card_gives_its_address_and_no_more_than_its_configuration(driver: Driver) -> None:
    read = bytes(driver.net.read(reg.CONFIG + at, 1) for at in range(16))
    assert read == MAC + bytes((LINK_UP, 0)) + bytes(8)


def test_an_address_that_no_card_can_have_is_refused(memory: GuestMemory) -> None:
    ours, theirs = packets()
    with theirs, pytest.raises(ConfigError, match="one station"):
        Net("net-lan", memory, ours.detach(), b"\xff" * 6)
    theirs.close()


# Drivers that break the rules


BROKEN_RULES = [
    "a packet shorter than its header",
    "a packet that only the device may write",
    "a packet that lies outside of memory",
    "a packet that runs out of memory",
    "a buffer that the device may not write",
    "a buffer too small for a header",
    "a buffer outside of memory",
    "a command of one byte",
    "a command without room for an answer",
    "a chain without an end",
    "a descriptor that does not exist",
]


def break_rules(driver: Driver, how: str) -> None:
    rx, tx, ctrl = driver.rings
    page = driver.buffer()
    far = 1 << 40

    def put_endless() -> None:
        tx.describe(0, page, 64, 1, 0)
        tx.offer(0)

    acts: dict[str, Callable[[], object]] = {
        "a packet shorter than its header": lambda: tx.put((page, 11, 0)),
        "a packet that only the device may write": lambda: tx.put((page, 64, WRITE)),
        "a packet that lies outside of memory": lambda: tx.put((far, 64, 0)),
        "a packet that runs out of memory": lambda: tx.put((MEMORY_BYTES - 4096, 8192, 0)),
        "a buffer that the device may not write": lambda: rx.put((page, 2048, 0)),
        "a buffer too small for a header": lambda: rx.put((page, 11, WRITE)),
        "a buffer outside of memory": lambda: rx.put((far, 2048, WRITE)),
        "a command of one byte": lambda: ctrl.put((page, 1, 0), (page, 1, WRITE)),
        "a command without room for an answer": lambda: ctrl.put((page, 2, 0)),
        "a chain without an end": put_endless,
        "a descriptor that does not exist": lambda: tx.offer(60000),
    }
    assert acts.keys() == set(BROKEN_RULES)
    acts[how]()


@pytest.mark.parametrize("how", BROKEN_RULES)
def test_a_driver_that_breaks_the_rules_breaks_its_own_device_only(
    driver: Driver, network: socket.socket, how: str
) -> None:
    break_rules(driver, how)
    network.send(NO_HEADER + payload(64))
    for queue in (RX, TX, CTRL):
        driver.kick(queue)
    wait_for(driver.broken, how)
    assert driver.get(reg.INTERRUPT_STATUS) & 2
    # A reset mends it, and the packet is still there for the driver that comes then.
    driver.set(reg.STATUS, 0)
    driver.set_up_anew()
    driver.offer(1)
    assert driver.rings[RX].wait_used() == [(0, 76)]


def test_the_second_buffer_of_a_packet_may_be_the_hostile_one(driver: Driver, network: socket.socket) -> None:
    driver.rings[RX].put((driver.buffer(), 1536, WRITE))
    driver.rings[RX].put((1 << 40, 1536, WRITE))
    driver.kick(RX)
    network.send(NO_HEADER + payload(2000))
    wait_for(driver.broken, "the device is broken")
    assert driver.rings[RX].nr_used() == 0


def test_a_packet_larger_than_any_is_dropped(driver: Driver, network: socket.socket) -> None:
    driver.rings[TX].put((0x100000, 4 << 20, 0))
    driver.send(NO_HEADER + payload(64))
    assert network.recv(1 << 16) == NO_HEADER + payload(64)
    # A packet is counted after it was sent, and before its buffer comes back.
    driver.rings[TX].wait_used(2)
    assert driver.net.statistics() == {"received": 0, "sent": 1, "dropped": 1}


# Moves


def test_a_move_in_the_middle_of_traffic_loses_no_packet_that_was_queued(
    driver: Driver, new_driver: Callable[..., Driver], network: socket.socket
) -> None:
    frames = [NO_HEADER + payload(300, at) for at in range(60)]
    arrived: list[bytes] = []
    driver.send(*frames[:30])
    driver.net.pause()
    before = driver.rings[TX].nr_used()
    # Queued while the device stands still, without a kick that anybody hears.
    driver.send(*frames[30:])
    body = driver.net.save()
    assert driver.rings[TX].nr_used() == before
    other = new_driver()
    other.net.load(body)
    other.net.resume()
    while len(arrived) < 60:
        packet = network.recv(1 << 16)
        if packet != NO_HEADER + RARP:
            arrived.append(packet)
    assert arrived == frames
    assert len(driver.rings[TX].wait_used(60)) == 60


def test_what_is_received_after_a_move_goes_on_in_the_next_buffer(
    driver: Driver, new_driver: Callable[..., Driver], network: socket.socket
) -> None:
    places = driver.offer(3)
    network.send(NO_HEADER + payload(100))
    driver.rings[RX].wait_used()
    driver.net.pause()
    other = new_driver()
    other.net.load(driver.net.save())
    other.net.resume()
    network.send(NO_HEADER + payload(200))
    assert driver.rings[RX].wait_used() == [(1, 212)]
    assert driver.memory.read(places[1], 212) == header(1) + payload(200)


def test_a_card_that_was_moved_is_announced_when_it_runs_and_only_then(
    driver: Driver, new_driver: Callable[..., Driver], network: socket.socket
) -> None:
    driver.net.pause()
    driver.net.resume()
    assert driver.status() == LINK_UP, "a pause is no move"
    driver.net.pause()
    other = new_driver()
    other.net.load(driver.net.save())
    assert other.status() == LINK_UP
    other.net.resume()
    assert other.status() == LINK_UP | ANNOUNCE
    assert network.recv(1 << 16) == NO_HEADER + RARP


def test_an_announcement_that_nobody_acknowledged_moves_along(
    driver: Driver, new_driver: Callable[..., Driver]
) -> None:
    driver.net.announce()
    driver.net.pause()
    other = new_driver()
    other.net.load(driver.net.save())
    assert other.status() == LINK_UP | ANNOUNCE
    other.net.reset()
    assert other.status() == LINK_UP


@pytest.mark.parametrize("change", [{"announce": 2}, {"announce": None}, {"more": 1}, {"status": 1 << 20}])
def test_a_state_that_cannot_be_changes_nothing(driver: Driver, change: dict[str, object]) -> None:
    driver.net.pause()
    body = driver.net.save()
    with pytest.raises(BadField):
        driver.net.load(body | change)
    assert driver.net.save() == body
    wrong: Any
    for wrong in (None, [], {key: value for key, value in body.items() if key != "announce"}):
        with pytest.raises(BadField):
            driver.net.load(wrong)
