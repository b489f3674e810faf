"""kvmclock and the time stamp counter across a move: one base for the whole VM.

Policy: the guest's time stands still while it is stopped. kvmclock goes on from the saved value, and the guest's TSC
with it, so that both agree and no timer sees a jump. Counting the downtime is for who asks for it, since it makes
monotonic time jump (Firecracker #5809), and needs both hosts' real-time clocks to agree (KVM api.rst, KVM_SET_CLOCK).

The TSC is moved by KVM_VCPU_TSC_OFFSET and not by writing its MSR: vCPUs that are written one after another get
different offsets (Cloud Hypervisor 993ac5c90), and older kernels take a write within a second of the last for an
attempt to synchronise (Linux bf328e22e472). The formula is step 6 of Documentation/virt/kvm/devices/vcpu.rst::

    offset_here = offset_there - (kvmclock_there - kvmclock_here) × khz / 10⁶ + (host_tsc_there - host_tsc_here)
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from .._core import lib
from ..errors import BadField
from ..record import dataclass, replace
from ..state.fidelity import Fidelity

_GOES_ON = "kvmclock goes on from the saved value"
_MAX_CLOCK_NS = 1 << 62
_TOLERANCE_NS = 1_000_000_000
_FLAGS: int = lib.KVM_CLOCK_TSC_STABLE | lib.KVM_CLOCK_REALTIME | lib.KVM_CLOCK_HOST_TSC


@dataclass(frozen=True, slots=True)
class ClockBase:
    """One instant on both hosts: kvmclock in ns and host TSC in cycles, at the save and after the load. ``ahead`` are
    cycles by which every vCPU's TSC is moved on, so that none goes back."""

    saved_clock_ns: int
    saved_host_tsc: int
    clock_ns: int
    host_tsc: int
    ahead: int = 0

    def moved_offset(self, offset: int, tsc_khz: int) -> int:
        """The TSC offset here of a vCPU that had ``offset`` there, modulo 2**64."""
        return (offset + self.elapsed(tsc_khz) + self.ahead + self.saved_host_tsc - self.host_tsc) % (1 << 64)

    def elapsed(self, tsc_khz: int) -> int:
        """The cycles of a guest's TSC between both."""
        return (self.clock_ns - self.saved_clock_ns) * tsc_khz // 1_000_000

    def not_back(self, offset: int, value: int, tsc_khz: int) -> ClockBase:
        """For a source whose TSC is unstable: there KVM sets a vCPU's offset anew at every ioctl, so that its TSC goes
        on from the guest's last exit (Linux, kvm_arch_vcpu_load), and an offset that was read after the clock makes
        less of the TSC than the guest has seen. ``value`` is that vCPU's own. All vCPUs are moved by the same, which
        keeps the distance of those that had one offset."""
        back = (value - offset - self.saved_host_tsc) % (1 << 64)
        # More than a second is no such lag but an offset that says nothing of the TSC.
        return replace(self, ahead=back) if self.ahead < back <= tsc_khz * 1000 else self


def complete(clock: Any) -> int:
    """Add to a ``struct kvm_clock_data *`` that KVM_GET_CLOCK has just filled what KVM gave none of: the real time.
    Returns the host's TSC at that instant."""
    if not clock.flags & lib.KVM_CLOCK_REALTIME:
        clock.realtime = time.time_ns()
    return host_tsc_of(clock)


def host_tsc_of(clock: Any) -> int:
    """The host's TSC when KVM_GET_CLOCK filled ``clock``: as KVM tells it, or now."""
    return int(clock.host_tsc) if clock.flags & lib.KVM_CLOCK_HOST_TSC else lib.kmig_host_tsc()


@dataclass(frozen=True, slots=True)
class ParsedClock:
    """A saved clock that was checked: kvmclock and the real time in ns, and the source's host TSC at that instant in
    cycles. ``stable`` says whether KVM derived kvmclock from a TSC that all vCPUs have in common."""

    clock_ns: int
    realtime_ns: int
    host_tsc: int
    stable: bool


def parse_clock(clock: Any, host_tsc: int, where: str) -> ParsedClock:
    """Check a saved ``struct kvm_clock_data *``, which is hostile. Raises :class:`BadField`."""
    clock_ns, flags = int(clock.clock), int(clock.flags)
    if clock_ns > _MAX_CLOCK_NS or flags > _FLAGS:
        raise BadField(f"{where}: clock is {clock_ns} and flags {flags:#x}, which no KVM has")
    return ParsedClock(clock_ns, int(clock.realtime), host_tsc, bool(flags & lib.KVM_CLOCK_TSC_STABLE))


def load_clock(
    set_clock: Callable[[int], Any], saved: ParsedClock, fidelity: Fidelity, *, count_downtime: bool = False
) -> ClockBase:
    """Set kvmclock and take the base for every vCPU's TSC. Before any vCPU's state, and before any runs. ``set_clock``
    sets it to so many ns and returns what it then is, a ``struct kvm_clock_data *``.

    ``count_downtime`` adds the time since the save as the real-time clocks tell it; where they do not tell, that is
    refused. It is added here and not by KVM_SET_CLOCK, which knows KVM_CLOCK_REALTIME since Linux 5.16 only."""
    wanted_ns = saved.clock_ns + (_away_ns(saved, fidelity) if count_downtime else 0)
    now = set_clock(wanted_ns)
    now_ns, host_tsc = int(now.clock), host_tsc_of(now)
    _judge(saved.clock_ns, wanted_ns, now_ns, fidelity)
    return ClockBase(saved.clock_ns, saved.host_tsc, now_ns, host_tsc)


def _away_ns(clock: ParsedClock, fidelity: Fidelity) -> int:
    """How long ago the save was, as this host's real-time clock tells."""
    saved_ns, here_ns = clock.realtime_ns, time.time_ns()
    if not saved_ns:
        fidelity.refused("clock.realtime", None, here_ns, "the save has no real time to count from: --clock continue")
    elif here_ns < saved_ns:
        fidelity.refused("clock.realtime", saved_ns, here_ns, "this host's clock is behind the save: --clock continue")
    elif clock.clock_ns + here_ns - saved_ns > _MAX_CLOCK_NS:
        fidelity.refused("clock.realtime", saved_ns, here_ns, "no guest is so long away: --clock continue")
    else:
        return int(here_ns - saved_ns)
    return 0


def _judge(saved_ns: int, wanted_ns: int, held_ns: int, fidelity: Fidelity) -> None:
    if not 0 <= held_ns - wanted_ns <= _TOLERANCE_NS:
        fidelity.refused("clock.clock", wanted_ns, held_ns, "kvmclock did not take the value")
    else:
        why = _GOES_ON if wanted_ns == saved_ns else "the time since the save is counted, as asked for"
        fidelity.adjusted("clock.clock", saved_ns, held_ns, why)
