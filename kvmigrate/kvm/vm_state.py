"""The state of a VM beside its vCPUs: interrupt chips, timer and clock; and the one order for the whole."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import BadField, HostError, check
from ..state.fidelity import Fidelity
from ..state.section import Value, unpack
from . import msr_names as msr
from .clock import ParsedClock, load_clock, parse_clock
from .structs import Layout, layout, packed
from .vcpu import Vcpu
from .vcpu_image import save_image
from .vcpu_state import load_vcpu, parse_vcpu
from .vm import CHIPS, Vm, chip_layout
from .vm_image import VmImage, image_of

CHIP_ORDER = ("pic_master", "pic_slave", "ioapic", "pit2")
"""Steps 3 and 4 of :func:`_load_state`, which is a rule."""
_PIT_NAMES = ("flags", "channels[0]", "channels[1]", "channels[2]")


def save_state(vm: Vm) -> tuple[dict[str, Value], list[dict[str, Value]]]:
    """The kernel's whole state of a VM whose vCPUs are parked, as dicts: the VM's body, and one per vCPU with its
    CPUID. Raises :class:`HostError`."""
    body, vcpus = pack_state(vm)
    bodies = [
        unpack(packed_vcpu, "a vCPU") | {"cpuid": vcpu.cpuid} for vcpu, packed_vcpu in zip(vm.vcpus, vcpus, strict=True)
    ]
    return unpack(body, "vm"), bodies


def pack_state(vm: Vm) -> tuple[bytes, list[bytes]]:
    """The same in msgpack and without CPUID, for which nobody has to wait.

    The chips come before the vCPUs' local APICs: the timer goes on ticking, and an interrupt that it raises in between
    is then in the local APIC that is saved after it. The other way round it would be in neither, or a level-triggered
    line would wait for ever for the end of an interrupt that no local APIC knows of."""
    with vm.images_in_use:
        body = image_of(vm).save()
        return body, [save_image(vcpu) for vcpu in vm.vcpus]


def pack_part(vm: Vm, vcpu: Vcpu | None = None) -> bytes:
    """One of the bodies of :func:`pack_state`: that of ``vcpu``, which must be parked, or of the VM. Raises
    :class:`HostError`."""
    with vm.images_in_use:
        return image_of(vm).save() if vcpu is None else save_image(vcpu)


def parse_vm(vm: Vm, body: Value) -> ParsedClock:
    """Check the VM's body, which is hostile, and put it into the VM's image, ready to be set. Raises
    :class:`BadField`."""
    image = image_of(vm)
    image.memory.decode(packed(body, "vm"), "vm")
    return parse_clock(image.clock, int(image.host_tsc[0]), "vm.clock")


def load_state(
    vm: Vm,
    body: Value,
    vcpu_bodies: Sequence[Value],
    cpuids: Sequence[Value] | None = None,
    *,
    count_downtime: bool = False,
) -> Fidelity:
    """Set the whole state of a VM that has never run, or is reset, read all of it back and judge it. The bodies are
    maps or msgpack; the CPUID of each vCPU is in its own, or in ``cpuids``.

    Raises :class:`BadField` or :class:`RestoreRefused` when the bodies cannot be right, before anything is set. Refused
    items are in the result.
    """
    if cpuids is None:
        vcpu_bodies, cpuids = _apart(vcpu_bodies)
    with vm.images_in_use:
        return _load_state(vm, body, vcpu_bodies, cpuids, count_downtime)


def _load_state(
    vm: Vm, body: Value, vcpu_bodies: Sequence[Value], cpuids: Sequence[Value], count_downtime: bool
) -> Fidelity:
    """The order is a rule:

    1. The clock: every vCPU's TSC is set relative to it.
    2. The vCPUs, with their local APICs.
    3. PICs and IOAPIC: setting them delivers what they hold pending, to local APICs that must not be overwritten later.
    4. The PIT last: it starts to tick at once, and a tick must find the chips in place.
    """
    fidelity = Fidelity()
    clock = parse_vm(vm, body)
    if len(vcpu_bodies) != len(vm.vcpus):
        fidelity.refused("nr_vcpus", len(vcpu_bodies), len(vm.vcpus), "the machine has another number of vCPUs")
        return fidelity
    states = [parse_vcpu(*saved) for saved in zip(vm.vcpus, vcpu_bodies, cpuids, strict=True)]
    base = load_clock(image_of(vm).set_clock, clock, fidelity, count_downtime=count_downtime)
    for tsc in () if clock.stable else [state.tsc for state in states]:
        if tsc.offset is not None:
            base = base.not_back(tsc.offset, tsc.value, tsc.khz)
    for vcpu, state in zip(vm.vcpus, states, strict=True):
        fidelity.merge(load_vcpu(vcpu, state, base))
    load_chips(vm, fidelity)
    return fidelity


def leave_modes(vm: Vm, bodies: Sequence[Value]) -> None:
    """Bring vCPUs that have run, or hold somebody's state, to where that of new ones, which ``bodies`` are, can be
    set."""
    for vcpu, body in zip(vm.vcpus, bodies, strict=True):
        # Takes an INIT or SIPI that waits, which would else be taken on top of the new state.
        vcpu.get_mp_state()
        # Ends nested virtualisation on Intel, in which the kernel refuses CR4 without VMXE (Linux, vmx_set_msr).
        if (control := body["msrs"].get(msr.msr_name(msr.IA32_FEAT_CTL))) is not None:
            vcpu.set_msrs({msr.IA32_FEAT_CTL: control})


def _apart(bodies: Sequence[Value]) -> tuple[list[Value], list[Value]]:
    """Bodies without their CPUID, and that. Raises :class:`BadField`."""
    for number, body in enumerate(bodies):
        if type(body) is not dict or "cpuid" not in body:
            raise BadField(f"vcpu{number}: field 'cpuid' is missing")
    return [{k: v for k, v in body.items() if k != "cpuid"} for body in bodies], [body["cpuid"] for body in bodies]


def load_chips(vm: Vm, fidelity: Fidelity) -> None:
    """Set what :func:`parse_vm` took, in :data:`CHIP_ORDER`, and judge what was read back."""
    image = image_of(vm)
    for name, saved, lowered in image.lower_pit_line():
        fidelity.adjusted(name, saved, lowered, "the PIT's line was up for the moment of a tick")
    for item, outcome in zip(CHIP_ORDER, image.load(CHIP_ORDER), strict=True):
        if outcome.exact and item != "pit2":
            fidelity.exact(item)
            continue
        try:
            check(outcome.rc, f"KVM_SET of {item}")
        except HostError as error:
            fidelity.refused(item, None, None, f"the kernel refused it: {error}")
            continue
        if item == "pit2":
            _judge_pit(image, fidelity)
        else:
            _compare(image, item, chip_layout(CHIPS[item]), fidelity)


def _compare(image: VmImage, item: str, of: Layout, fidelity: Fidelity) -> None:
    fidelity.compare(item, of.unpack(image.memory.saved_bytes(item)), of.unpack(image.memory.held_bytes(item)))


def _judge_pit(image: VmImage, fidelity: Fidelity) -> None:
    """Exact but for the time at which each channel began to count, which is the host's own clock."""
    saved, held = (of("pit2", "struct kvm_pit_state2 *") for of in (image.memory.saved, image.memory.held))
    for number, (one, other) in enumerate(zip(saved.channels, held.channels, strict=True)):
        began, now = one.count_load_time, other.count_load_time
        if began != now:
            why = "the channel starts a new period on this host's clock"
            fidelity.adjusted(f"pit2.channels[{number}].count_load_time", began, now, why)
            other.count_load_time = began
    if image.memory.saved_bytes("pit2") == image.memory.held_bytes("pit2"):
        fidelity.all_exact("pit2", _PIT_NAMES)
    else:
        _compare(image, "pit2", layout("pit_state2"), fidelity)
