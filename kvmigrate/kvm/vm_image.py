"""The state of a VM beside its vCPUs in memory, as vcpu_image.py has that of a vCPU."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache, lru_cache
from typing import Any

from .._core import ffi, lib
from ..errors import check
from .clock import complete
from .image import Image, Part, Shape
from .steps import Outcome, Step, Steps
from .structs import layout
from .vm import CHIPS, Vm

_IRQCHIP = "struct kvm_irqchip"
_STRUCTS = {"pic_master": "pic_state", "pic_slave": "pic_state", "ioapic": "ioapic_state", "pit2": "pit_state2"}
_CHIP_REQUESTS = (lib.KVM_GET_IRQCHIP, lib.KVM_SET_IRQCHIP)
# The PIT drives the first input of both chips: kvmigrate leaves KVM's default routes as they are.
_PIT_LINE = 1 << 0
_PIT_LINES = (("pic_master", "last_irr"), ("ioapic", "irr"))
_PIT_REQUESTS = (lib.KVM_GET_PIT2, lib.KVM_SET_PIT2)


class VmImage:
    """The state of ``vm``: clock, timer and interrupt chips."""

    def __init__(self, vm: Vm) -> None:
        self._vm = vm
        self.memory = Image(_shape())
        self.clock = self.memory.saved("clock", "struct kvm_clock_data *")
        self.host_tsc = self.memory.saved("host_tsc", "__u64 *")
        self._clock_here = self.memory.held("clock", "struct kvm_clock_data *")
        self._clock_wanted = self.memory.apart("struct kvm_clock_data *")
        self._pit_lines = [(item, register, self._chip(item)) for item, register in _PIT_LINES]

    def save(self) -> bytes:
        """Read the VM, whose vCPUs are parked: the body of its section, a msgpack map. Raises :class:`HostError`.

        The clock comes first: it goes on while the vCPUs stand, and what passes until it is read is time that the guest
        will find missing."""
        self.memory.clear()
        [clock] = _clock_step().run(self._vm.fd, self.memory.memory)
        check(clock.rc, "KVM_GET_CLOCK")
        self.host_tsc[0] = complete(self.clock)
        [chips] = _save_steps().run(self._vm.fd, self.memory.memory)
        check(chips.rc, "reading the timer and the interrupt chips")
        self.lower_pit_line()
        return self.memory.encode()

    def lower_pit_line(self) -> list[tuple[str, int, int]]:
        """End a pulse of the PIT that the saved chips show half of: for each register that did, its name, what it was
        and what it is now.

        The kernel raises line 0 and lowers it again at each tick, whether vCPUs run or not (Linux, pit_do_work), so
        that chips may be read in between: once in 7000 reads at 1 kHz. In another VM nobody would lower the line. The
        next tick would then be no edge, no interrupt, and never acknowledged; and the kernel's PIT waits for that
        before it ticks on. What the pulse asked for is in other registers."""
        lowered = []
        for item, register, chip in self._pit_lines:
            was = getattr(chip, register)
            if was & _PIT_LINE:
                setattr(chip, register, was & ~_PIT_LINE)
                lowered.append((f"{item}.{register}", was, was & ~_PIT_LINE))
        return lowered

    def _chip(self, item: str) -> Any:
        return ffi.cast(f"struct kvm_{_STRUCTS[item]} *", self.memory.saved(item) + self.memory.parts[item].offset)

    def set_clock(self, clock_ns: int) -> Any:
        """Set kvmclock, and return the ``struct kvm_clock_data *`` of what it then is. Raises :class:`HostError`."""
        self._clock_wanted.clock = clock_ns
        for outcome in _set_clock_steps().run(self._vm.fd, self.memory.memory):
            check(outcome.rc, "setting kvmclock")
        return self._clock_here

    def load(self, items: Sequence[str]) -> list[Outcome]:
        """Set the chips and the timer ``items``, one after another, and read each back right after it."""
        return _load_steps(tuple(items)).run(self._vm.fd, self.memory.memory)


# What is the same for every VM.


@cache
def _shape() -> Shape:
    shape = Shape(_parts())
    for item, chip_id in CHIPS.items():
        shape.blank(item, f"{_IRQCHIP} *").chip_id = chip_id
    return shape


def _parts() -> Iterator[Part]:
    clock = layout("clock_data")
    yield Part("clock", clock.size_bytes, lib.KMIG_FIELD_STRUCT, clock)
    yield Part("host_tsc", 8, lib.KMIG_FIELD_UNSIGNED)
    for item, name in (("pit2", "pit_state2"), *((item, _STRUCTS[item]) for item in CHIPS)):
        of = layout(name)
        if item in CHIPS:
            at = ffi.offsetof(_IRQCHIP, "chip")
            yield Part(item, ffi.sizeof(_IRQCHIP), lib.KMIG_FIELD_STRUCT, of, at, of.size_bytes)
        else:
            yield Part(item, of.size_bytes, lib.KMIG_FIELD_STRUCT, of)


@cache
def _clock_step() -> Steps:
    return Steps([[(Step(lib.KVM_GET_CLOCK, _shape().saved_at("clock")), 0)]])


@cache
def _set_clock_steps() -> Steps:
    set_it = Step(lib.KVM_SET_CLOCK, _shape().apart_at), 0
    return Steps([[set_it, (Step(lib.KVM_GET_CLOCK, _shape().held_at("clock")), 0)]])


@cache
def _save_steps() -> Steps:
    return Steps([[(Step(_requests(item)[0], _shape().saved_at(item)), 0) for item in ("pit2", *CHIPS)]])


@lru_cache(4)
def _load_steps(items: tuple[str, ...]) -> Steps:
    return Steps([[*_steps_of(item)] for item in items])


def _steps_of(item: str) -> Iterator[tuple[Step, int]]:
    get, put = _requests(item)
    saved, held, part = _shape().saved_at(item), _shape().held_at(item), _shape().parts[item]
    yield Step(put, saved), 0
    yield Step(get, held, held + part.offset, saved + part.offset, part.nr_wire_bytes), 0


def _requests(item: str) -> tuple[int, int]:
    return _PIT_REQUESTS if item == "pit2" else _CHIP_REQUESTS


def image_of(vm: Vm) -> VmImage:
    """The image of ``vm``."""
    image: VmImage | None = vm.image
    if image is None:
        vm.image = image = VmImage(vm)
    return image
