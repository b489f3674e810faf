"""What would become of a guest here: a machine that is built and loaded with the guest's state, and thrown away.

It has the guest's memory, which nobody touches, its vCPUs and its devices, but never runs. Behind its devices is
nothing that another may need: images are opened for reading and not locked, taps are looked at and not opened.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from ..config import DiskConfig, HostSide, MemoryBackend
from ..devices.tap import tap_problem
from ..devices.virtio.image import SECTOR_BYTES, DiskImage, open_disk
from ..errors import ConfigError, HostError
from ..kvm.cpuid import compare_cpuid
from ..kvm.system import System
from ..memory import huge
from ..state.fidelity import Fidelity
from ..state.section import Section, Value
from .description import Description
from .platform import Platform
from .room import judge_room
from .sections import refusing, try_sections
from .specs import VirtioSpec
from .virtio import Backings


class TrialMachine:
    """Implements :class:`kvmigrate.contract.Trial`. What is wrong with the images and taps is found too."""

    def __init__(
        self,
        description: Description,
        *,
        touched_bytes: int = 0,
        backend: MemoryBackend = MemoryBackend.ANONYMOUS,
    ) -> None:
        self._found = Fidelity()
        self._touched_bytes = touched_bytes
        self._backend = backend
        self._platform: Platform | None = None
        self._missing = {
            spec.name: problem for spec in description.virtio if (problem := part_problem(spec, self._found))
        }
        if backend is MemoryBackend.HUGETLBFS:
            with refusing(self._found, "memory"):
                huge.require(description.memory_bytes, held_bytes=touched_bytes)
        with refusing(self._found, "machine"):
            self._platform = self._build(description)

    @classmethod
    def examine(cls, value: Mapping[str, Value], here: HostSide, *, touched_bytes: int = 0) -> TrialMachine:
        """A trial of the machine that :meth:`Machine.build` would make of the same. Raises :class:`BadField`, and
        :class:`ConfigError` for a device ``here`` that the guest does not have or memory that no host here has.
        ``touched_bytes`` of memory are in use here for the guest already."""
        description = Description.from_value(value).on(here)
        # Whatever listens at the other end of a console, as of the serial port, is not bothered by a trial.
        return cls(description.on(HostSide()), touched_bytes=touched_bytes, backend=here.memory_backend)

    def _build(self, description: Description) -> Platform:
        # Of anonymous memory: nobody touches it, and huge pages would be set aside twice.
        backings = Backings(_stand_in_disk, _stand_in_tap)
        try:
            platform = Platform(
                description.memory_bytes, description.cpuid, "null", lambda _: None, description.virtio, backings
            )
        except HostError:
            # It may be the CPUID that the kernel did not take: then say which of it.
            with System.open() as system:
                supported = system.supported_cpuid()
            for number, table in enumerate(description.cpuid):
                self._found.merge(compare_cpuid(table, supported, f"vcpu{number}.cpuid"))
            raise
        self._found.merge(platform.compare_cpuid())
        with refusing(self._found, "devices"):
            description.require_devices(platform.device_versions())
        with refusing(self._found, "tsc_khz"):
            description.require_tsc(platform.tsc_khz, platform.can_scale_tsc)
        return platform

    def load(self, sections: Sequence[Section], resident_bytes: int) -> Fidelity:
        """See :meth:`kvmigrate.contract.Trial.load`."""
        fidelity = Fidelity()
        fidelity.merge(self._found)
        if self._backend is not MemoryBackend.HUGETLBFS:
            judge_room(fidelity, resident_bytes, self._touched_bytes)
        if self._platform is not None:
            fidelity.merge(try_sections(self._platform, sections, self._missing))
        return fidelity

    def close(self) -> None:
        """See :meth:`kvmigrate.contract.Trial.close`."""
        if self._platform is not None:
            self._platform.close()
            self._platform = None


def part_problem(spec: VirtioSpec, fidelity: Fidelity) -> str:
    """Why this host's side of a device could not be opened, which goes into ``fidelity`` too; or nothing."""
    if spec.disk is not None:
        saved, problem = str(spec.disk.path), _disk_problem(spec.disk)
    elif spec.net is not None:
        saved, problem = f"tap:{spec.net.interface}", tap_problem(spec.net.interface)
    else:
        return ""
    if problem:
        fidelity.refused(spec.name, saved, None, problem)
    else:
        fidelity.exact(spec.name)
    return problem


def _disk_problem(disk: DiskConfig) -> str:
    try:
        open_disk(disk.name, disk.path, read_only=True).close()
    except (HostError, ConfigError) as error:
        return str(error)
    if not disk.read_only and not os.access(disk.path, os.W_OK, effective_ids=True):
        return f"{disk.path} cannot be written to, and the guest does"
    return ""


def _stand_in_disk(disk: DiskConfig) -> DiskImage:
    """The image, only to be looked at; or something in its place when it cannot be had."""
    try:
        image = open_disk(disk.name, disk.path, read_only=True)
    except (HostError, ConfigError):
        fd = os.memfd_create("no-image", os.MFD_CLOEXEC)
        os.truncate(fd, SECTOR_BYTES)
        return DiskImage(disk.name, disk.path, disk.read_only, fd)
    image.read_only = disk.read_only
    return image


def _stand_in_tap(_: str) -> int:
    """Nothing reads or writes it: the device is never resumed."""
    return os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
