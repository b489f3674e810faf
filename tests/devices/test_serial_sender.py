"""The thread that sends what a guest writes, and the first byte after a silence, which does not wait for it."""

from __future__ import annotations

import ctypes
import os
import struct
import threading
import time
from collections.abc import Iterator

import pytest

from kvmigrate._core import lib
from kvmigrate.devices.serial import DATA, SEND_SLICE_NS, Serial
from kvmigrate.devices.tee import Tee

from .conftest import Line, wait_until

SYS_SCHED_GETATTR = 315
ATTRIBUTES = struct.Struct("<IIQiIQQQ")
"""``struct sched_attr`` (sched_setattr(2)): size, policy, flags, nice, priority, runtime, deadline, period."""
KERNEL = tuple(int(word) for word in os.uname().release.split(".")[:2])
HAS_SLICES = KERNEL >= (6, 12)


def slice_ns(thread_id: int) -> int:
    """The slice that a thread has asked for; 0 for none, or from a kernel that has no such thing."""
    room = ctypes.create_string_buffer(ATTRIBUTES.size)
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.syscall(SYS_SCHED_GETATTR, thread_id, room, ATTRIBUTES.size, 0) == 0, os.strerror(ctypes.get_errno())
    _, policy, _, nice, *_ = found = ATTRIBUTES.unpack(room.raw)
    assert (policy, nice) == (os.SCHED_OTHER, os.getpriority(os.PRIO_PROCESS, thread_id))
    return int(found[5])


def test_the_sender_has_the_shortest_slice_that_there_is(line: Line) -> None:
    line.uart.start()
    thread = line.uart._thread
    assert thread is not None
    wanted = SEND_SLICE_NS if HAS_SLICES else 0
    wait_until(lambda: slice_ns(thread.native_id) == wanted, "its slice")
    assert not HAS_SLICES or slice_ns(threading.get_native_id()) != wanted, "whoever starts it keeps its own"
    line.uart.close()


def test_a_thread_of_another_policy_is_left_as_it_is() -> None:
    found: list[int] = []

    def batch() -> None:
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
        found.append(lib.kmig_thread_slice(SEND_SLICE_NS))
        found.append(os.sched_getscheduler(0))

    thread = threading.Thread(target=batch)
    thread.start()
    thread.join()
    assert found == [0, os.SCHED_BATCH]


class Heard:
    """A listener that keeps what it hears."""

    def __init__(self) -> None:
        self.data = bytearray()

    def heard(self, data: bytes) -> None:
        self.data += data

    def wake(self) -> None:
        return


@pytest.fixture
def silent(line: Line) -> Iterator[Line]:
    """One whose sender sleeps: while the lock of its backend is held it sends a byte that the guest writes."""
    line.uart.start()

    def sleeps() -> bool:
        with line.uart._changed:
            guest_writes(line.uart, b"?")
            at_once = line.there_already() == b"?"
        if not at_once:
            assert line.received(1) == b"?"
        wait_until(lambda: not line.uart._nr_waiting(), "the sender has taken it")
        return at_once

    wait_until(sleeps, "the sender sleeps")
    time.sleep(0.05)
    yield line
    line.uart.close()


def guest_writes(uart: Serial, data: bytes) -> None:
    """As a vCPU does, without the interpreter."""
    for byte in data:
        lib.kmig_uart_write(uart.handle, DATA, byte)


def test_the_first_byte_after_a_silence_waits_for_nobody_and_the_rest_comes_behind_it(silent: Line) -> None:
    with silent.uart._changed:
        guest_writes(silent.uart, b"abc")
        assert silent.received(1) == b"a"
        assert silent.nothing_more()
    assert silent.received(2) == b"bc"
    wait_until(lambda: not silent.uart._nr_waiting(), "all is sent")
    assert silent.nothing_more()


def test_what_has_left_is_not_in_the_state(silent: Line) -> None:
    with silent.uart._changed:
        guest_writes(silent.uart, b"abc")
        assert silent.received(1) == b"a"
        assert silent.uart.save()["tx"] == b"bc"


def test_whoever_listens_hears_each_byte_once(silent: Line) -> None:
    listener, tee = Heard(), Tee(silent.backend)
    tee.listen(listener)
    silent.uart._backend = tee
    with silent.uart._changed:
        guest_writes(silent.uart, b"abc")
        assert silent.received(1) == b"a"
    assert silent.received(2) == b"bc"
    wait_until(lambda: not silent.uart._nr_waiting(), "all is sent")
    assert listener.data == b"abc"


def test_a_paused_uart_sends_nothing(silent: Line) -> None:
    silent.uart.pause()
    guest_writes(silent.uart, b"abc")
    assert silent.nothing_more()
    assert silent.uart.save()["tx"] == b"abc"


def test_nothing_is_lost_where_nobody_reads(silent: Line) -> None:
    sent = bytearray()
    silent.peer.setblocking(False)
    while not lib.kmig_uart_is_full(silent.uart.handle):
        sent.append(len(sent) % 251)
        guest_writes(silent.uart, bytes(sent[-1:]))
        # Slow enough that each byte is the first one after a silence, as long as there is room for it.
        if not len(sent) % 64:
            time.sleep(0.001)
    silent.peer.settimeout(10.0)
    assert silent.received(len(sent)) == sent
    wait_until(lambda: not silent.uart._nr_waiting(), "all is sent")
    assert silent.nothing_more()
