"""What a machine is built on, a VM and its memory, which may be there before the guest.

What is the same for every guest takes the kernel a millisecond, in which somebody would wait; and room for what it is
to know of each page of memory half a millisecond more for each gibibyte.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import ExitStack

from ..kvm.system import System
from ..kvm.vm import Vm
from ..memory.region import GuestMemory
from ..record import dataclass

RESTS_FOR_S = 0.01
"""A memory slot waits until no reader is left of what the interrupt chips have replaced (SRCU, virt/kvm): right after
those it took 6 ms, 4 ms later 3, and from 8 ms on the 0.1 ms that it takes without them (measured)."""

_lock = threading.Lock()


@dataclass(frozen=True, slots=True)
class Base:
    """A VM and the memory that it is to have, or has already when it ``is_attached``. One without vCPUs is to be
    furnished by :func:`furnish`, after its memory was attached."""

    memory: GuestMemory
    vm: Vm
    is_attached: bool = False


@dataclass(frozen=True, slots=True)
class _Spare:
    vm: Vm
    memory: GuestMemory | None
    """Attached, if it has any."""
    rested_at: float
    """In seconds of the monotonic clock."""

    @property
    def memory_bytes(self) -> int:
        return self.memory.size_bytes if self.memory is not None else 0

    def fits(self, memory_bytes: int, *, is_anonymous: bool) -> bool:
        """For a machine with so much memory."""
        return not self.memory_bytes or (is_anonymous and self.memory_bytes == memory_bytes)

    def close(self) -> None:
        self.vm.close()
        if self.memory is not None:
            self.memory.close()


_spare: list[_Spare] = []


def set_aside(memory_bytes: int = 0) -> None:
    """Have a VM ready for the next machine of this process, with its memory if that will be anonymous and its size is
    known. Idempotent: another size takes the place of the one before. Raises :class:`HostError` and
    :class:`ConfigError`."""
    with _lock:
        if _spare and _spare[0].memory_bytes != memory_bytes:
            _spare.pop().close()
        if not _spare:
            _spare.append(_made(memory_bytes))


def _made(memory_bytes: int) -> _Spare:
    with ExitStack() as undo:
        memory = undo.enter_context(GuestMemory(memory_bytes)) if memory_bytes else None
        vm = undo.enter_context(_create_vm())
        if memory is not None:
            memory.attach(vm.fd)
        furnish(vm)
        undo.pop_all()
    return _Spare(vm, memory, time.monotonic() + RESTS_FOR_S)


def wait_until_rested() -> None:
    """Return once the one that was set aside, if there is one, has rested: :func:`take` leaves it alone before."""
    with _lock:
        left_s = max((spare.rested_at - time.monotonic() for spare in _spare), default=0.0)
    time.sleep(max(left_s, 0.0))


def take(memory_bytes: int, make_memory: Callable[[int], GuestMemory] | None = None) -> Base:
    """What was set aside, if it fits, or as :func:`create`. Memory is anonymous without ``make_memory``. Raises
    :class:`HostError` and :class:`ConfigError`."""
    with _lock:
        can = _spare and time.monotonic() >= _spare[0].rested_at
        spare = _spare.pop() if can and _spare[0].fits(memory_bytes, is_anonymous=make_memory is None) else None
    if spare is None:
        return create(memory_bytes, make_memory or GuestMemory)
    if spare.memory is not None:
        return Base(spare.memory, spare.vm, is_attached=True)
    try:
        return Base((make_memory or GuestMemory)(memory_bytes), spare.vm)
    except BaseException:
        spare.close()
        raise


def create(memory_bytes: int, make_memory: Callable[[int], GuestMemory] = GuestMemory) -> Base:
    """A new one. Raises :class:`HostError` and :class:`ConfigError`."""
    memory = make_memory(memory_bytes)
    try:
        return Base(memory, _create_vm())
    except BaseException:
        memory.close()
        raise


def _create_vm() -> Vm:
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
