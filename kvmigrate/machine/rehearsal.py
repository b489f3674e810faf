"""Going once through what save and load do in the blackout, while no guest waits for it."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import cache

from ..config import MIN_MEMORY_BYTES
from ..kvm.cpuid import guest_cpuid
from ..kvm.system import System
from ..state.section import decode_well_formed, encode
from .cpus import PAUSE_TIMEOUT_MS
from .platform import Platform
from .sections import load_sections, save_sections

_lock = threading.Lock()


@cache
def rehearse() -> None:
    """Save a machine of one vCPU and load it again, once per process: the first time takes twice as long as the second
    (measured: 3.4 ms instead of 1.8 ms for the load). About 20 ms; raises :class:`HostError`."""
    rehearse_load()


def rehearse_load() -> None:
    """Load it each time, which takes no longer for a guest of many vCPUs."""
    with _lock:
        load_own(_scratch(), _scratch_state())


def warm_up() -> None:
    """Let it go on, park and save it each time: what is done next is still in the processor's caches then. Half a
    millisecond, once :func:`rehearse` was called."""
    with _lock:
        _go_on_and_park()
        for section in save_sections(_scratch()):
            encode(section)


def warm_up_resume() -> None:
    """Let it go on and stand still again: its vCPUs have no threads."""
    with _lock:
        _go_on_and_park()


def _go_on_and_park() -> None:
    scratch = _scratch()
    scratch.let_go()
    scratch.park(PAUSE_TIMEOUT_MS)


def load_own(platform: Platform, saved: Sequence[bytes]) -> None:
    """Load the state of ``platform`` itself, which is in ``saved`` as it goes over the wire."""
    load_sections(platform, [decode_well_formed(section) for section in saved])


@cache
def _scratch_state() -> Sequence[bytes]:
    return [encode(section) for section in save_sections(_scratch())]


@cache
def _scratch() -> Platform:
    """A machine that never runs; it lives as long as the process."""
    with System.open() as system:
        table = guest_cpuid(system.supported_cpuid(), 0, 1)
    scratch = Platform(MIN_MEMORY_BYTES, [table], "null", lambda _: None)
    # As of a guest that comes from elsewhere, whose CPUID is what a kernel made of it.
    scratch.cpuid = scratch.held_cpuid()
    return scratch
