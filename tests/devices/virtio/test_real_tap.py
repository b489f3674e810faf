"""A network card before a real tap, in a network namespace of its own; skipped where the process may not make one."""

from __future__ import annotations

import ctypes
import fcntl
import os
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

import pytest

from kvmigrate.devices.tap import TUNSETIFF, open_tap
from kvmigrate.devices.virtio.net import F_GUEST_CSUM, F_GUEST_TSO4, F_GUEST_TSO6, FEATURES
from kvmigrate.errors import HostError
from kvmigrate.memory.region import GuestMemory

from .queues import MAC, MEMORY_BYTES, NO_HEADER, RX, WAIT_S, Driver, wait_for

CLONE_NEWNET = 0x40000000
TAP = "kmigtap0"
HOST_IP, GUEST_IP = bytes((10, 9, 8, 1)), bytes((10, 9, 8, 2))
UDP_PORT = 4242
NEEDS_CSUM = 1
Result = TypeVar("Result")


class Namespace:
    """A network namespace that one thread lives in; :meth:`run` has it do something."""

    def __init__(self) -> None:
        self._todo: Callable[[], object] | None = None
        self._result: list[object] = []
        self._asked, self._done = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._live, daemon=True)
        self._thread.start()
        if self.run(lambda: ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNET)):
            self.close()
            pytest.skip("this process may not make a network namespace")

    def _live(self) -> None:
        while self._asked.wait() and self._todo is not None:
            self._asked.clear()
            try:
                self._result.append(self._todo())
            except BaseException as error:
                self._result.append(error)
            self._done.set()

    def run(self, do: Callable[[], Result]) -> Result:
        """What ``do`` returns, or raises, in the namespace."""
        self._todo = do
        self._asked.set()
        assert self._done.wait(WAIT_S)
        self._done.clear()
        result = self._result.pop()
        if isinstance(result, BaseException):
            raise result
        return result  # type: ignore[return-value]

    def ip(self, *arguments: str) -> None:
        self.run(lambda: subprocess.run(["ip", *arguments], check=True, capture_output=True))

    def close(self) -> None:
        self._todo = None
        self._asked.set()
        self._thread.join()


@pytest.fixture
def namespace() -> Iterator[Namespace]:
    namespace = Namespace()
    yield namespace
    namespace.close()


@pytest.fixture
def tap(namespace: Namespace) -> Iterator[int]:
    """A tap that is up, has an address, and knows the guest's."""
    try:
        namespace.ip("tuntap", "add", TAP, "mode", "tap")
    except subprocess.CalledProcessError as error:
        pytest.skip(str(error.stderr))
    fd = namespace.run(lambda: open_tap(TAP))
    namespace.ip("address", "add", "10.9.8.1/24", "dev", TAP)
    namespace.ip("link", "set", TAP, "up")
    namespace.ip("neighbour", "add", "10.9.8.2", "lladdr", MAC.hex(":"), "dev", TAP)
    yield fd
    os.close(fd)


@pytest.fixture
def new_driver(tap: int) -> Iterator[Callable[..., Driver]]:
    drivers: list[Driver] = []
    with GuestMemory(MEMORY_BYTES) as memory:

        def make(features: int = FEATURES) -> Driver:
            drivers.append(Driver(memory, tap, features))
            drivers[-1].set_up()
            return drivers[-1]

        yield make
        for driver in drivers:
            driver.net.close()


def received(driver: Driver, places: list[int], wanted: Callable[[bytes], bool]) -> bytes:
    """The next packet that is ``wanted``, of those that come into one buffer each."""
    while True:
        ((head, written),) = driver.rings[RX].wait_used()
        packet = driver.memory.read(places[head], written)
        if wanted(packet[12:]):
            return packet


def is_udp(frame: bytes) -> bool:
    return frame[12:14] == b"\x08\x00" and frame[23] == socket.IPPROTO_UDP


