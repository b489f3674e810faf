"""Which virtio devices a machine has, as its description carries them; what arrives is hostile."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from ..config import DiskConfig, NetConfig, random_mac
from ..errors import BadField, ConfigError
from ..record import dataclass, replace
from ..state.section import Fields, Value

MAX_DEVICES = 14
"""As many as there are interrupt lines for them."""
RNG = "rng0"
CONSOLE = "console0"
BALLOON = "balloon"


@dataclass(frozen=True, slots=True)
class VirtioSpec:
    """One device: a disk, a network card whose ``net`` has an address, or with neither what ``name`` says, which is its
    section's name too.

    ``backend`` is where a console leads on this host. It does not travel: whoever sends a guest has no say in what is
    opened here.
    """

    name: str
    disk: DiskConfig | None = None
    net: NetConfig | None = None
    backend: str = "null"

    def to_value(self) -> dict[str, Value]:
        """As a msgpack map, as :func:`read_specs` reads it."""
        if self.disk is not None:
            disk = self.disk
            return {"kind": "disk", "name": disk.name, "path": str(disk.path.absolute()), "read_only": disk.read_only}
        if self.net is not None:
            return {"kind": "net", "name": self.net.name, "interface": self.net.interface, "mac": self.net.mac}
        return {"kind": _KINDS[self.name], "name": self.name}


_KINDS = {RNG: "rng", CONSOLE: "console", BALLOON: "balloon"}
"""Of the devices of which a machine has one at most, by name."""


def specs_for(
    disks: Iterable[DiskConfig], nets: Iterable[NetConfig] = (), console: str | None = None
) -> tuple[VirtioSpec, ...]:
    """The devices of a new machine: entropy, which every machine has, then the disks and the networks in their order,
    the console if there is one, and the balloon, which every machine has too. A network without an address gets one."""
    addressed = [net if net.mac else replace(net, mac=random_mac()) for net in nets]
    consoles = () if console is None else (VirtioSpec(CONSOLE, backend=console),)
    return (VirtioSpec(RNG), *map(_disk_spec, disks), *map(_net_spec, addressed), *consoles, VirtioSpec(BALLOON))


def read_specs(value: Sequence[Value]) -> tuple[VirtioSpec, ...]:
    """Check what a description says. Raises :class:`BadField` or :class:`ConfigError`."""
    specs = tuple(_read_spec(Fields(one, "description: virtio")) for one in value)
    names = [spec.name for spec in specs]
    if len(set(names)) != len(names):
        raise BadField("description: field 'virtio' has a name twice")
    return specs


def with_disks(specs: Sequence[VirtioSpec], disks: Iterable[DiskConfig]) -> tuple[VirtioSpec, ...]:
    """``specs`` with the images that ``disks`` name instead of the described ones.

    Raises :class:`ConfigError` for a disk that the guest does not have, or has as another kind.
    """
    found = {spec.disk.name: at for at, spec in enumerate(specs) if spec.disk is not None}
    changed = list(specs)
    for disk in disks:
        if disk.name not in found:
            has = ", ".join(found) or "none"
            raise ConfigError(f"disk {disk.name}: the guest has no disk of this name, it has: {has}")
        described = changed[found[disk.name]].disk
        if described is not None and described.read_only != disk.read_only:
            kind = "read-only: add ,ro" if described.read_only else "writable: leave out ,ro"
            raise ConfigError(f"disk {disk.name}: the guest has it {kind}")
        changed[found[disk.name]] = replace(changed[found[disk.name]], disk=disk)
    return tuple(changed)


def with_nets(specs: Sequence[VirtioSpec], nets: Iterable[NetConfig]) -> tuple[VirtioSpec, ...]:
    """``specs`` with the taps, and the addresses if there are any, that ``nets`` name instead of the described ones.

    Raises :class:`ConfigError` for a network that the guest does not have.
    """
    changed = {spec.name: spec for spec in specs}
    for net in nets:
        name = _net_spec(net).name
        described = changed[name].net if name in changed else None
        if described is None:
            has = ", ".join(spec.net.name for spec in specs if spec.net is not None) or "none"
            raise ConfigError(f"network {net.name}: the guest has no network of this name, it has: {has}")
        changed[name] = _net_spec(replace(net, mac=net.mac or described.mac))
    return tuple(changed.values())


def with_console(specs: Sequence[VirtioSpec], console: str | None) -> tuple[VirtioSpec, ...]:
    """``specs`` with a console, if the guest has one, that leads to ``console``, or nowhere when that is None.

    Raises :class:`ConfigError` when the guest has no console that could lead anywhere.
    """
    if console is not None and all(spec.name != CONSOLE for spec in specs):
        raise ConfigError("the guest has no console: it was started without --console, leave it out here too")
    return tuple(replace(spec, backend=console or "null") if spec.name == CONSOLE else spec for spec in specs)


def with_new_macs(specs: Sequence[VirtioSpec]) -> tuple[VirtioSpec, ...]:
    """``specs`` of another guest: no network card has the address of the described one."""
    return tuple(_net_spec(replace(spec.net, mac=random_mac())) if spec.net else spec for spec in specs)


def _net_spec(net: NetConfig) -> VirtioSpec:
    return VirtioSpec(f"net-{net.name}", net=net)


def _disk_spec(disk: DiskConfig) -> VirtioSpec:
    return VirtioSpec(f"disk-{disk.name}", disk)


def _read_spec(fields: Fields) -> VirtioSpec:
    kind, name = fields.text("kind", 16), fields.text("name", 64)
    if _KINDS.get(name) == kind:
        spec = VirtioSpec(name)
    elif kind == "net":
        spec = _net_spec(NetConfig(name, fields.text("interface", 15), fields.blob("mac", 6, exact=True)))
    elif kind == "disk":
        path = fields.text("path")
        if "\0" in path or not path.startswith("/"):
            raise BadField(f"description: virtio: field 'path' of disk {name!r:.80} is not an absolute path")
        spec = _disk_spec(DiskConfig(name, Path(path), fields.boolean("read_only")))
    else:
        raise BadField(f"description: virtio: this kvmigrate has no device of kind {kind!r} named {name!r:.80}")
    fields.done()
    return spec
