"""The state of a whole machine as sections, and the order in which its parts are saved and set again."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache

from ..devices.bus import Device
from ..errors import BadField, ConfigError, HostError, RestoreRefused, StreamError
from ..kvm.vm_state import leave_modes, load_state, pack_state
from ..state.fidelity import Fidelity, item_names
from ..state.section import Section, by_name, require_version
from .platform import Platform

VERSION = 1
"""Of the sections of the vCPUs and of the VM; each device counts its own."""


def section_names(platform: Platform) -> list[str]:
    """The sections of a machine, in the order in which they are saved."""
    return [*_kernel_names(platform), *platform.devices]


def _kernel_names(platform: Platform) -> tuple[str, ...]:
    return kernel_names(len(platform.vm.vcpus))


def _vcpu_names(platform: Platform) -> tuple[str, ...]:
    return _kernel_names(platform)[1:]


@cache
def kernel_names(nr_vcpus: int) -> tuple[str, ...]:
    """The sections of what the kernel keeps."""
    return "vm", *(f"vcpu{number}" for number in range(nr_vcpus))


def save_sections(platform: Platform) -> list[Section]:
    """The state of everything but RAM: the kernel's, and then that of the devices. Raises :class:`HostError`."""
    return [*save_kernel(platform), *save_devices(platform)]


def save_kernel(platform: Platform) -> list[Section]:
    """The state that the kernel keeps. The machine is paused, its devices too: what they still had to say to the
    interrupt chips was said by that. Raises :class:`HostError`."""
    vm, vcpus = pack_state(platform.vm)
    return [Section(name, VERSION, body) for name, body in zip(_kernel_names(platform), (vm, *vcpus), strict=True)]


def save_devices(platform: Platform) -> list[Section]:
    """The state of the devices. They may write guest memory, so the last sync of the dirty log comes after this."""
    return [device.section() for device in platform.devices.values()]


def load_sections(platform: Platform, sections: Sequence[Section], *, count_downtime: bool = False) -> Fidelity:
    """Set and read back the state of everything but RAM. Raises :class:`StreamError` before anything is set when a
    section is missing, unknown or of a later version.

    Devices come last: they drive their interrupt lines again when they go on, and KVM_SET_IRQCHIP would overwrite what
    a line did to the chips (Firecracker #5882).
    """
    found = by_name(sections)
    _check_names(section_names(platform), found)
    fidelity = _load_kernel(platform, found, count_downtime)
    _load_devices(platform, found, fidelity)
    return fidelity


def load_kernel(platform: Platform, sections: Sequence[Section], *, count_downtime: bool = False) -> Fidelity:
    """The first part of :func:`load_sections`, with what :func:`save_kernel` gave."""
    found = by_name(sections)
    _check_names(_kernel_names(platform), found)
    return _load_kernel(platform, found, count_downtime)


def load_devices(platform: Platform, sections: Sequence[Section], fidelity: Fidelity) -> None:
    """The second part, with what :func:`save_devices` gave; ``fidelity`` of the first is completed."""
    found = by_name(sections)
    _check_names(platform.devices, found)
    _load_devices(platform, found, fidelity)


def _load_devices(platform: Platform, found: Mapping[str, Section], fidelity: Fidelity) -> None:
    for name, device in platform.devices.items():
        _load_device(device, found[name], fidelity)


def _load_device(device: Device, section: Section, fidelity: Fidelity) -> None:
    saved = section.packed
    # Most of the small devices are as they were after power-on, here as there.
    if section.version == device.version and saved == device.packed():
        fidelity.exact(device.name)
        return
    device.load_section(section)
    # The same bytes are the same items; other bytes may be too, as another encoder or an older version writes them.
    if saved == device.packed():
        fidelity.all_exact(device.name, device.item_names or item_names(section.body))
    else:
        fidelity.compare(device.name, dict(section.body), device.save())


def _load_kernel(platform: Platform, found: Mapping[str, Section], count_downtime: bool) -> Fidelity:
    vcpu_names = _vcpu_names(platform)
    for name in _kernel_names(platform):
        require_version(found[name], VERSION)
    # CPUID never changes and is in the description already, where it travels before the guest has to wait.
    bodies = [found[name].packed for name in vcpu_names]
    return load_state(platform.vm, found["vm"].packed, bodies, platform.cpuid, count_downtime=count_downtime)


def try_sections(platform: Platform, sections: Sequence[Section], without: Container[str] = ()) -> Fidelity:
    """As :func:`load_sections` for a state that is only tried: a part that cannot be loaded is refused in the result,
    and the others are tried all the same; devices in ``without`` are left out. Raises :class:`BadField` for a section
    that comes twice."""
    found = by_name(sections)
    fidelity = Fidelity()
    with refusing(fidelity, "sections"):
        _check_names(section_names(platform), found)
    with refusing(fidelity, "vcpus"):
        if {*_kernel_names(platform)} <= found.keys():
            fidelity.merge(_load_kernel(platform, found, False))
    for name in platform.devices.keys() & found.keys():
        if name not in without:
            with refusing(fidelity, name):
                _load_device(platform.devices[name], found[name], fidelity)
    return fidelity


def take_back(platform: Platform, before: Sequence[Section]) -> None:
    """Set ``before``, which was saved when the machine had never run, in place of what was tried since. Timers that the
    state has started tick no more, and what they raised meanwhile waits nowhere.

    Raises :class:`HostError` or :class:`RestoreRefused` when the kernel does not take its own state again."""
    found = by_name(before)
    leave_modes(platform.vm, [found[name].body for name in _vcpu_names(platform)])
    load_sections(platform, before).require()


@contextmanager
def refusing(fidelity: Fidelity, item: str) -> Iterator[None]:
    """Note what the block raises about this host and the state as refused in ``fidelity``, as the ``item`` when the
    error names none."""
    try:
        yield
    except RestoreRefused as error:
        fidelity.refused(error.item, error.wanted, error.got, error.why)
    except (ConfigError, HostError, StreamError) as error:
        fidelity.refused(item, None, None, str(error))


def _check_names(names: Iterable[str], found: Mapping[str, Section]) -> None:
    wanted = set(names)
    if wanted == found.keys():
        return
    for name in sorted(wanted - found.keys()):
        raise BadField(f"section {name} is missing")
    for name in sorted(found.keys() - wanted):
        raise BadField(f"section {name} belongs to no part of this machine: update kvmigrate on this host")
