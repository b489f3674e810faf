"""The thread that sends what a guest writes: it is not to wait for a vCPU that never sleeps."""

from __future__ import annotations

import ctypes
import os
import struct
import threading

from kvmigrate._core import lib
from kvmigrate.devices.serial import SEND_SLICE_NS

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
