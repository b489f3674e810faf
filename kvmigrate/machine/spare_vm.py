"""A VM that is there before its guest: what is the same for every guest takes the kernel a millisecond, in which
somebody waits. Without memory, and with a first vCPU that has no CPUID yet."""

from __future__ import annotations

import threading
import time

from ..kvm.system import System
from ..kvm.vm import Vm
from ..record import dataclass

RESTS_FOR_S = 0.01
"""A memory slot waits until no reader is left of what the interrupt chips have replaced (SRCU, virt/kvm): right after
those it took 6 ms, 4 ms later 3, and from 8 ms on the 0.1 ms that it takes without them (measured)."""

_lock = threading.Lock()


@dataclass(frozen=True, slots=True)
class _Spare:
    vm: Vm
    rested_at: float
    """In seconds of the monotonic clock."""


_spare: list[_Spare] = []


def set_aside() -> None:
    """Have one ready for the next machine of this process, while nobody waits. Idempotent; raises
    :class:`HostError`."""
    with _lock:
        if not _spare:
            vm = create()
            try:
                furnish(vm)
            except BaseException:
                vm.close()
                raise
            _spare.append(_Spare(vm, time.monotonic() + RESTS_FOR_S))


def wait_until_rested() -> None:
    """Return once the one that was set aside, if there is one, has rested: :func:`take` leaves it alone before."""
    with _lock:
        left_s = max((spare.rested_at - time.monotonic() for spare in _spare), default=0.0)
    time.sleep(max(left_s, 0.0))


def take() -> Vm:
    """The one that was set aside, or as :func:`create`. Raises :class:`HostError`."""
    with _lock:
        if _spare and time.monotonic() >= _spare[0].rested_at:
            return _spare.pop().vm
    return create()


def create() -> Vm:
    """A new one, without a vCPU: :func:`furnish` it once it has memory. Raises :class:`HostError`."""
    with System.open() as system:
        return system.create_vm()


def furnish(vm: Vm) -> None:
    """Give it its interrupt chips, its timer and the first vCPU. Raises :class:`HostError`.

    The addresses and the interrupt chips come before the first vCPU (KVM api.rst, KVM_SET_IDENTITY_MAP_ADDR and
    KVM_CREATE_IRQCHIP), since a vCPU gets its local APIC when it is created."""
    vm.set_tss_addr()
    vm.set_identity_map_addr()
    vm.create_irqchip()
    vm.create_pit()
    vm.add_vcpu(0)
