"""The state of a VM beside its vCPUs: interrupt chips, timer and clock; and the one order for the whole."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from ..errors import HostError
from ..state.fidelity import Fidelity
from ..state.section import Fields, Value
from .clock import ParsedClock, load_clock, parse_clock, save_clock
from .structs import layout
from .vcpu_state import load_vcpu, parse_vcpu, save_vcpu
from .vm import IOAPIC, PIC_MASTER, PIC_SLAVE, Vm, chip_layout

CHIPS = {"pic_master": PIC_MASTER, "pic_slave": PIC_SLAVE, "ioapic": IOAPIC}


def save_vm(vm: Vm) -> dict[str, Value]:
    """Clock, timer and interrupt chips of a VM whose vCPUs are parked. Raises :class:`HostError`.

    The clock comes first: it goes on while the vCPUs stand, and what passes until it is read is time that the guest
    will find missing."""
    body = save_clock(vm)
    body["pit2"] = vm.get_pit2()
    body.update({name: vm.get_irqchip(chip) for name, chip in CHIPS.items()})
    return body


def save_state(vm: Vm) -> tuple[dict[str, Value], list[dict[str, Value]]]:
    """The kernel's whole state of a VM whose vCPUs are parked: the VM's body, and one per vCPU. Raises
    :class:`HostError`.

    The chips come before the vCPUs' local APICs: the timer goes on ticking, and an interrupt that it raises in between
    is then in the local APIC that is saved after it. The other way round it would be in neither, or a level-triggered
    line would wait for ever for the end of an interrupt that no local APIC knows of."""
    body = save_vm(vm)
    return body, [save_vcpu(vcpu) for vcpu in vm.vcpus]


class ParsedVm:
    """The VM's body, checked; nothing of it is set yet. Raises :class:`BadField`."""

    def __init__(self, body: Value) -> None:
        fields = Fields(body, "vm")
        self.clock: ParsedClock = parse_clock(fields, "vm")
        self.pit2: Mapping[str, Value] = fields.mapping("pit2")
        layout("pit_state2").pack(self.pit2, "vm.pit2")
        self.chips: dict[str, bytes] = {
            name: chip_layout(chip).pack(fields.mapping(name), f"vm.{name}") for name, chip in CHIPS.items()
        }
        fields.done()


def load_state(vm: Vm, body: Value, vcpu_bodies: Sequence[Value], *, count_downtime: bool = False) -> Fidelity:
    """Set the whole state of a VM that has never run, or is reset, read all of it back and judge it.

    Raises :class:`BadField` or :class:`RestoreRefused` when the bodies cannot be right, before anything is set. Refused
    items are in the result. The order is a rule:

    1. The clock: every vCPU's TSC is set relative to it.
    2. The vCPUs, with their local APICs.
    3. PICs and IOAPIC: setting them delivers what they hold pending, to local APICs that must not be overwritten later.
    4. The PIT last: it starts to tick at once, and a tick must find the chips in place.
    """
    fidelity = Fidelity()
    parsed = ParsedVm(body)
    if len(vcpu_bodies) != len(vm.vcpus):
        fidelity.refused("nr_vcpus", len(vcpu_bodies), len(vm.vcpus), "the machine has another number of vCPUs")
        return fidelity
    states = [parse_vcpu(vcpu, saved) for vcpu, saved in zip(vm.vcpus, vcpu_bodies, strict=True)]
    base = load_clock(vm, parsed.clock, fidelity, count_downtime=count_downtime)
    for tsc in () if parsed.clock.stable else [state.tsc for state in states]:
        if tsc.offset is not None:
            base = base.not_back(tsc.offset, tsc.value, tsc.khz)
    for vcpu, state in zip(vm.vcpus, states, strict=True):
        fidelity.merge(load_vcpu(vcpu, state, base))
    load_chips(vm, parsed, fidelity)
    return fidelity


def load_chips(vm: Vm, parsed: ParsedVm, fidelity: Fidelity) -> None:
    """Steps 3 and 4 of :func:`load_state`."""
    for name, chip in CHIPS.items():
        saved = parsed.chips[name]
        if _set(name, partial(vm.set_irqchip_packed, chip, saved), fidelity):
            held = vm.get_irqchip_packed(chip)
            if held == saved:
                fidelity.exact(name)
            else:
                fidelity.compare(name, chip_layout(chip).unpack(saved), chip_layout(chip).unpack(held))
    if _set("pit2", partial(vm.set_pit2, parsed.pit2), fidelity):
        _compare_pit(parsed.pit2, vm.get_pit2(), fidelity)


def _set(name: str, action: Callable[[], None], fidelity: Fidelity) -> bool:
    try:
        action()
    except HostError as error:
        fidelity.refused(name, None, None, f"the kernel refused it: {error}")
        return False
    return True


def _compare(name: str, saved: Value, held: Value, fidelity: Fidelity) -> None:
    if saved == held:
        fidelity.exact(name)
    else:
        fidelity.compare(name, saved, held)


def _compare_pit(saved: Value, held: Value, fidelity: Fidelity) -> None:
    """All but the time at which each channel began to count, which is the host's own clock."""
    _compare("pit2.flags", saved["flags"], held["flags"], fidelity)
    for n, (one, other) in enumerate(zip(saved["channels"], held["channels"], strict=True)):
        began, now = one["count_load_time"], other["count_load_time"]
        _compare(f"pit2.channels[{n}]", one | {"count_load_time": now}, other, fidelity)
        if began != now:
            fidelity.adjusted(
                f"pit2.channels[{n}].count_load_time",
                began,
                now,
                "the channel starts a new period on this host's clock",
            )
