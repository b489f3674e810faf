"""What a destination must build to take a guest over: sizes, vCPUs, CPUID, the devices and their section versions.

It travels as the CONFIG frame of a stream and of a snapshot, so every field that arrives is hostile.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

from ..config import MAX_CPUS, MAX_MEMORY_BYTES, MIN_MEMORY_BYTES, HostSide, MachineConfig
from ..errors import BadField, ConfigError, RestoreRefused
from ..kvm.lists import MAX_CPUID_ENTRIES, CheckedCpuid
from ..memory.layout import slots_for
from ..record import dataclass, replace
from ..state.section import Fields, Value
from .boot_source import BootSource, read_boot_source
from .specs import MAX_DEVICES, VirtioSpec, read_specs, specs_for, with_console, with_disks, with_nets, with_new_macs

_UUID = "[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"
_UUID_FIXED = 0x4 << 76 | 0b10 << 62
_UUID_RANDOM = ~(0xF << 76 | 0b11 << 62)
"""The bits that say which kind of uuid it is: version 4 of the variant of RFC 9562."""
CpuidTable = list[dict[str, int]]


@dataclass(frozen=True, slots=True)
class Description:
    """A machine without its state. ``cpuid`` has one table for each vCPU, under the kernel's field names."""

    name: str
    uuid: str
    memory_bytes: int
    cpuid: tuple[CpuidTable, ...]
    tsc_khz: int
    devices: Mapping[str, int]
    autostart: bool = True
    virtio: tuple[VirtioSpec, ...] = ()
    boot: BootSource | None = None

    @classmethod
    def new(cls, config: MachineConfig, cpuid: tuple[CpuidTable, ...], boot: BootSource | None = None) -> Description:
        """Describe a machine that is made here and now; :meth:`completed` adds the rest."""
        virtio = specs_for(config.disks, config.nets, config.console)
        return cls(config.name, _new_uuid(), config.memory_bytes, cpuid, 0, {}, virtio=virtio, boot=boot)

    def completed(self, devices: Mapping[str, int], tsc_khz: int, cpuid: tuple[CpuidTable, ...]) -> Description:
        """With what is known only once the machine exists: of CPUID what the kernel made of it."""
        return replace(self, devices=dict(devices), tsc_khz=tsc_khz, cpuid=cpuid)

    def cloned(self) -> Description:
        """As another guest, with a uuid and network addresses of its own: nobody takes it for the saved one."""
        return replace(self, uuid=_new_uuid(), virtio=with_new_macs(self.virtio))

    def on(self, here: HostSide) -> Description:
        """With the name, and behind its devices the images, taps and console, that it has on this host. Raises
        :class:`ConfigError` for a device that the guest does not have."""
        virtio = with_console(with_nets(with_disks(self.virtio, here.disks), here.nets), here.console)
        return replace(self, name=here.name or self.name, virtio=virtio)

    def require_devices(self, mine: Mapping[str, int]) -> None:
        """Raise :class:`RestoreRefused` unless this host's machine has exactly these devices, at least as new."""
        for name in sorted(self.devices.keys() | mine.keys()):
            theirs, ours = self.devices.get(name, 0), mine.get(name, 0)
            if not 0 < theirs <= ours:
                raise RestoreRefused(f"device {name}", f"version {theirs}", f"version {ours}", "update the older side")

    def require_tsc(self, host_khz: int, can_scale: bool) -> None:
        """Raise :class:`RestoreRefused` when the guest's TSC would count at another rate here. Within 250 parts per
        million a guest corrects the difference by itself, as after a change of temperature (Firecracker's limit)."""
        off = abs(self.tsc_khz - host_khz)
        if self.tsc_khz and not can_scale and off * 1_000_000 > 250 * host_khz:
            raise RestoreRefused("tsc_khz", self.tsc_khz, host_khz, "this CPU cannot scale the TSC")

    @property
    def nr_cpus(self) -> int:
        return len(self.cpuid)

    def to_value(self) -> dict[str, Value]:
        """As a msgpack map, as :meth:`from_value` reads it."""
        return {
            "name": self.name,
            "uuid": self.uuid,
            "memory_bytes": self.memory_bytes,
            "slots": [list(slot) for slot in slots_for(self.memory_bytes)],
            "cpuid": [list(table) for table in self.cpuid],
            "tsc_khz": self.tsc_khz,
            "devices": dict(self.devices),
            "autostart": self.autostart,
            "virtio": [spec.to_value() for spec in self.virtio],
        } | ({"boot": self.boot.to_value()} if self.boot else {})

    @classmethod
    def from_value(cls, value: Mapping[str, Value]) -> Description:
        """Check what came from a peer or a file. Raises :class:`BadField`, or :class:`ConfigError` when this host
        has less memory than the guest."""
        fields = Fields(dict(value), "description")
        description = cls(
            name=fields.text("name", 63),
            uuid=fields.text("uuid", 64),
            memory_bytes=fields.integer("memory_bytes", MIN_MEMORY_BYTES, MAX_MEMORY_BYTES),
            cpuid=tuple(_cpuid_table(table) for table in fields.sequence("cpuid", MAX_CPUS)),
            tsc_khz=fields.integer("tsc_khz", 0, 1 << 32),
            devices=_devices(fields.mapping("devices")),
            autostart=fields.boolean("autostart"),
            # A snapshot of before there were any has no such fields.
            virtio=read_specs(fields.sequence("virtio", MAX_DEVICES)) if fields.has("virtio") else (),
            boot=read_boot_source(fields.mapping("boot")) if fields.has("boot") else None,
        )
        slots = fields.sequence("slots", 32)
        fields.done()
        # The name ends up in paths, and the uuid in a journal: both must be what they claim to be.
        MachineConfig(description.name, description.memory_bytes, max(description.nr_cpus, 1))
        _check_uuid(description.uuid)
        if slots != [list(slot) for slot in slots_for(description.memory_bytes)]:
            raise BadField("description: field 'slots' does not match 'memory_bytes'")
        if not description.cpuid:
            raise BadField("description: field 'cpuid' is empty: a machine has at least one vCPU")
        _check_host_memory(description.memory_bytes)
        return description


def _cpuid_table(value: Value) -> CpuidTable:
    if not isinstance(value, list) or len(value) > MAX_CPUID_ENTRIES:
        raise BadField(f"description: a CPUID table is a list of at most {MAX_CPUID_ENTRIES} entries")
    # Which checks every row for exactly the fields, each within its range.
    return CheckedCpuid(value, "description: cpuid")


def _devices(value: dict[str, Value]) -> dict[str, int]:
    for name, version in value.items():
        if type(version) is not int or not 1 <= version <= 0xFFFF or len(name) > 64:
            raise BadField(f"description: device {name!r:.80} has version {version!r:.80}")
    return value


def _new_uuid() -> str:
    """A random one (RFC 9562, 5.4): the module ``uuid`` takes longer to load than a guest, and the kernel's own file of
    them to open as long as one of its parts."""
    number = int.from_bytes(os.urandom(16)) & _UUID_RANDOM | _UUID_FIXED
    digits = f"{number:032x}"
    return "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))


def _check_uuid(text: str) -> None:
    if not re.fullmatch(_UUID, text):
        raise BadField(f"description: field 'uuid' is {text!r:.80}, which is not a UUID")


def _check_host_memory(memory_bytes: int) -> None:
    host_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if memory_bytes > host_bytes:
        guest_mib, host_mib = memory_bytes >> 20, host_bytes >> 20
        raise ConfigError(f"the guest has {guest_mib} MiB of memory, this host only {host_mib}: choose a larger host")
