"""The state of a whole machine as sections, and the order in which its parts are saved and set again."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import BadField
from ..kvm.vcpu_state import VERSION as VCPU_VERSION
from ..kvm.vcpu_state import load_vcpu, save_vcpu
from ..kvm.vm_state import VERSION as VM_VERSION
from ..kvm.vm_state import load_vm, save_vm
from ..state.fidelity import Fidelity
from ..state.section import Section, by_name, require_version
from .platform import Platform


def section_names(platform: Platform) -> list[str]:
    """The sections of a machine, in the order in which they are saved."""
    return [*(f"vcpu{vcpu.id}" for vcpu in platform.vm.vcpus), "vm", *platform.devices]


def save_sections(platform: Platform) -> list[Section]:
    """The state of everything but RAM. The machine is paused and its devices too.

    vCPUs come before the interrupt chips: reading a vCPU's MP state may let it accept a pending INIT or SIPI, which
    changes its local APIC (KVM's kvm_apic_accept_events). Devices come last; they may write guest memory, so the
    last sync of the dirty log comes after this.
    """
    sections = [Section(f"vcpu{vcpu.id}", VCPU_VERSION, save_vcpu(vcpu)) for vcpu in platform.vm.vcpus]
    sections.append(Section("vm", VM_VERSION, save_vm(platform.vm)))
    return sections + [device.section() for device in platform.devices.values()]


def load_sections(platform: Platform, sections: Sequence[Section]) -> Fidelity:
    """Set and read back the state of everything but RAM. Raises :class:`StreamError` before anything is set when a
    section is missing, unknown or of a later version.

    vCPUs first, then the VM's chips and clock: setting a local APIC can move interrupts into the chips' state, and
    the clock must stand before any vCPU runs. Devices come last, since they drive their interrupt lines again and
    KVM_SET_IRQCHIP would overwrite what a line did to the chips (Firecracker restores in the same order).
    """
    found = by_name(sections)
    _check_names(platform, found)
    for name, section in found.items():
        if name.startswith("vcpu") or name == "vm":
            require_version(section, VM_VERSION if name == "vm" else VCPU_VERSION)
    fidelity = Fidelity()
    for vcpu in platform.vm.vcpus:
        fidelity.merge(load_vcpu(vcpu, found[f"vcpu{vcpu.id}"].body))
    fidelity.merge(load_vm(platform.vm, found["vm"].body))
    for name, device in platform.devices.items():
        device.load_section(found[name])
        fidelity.compare(name, dict(found[name].body), device.save())
    return fidelity


def _check_names(platform: Platform, found: dict[str, Section]) -> None:
    wanted = set(section_names(platform))
    for name in sorted(wanted - found.keys()):
        raise BadField(f"section {name} is missing")
    for name in sorted(found.keys() - wanted):
        raise BadField(f"section {name} belongs to no part of this machine: update kvmigrate on this host")