def host_sends(namespace: Namespace, data: bytes) -> None:
    with namespace.run(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as sender:
        sender.sendto(data, ("10.9.8.2", UDP_PORT))


def test_the_host_answers_what_the_guest_asks(new_driver: Callable[..., Driver]) -> None:
    driver = new_driver()
    places = driver.offer(32)
    who_has = struct.pack(">HHBBH", 1, 0x0800, 6, 4, 1) + MAC + GUEST_IP + bytes(6) + HOST_IP
    driver.send(NO_HEADER + b"\xff" * 6 + MAC + b"\x08\x06" + who_has + bytes(18))
    answer = received(driver, places, lambda frame: frame[12:14] == b"\x08\x06")
    assert answer[12:18] == MAC and answer[12 + 20 : 12 + 22] == b"\x00\x02"
    assert answer[12 + 28 : 12 + 32] == HOST_IP


def test_a_driver_that_takes_unfinished_checksums_gets_them(
    new_driver: Callable[..., Driver], namespace: Namespace
) -> None:
    driver = new_driver()
    places = driver.offer(32)
    # The device's thread tells the tap, when it comes to run; what the host sends before is finished.
    for _ in range(20):
        host_sends(namespace, b"hello guest")
        packet = received(driver, places, is_udp)
        assert packet.endswith(b"hello guest")
        if packet[0] & NEEDS_CSUM:
            break
        time.sleep(0.05)
    assert packet[0] & NEEDS_CSUM


def test_a_driver_that_takes_none_gets_finished_ones(new_driver: Callable[..., Driver], namespace: Namespace) -> None:
    driver = new_driver(FEATURES & ~(F_GUEST_CSUM | F_GUEST_TSO4 | F_GUEST_TSO6))
    places = driver.offer(32)
    host_sends(namespace, b"hello guest")
    packet = received(driver, places, is_udp)
    assert not packet[0] & NEEDS_CSUM
    assert packet.endswith(b"hello guest")


def test_a_tap_that_another_has_open_is_busy(tap: int, namespace: Namespace) -> None:
    with pytest.raises(HostError, match="in use by another VM"):
        namespace.run(lambda: open_tap(TAP))


def test_a_tap_that_does_not_exist_is_not_made(namespace: Namespace) -> None:
    with pytest.raises(
        HostError, match=r"tap none: .*it does not exist: create it with ip tuntap add dev none mode tap"
    ):
        namespace.run(lambda: open_tap("none"))
    assert "none" not in names(namespace)


def names(namespace: Namespace) -> list[str]:
    """The interfaces in ``namespace``."""
    return [name for _, name in namespace.run(socket.if_nameindex)]


def test_a_tap_that_goes_away_while_it_is_opened_is_not_made_again(
    tap: int, namespace: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tap is deleted between the look and the opening, in which the kernel makes another one."""
    real = fcntl.ioctl

    def delete_first(fd: int, request: int, argument: bytes) -> object:
        if request == TUNSETIFF:
            subprocess.run(["ip", "link", "delete", TAP], check=True)
        return real(fd, request, argument)

    monkeypatch.setattr(fcntl, "ioctl", delete_first)
    with pytest.raises(HostError, match="it does not exist"):
        namespace.run(lambda: open_tap(TAP))
    assert TAP not in names(namespace)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("tuntap", "add", "it", "mode", "tap", "multi_queue"), "it has several queues: delete it"),
        (("tuntap", "add", "it", "mode", "tun"), "the interface of that name is no tap"),
        (("link", "add", "it", "type", "bridge"), "the interface of that name is no tap"),
    ],
)
def test_an_interface_that_is_no_tap_of_one_queue_is_refused_by_what_it_is(
    namespace: Namespace, arguments: tuple[str, ...], says: str
) -> None:
    try:
        namespace.ip(*arguments)
    except subprocess.CalledProcessError as error:
        pytest.skip(str(error.stderr))
    with pytest.raises(HostError, match=rf"tap it: .*{says}"):
        namespace.run(lambda: open_tap("it"))


def test_an_interface_that_the_kernel_always_has_is_no_tap(namespace: Namespace) -> None:
    with pytest.raises(HostError, match=r"tap lo: .*is no tap"):
        namespace.run(lambda: open_tap("lo"))


def test_an_interface_that_is_deleted_is_a_cable_that_is_pulled(
    new_driver: Callable[..., Driver], namespace: Namespace
) -> None:
    driver = new_driver()
    driver.offer(4)
    namespace.ip("link", "delete", TAP)
    wait_for(lambda: driver.status() == 0, "the link goes down")
