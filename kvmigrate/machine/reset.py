"""A machine reset in place: the state that its parts had before it ever ran, set again, and its image loaded again.

A reset that the guest has asked for and that was not carried out before the machine was saved travels as a section of
its own, which there is only then.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..config import BootConfig
from ..devices.end import GuestEnd
from ..errors import BadField, ConfigError
from ..kvm.vm_state import leave_modes, load_state
from ..record import dataclass
from ..state.section import Section, Value, require_version, unpack
from .boot_source import BootSource
from .generation import new_generation_id, read_generation
from .loading import load_image
from .platform import Platform
from .sections import kernel_names

if TYPE_CHECKING:
    from ..boot import BootFiles

SECTION, VERSION = "reset", 1


@dataclass(frozen=True, slots=True)
class Boot:
    """What a guest boots, read and found to be the same as ever."""

    config: BootConfig
    files: BootFiles


class PowerOn:
    """The state of ``platform``, of which no vCPU has run and nothing has been loaded, kept for :meth:`restore`, which
    boots ``source`` anew. ``new`` is that state as sections."""

    def __init__(self, platform: Platform, source: BootSource | None, new: Sequence[Section]) -> None:
        self._platform = platform
        self._source = source
        bodies = {section.name: section.packed for section in new}
        self._vm, *self._vcpus = (bodies[name] for name in kernel_names(len(platform.vm.vcpus)))
        self._cpuids = [vcpu.cpuid for vcpu in platform.vm.vcpus]

    def read(self) -> Boot:
        """What the guest boots, for :meth:`restore`; the guest may run. Raises :class:`ConfigError` when it is not here
        or not the same any more."""
        if self._source is None:
            raise ConfigError("it came here without word of what it was booted from")
        return Boot(self._source.config, self._source.read(self._platform.memory.size_bytes))

    def restore(self, boot: Boot) -> None:
        """Reset everything and boot anew. All vCPUs are parked and all devices paused, and stay so.

        Raises a :class:`KvmigrateError`; then the machine must not run any more."""
        memory = self._platform.memory
        generation = read_generation(memory) or new_generation_id()
        # Devices first, for they let go of their interrupt lines, which the chips would take down.
        for device in self._platform.devices.values():
            device.reset()
        bodies = [unpack(body, "a vCPU") for body in self._vcpus]
        leave_modes(self._platform.vm, bodies)
        self._load(bodies)
        # Memory after the vCPUs: until its MSRs say otherwise, the kernel writes into the guest's memory that one is
        # preempted, whenever it leaves it (Linux, kvm_steal_time_set_preempted).
        memory.clear()
        load_image(self._platform, boot.config, boot.files, generation)

    def _load(self, bodies: Sequence[Value]) -> None:
        vm = self._platform.vm
        # The rate is the guest's own, of the host on which it began, and CPUID tells of it.
        timed = [body | {"tsc_khz": vcpu.get_tsc_khz()} for vcpu, body in zip(vm.vcpus, bodies, strict=True)]
        load_state(vm, self._vm, timed, self._cpuids).require()


def pending_section() -> Section:
    """Says to the destination that the guest is to be reset before it runs."""
    return Section(SECTION, VERSION, {})


def take_pending(sections: Sequence[Section]) -> tuple[GuestEnd | None, list[Section]]:
    """The reset that ``sections`` tell of, and the others. Raises :class:`StreamError`."""
    found = [section for section in sections if section.name == SECTION]
    for section in found:
        require_version(section, VERSION)
        if section.body or len(found) > 1:
            raise BadField(f"section {SECTION} comes twice, or has fields of which this kvmigrate knows nothing")
    pending = GuestEnd.reset("before it came here") if found else None
    return pending, [section for section in sections if section.name != SECTION]
