"""kvmclock as a guest reads it (KVM msr.rst, MSR_KVM_SYSTEM_TIME_NEW), and a guest that does nothing but refresh it."""

from __future__ import annotations

import struct
from dataclasses import dataclass

from .tiny import TinyVm

PAGE = 0x20000
STAMP = 0x21000
SYSTEM_TIME_NEW = 0x4B564D01
ENABLED = 1
# loop: rdtsc; shl rdx, 32; or rax, rdx; mov [STAMP], rax; inc rcx; jmp loop: 64-bit
READS_TSC = "0f31 48c1e220 4809d0 4889042500100200 48ffc1 ebea"
_LAYOUT = struct.Struct("<IIQQIbB2x")


@dataclass(frozen=True, slots=True)
class PvClock:
    """The page of one vCPU."""

    version: int
    tsc_timestamp: int
    system_time: int
    mul: int
    shift: int

    @classmethod
    def read(cls, vm: TinyVm) -> PvClock:
        version, _, tsc, system, mul, shift, _ = _LAYOUT.unpack(vm.memory.read(PAGE, _LAYOUT.size))
        return cls(version, tsc, system, mul, shift)

    def at(self, tsc: int) -> int:
        """Nanoseconds at a value of the guest's TSC."""
        delta = tsc - self.tsc_timestamp
        delta = delta << self.shift if self.shift >= 0 else delta >> -self.shift
        return self.system_time + (delta * self.mul >> 32)


def with_kvmclock(vm: TinyVm) -> None:
    """A guest that reads its TSC for ever and has kvmclock on."""
    vm.long_mode_ring3(READS_TSC)
    assert not vm.cpu.set_msrs({SYSTEM_TIME_NEW: PAGE | ENABLED})


def guest_clock_ns(vm: TinyVm) -> int:
    """The latest time that a parked guest of :func:`with_kvmclock` has seen."""
    [stamp] = struct.unpack("<Q", vm.memory.read(STAMP, 8))
    return PvClock.read(vm).at(stamp)
