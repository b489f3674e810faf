"""What a guest's firmware tables tell of the machine beside its memory, as plain values."""

from __future__ import annotations

from ..record import dataclass


@dataclass(frozen=True, slots=True)
class VirtioSlot:
    """Where one virtio-mmio device is: its registers at ``gpa`` and the line ``gsi`` of the IOAPIC."""

    gpa: int
    size_bytes: int
    gsi: int


@dataclass(frozen=True, slots=True)
class Hardware:
    """``nr_cpus`` vCPUs with APIC ids from 0 on, the virtio devices in the order of their numbers, and the 16 bytes by
    which a guest tells one run of a machine's past from another."""

    nr_cpus: int = 1
    virtio: tuple[VirtioSlot, ...] = ()
    generation: bytes = bytes(16)
