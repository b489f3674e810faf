"""An image in guest memory, and the first vCPU at its start: when a machine is made, and at each reset."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..config import BootConfig
from ..devices.virtio.transport import WINDOW_BYTES
from .entry import set_entry
from .platform import Platform
from .virtio import slot_of

if TYPE_CHECKING:
    from ..boot import BootFiles


def load_image(platform: Platform, config: BootConfig, files: BootFiles, generation: bytes) -> None:
    """Load ``files`` as ``config`` says into memory that is all zero; ``generation`` is for guests with ACPI tables.
    The vCPUs are as after power-on. Raises :class:`ConfigError` for an image that cannot be booted."""
    # Not at the top: a machine that is restored or received does without, and should not wait for it.
    from ..boot import Hardware, VirtioSlot, load_boot

    memory = platform.memory
    places = [slot_of(number) for number in range(len(platform.virtio.devices))]
    slots = tuple(VirtioSlot(gpa, WINDOW_BYTES, gsi) for gpa, gsi in places)
    hardware = Hardware(len(platform.vm.vcpus), slots, generation)
    entry = load_boot(memory, config, memory.size_bytes, hardware, files)
    set_entry(platform.vm.vcpus[0], entry)
