"""A VM that is there before its guest: what is the same for every guest takes the kernel a millisecond, in which
somebody waits. Without memory, and with a first vCPU that has no CPUID yet."""

from __future__ import annotations

import threading

from ..kvm.system import System
from ..kvm.vm import Vm

_lock = threading.Lock()
_spare: list[Vm] = []


def set_aside() -> None:
    """Have one ready for the next machine of this process, while nobody waits. Idempotent; raises
    :class:`HostError`."""
    with _lock:
        if not _spare:
            vm = _create()
            try:
                furnish(vm)
            except BaseException:
                vm.close()
                raise
            _spare.append(vm)


def take() -> Vm:
    """The one that was set aside, or a new one, which has no vCPU: :func:`furnish` it once it has memory. Raises
    :class:`HostError`."""
    with _lock:
        if _spare:
            return _spare.pop()
    return _create()


def _create() -> Vm:
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
