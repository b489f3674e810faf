"""A saved state is hostile: what cannot be right is refused before anything is set."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from kvmigrate.errors import BadField, RestoreRefused
from kvmigrate.kvm.vm_state import load_state, save_state

from .moving import oracle, over_the_wire
from .tiny import TinyVm

pytestmark = pytest.mark.kvm


def damage(body: dict[str, Any], path: tuple[Any, ...], value: Any) -> None:
    for key in path[:-1]:
        body = body[key]
    if value is KeyError:
        del body[path[-1]]
    else:
        body[path[-1]] = value


HOSTILE: list[tuple[tuple[Any, ...], Any]] = [
    (("id",), 1),
    (("regs",), []),
    (("regs", "rip"), KeyError),
    (("regs", "r16"), 0),
    (("regs", "rax"), 1 << 64),
    (("regs", "rax"), -1),
    (("regs", "rax"), 1.0),
    (("regs", "rax"), True),
    (("regs", "rax"), "1"),
    (("sregs2", "cs", "dpl"), 256),
    (("sregs2", "pdptrs"), [0, 0, 0]),
    (("sregs2", "gdt"), None),
    (("debugregs", "db"), [0] * 5),
    (("lapic", "regs"), bytes(1023)),
    (("lapic", "regs"), bytes(1025)),
    (("xcrs", "nr_xcrs"), 17),
    (("xcrs", "nr_xcrs"), 2),
    (("xcrs", "xcrs"), [{"xcr": 0}]),
    (("xsave",), bytes(575)),
    (("xsave",), bytes(70000)),
    (("xsave",), "text"),
    (("cpuid",), []),
    (("cpuid",), [{"function": 1}]),
    (("msrs", "MSR_LSTAR"), 1 << 64),
    (("msrs", "MSR_LSTAR"), True),
    (("msrs", "MSR_NONSENSE"), 1),
    (("msrs", "0xc0000082"), 1),
    (("msrs",), {f"0x{n:x}": 0 for n in range(5000)}),
    (("tsc_khz",), 0),
    (("tsc_offset",), 1 << 64),
    (("unknown",), 1),
    (("vcpu_events", "exception", "nr"), KeyError),
]


@pytest.mark.parametrize(("path", "value"), HOSTILE, ids=lambda part: str(part)[:40])
def test_a_hostile_vcpu_body_is_refused_before_anything_is_set(
    pair: tuple[TinyVm, TinyVm], path: tuple[Any, ...], value: Any
) -> None:
    source, target = pair
    untouched = save_state(target.vm)
    vm, vcpus = over_the_wire(save_state(source.vm))
    damage(vcpus[0], path, value)
    with pytest.raises(BadField, match="vcpu0"):
        load_state(target.vm, vm, vcpus)
    assert oracle(untouched, target) == []


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("clock", "clock"), 1 << 63),
        (("clock", "flags"), 1 << 20),
        (("clock",), KeyError),
        (("host_tsc",), -1),
        (("pit2", "channels"), []),
        (("pit2", "channels", 0, "count"), 1 << 32),
        (("ioapic", "redirtbl"), [{"bits": 0}] * 23),
        (("pic_slave", "irr"), 256),
        (("pic_master",), KeyError),
        (("extra",), 1),
    ],
    ids=lambda part: str(part)[:40],
)
def test_a_hostile_vm_body_is_refused_before_anything_is_set(
    pair: tuple[TinyVm, TinyVm], path: tuple[Any, ...], value: Any
) -> None:
    source, target = pair
    untouched = save_state(target.vm)
    vm, vcpus = over_the_wire(save_state(source.vm))
    damage(vm, path, value)
    with pytest.raises(BadField, match="vm"):
        load_state(target.vm, vm, vcpus)
    assert oracle(untouched, target) == []


def test_an_xsave_area_with_foreign_components_is_refused(pair: tuple[TinyVm, TinyVm]) -> None:
    source, target = pair
    vm, vcpus = over_the_wire(save_state(source.vm))
    area = bytearray(vcpus[0]["xsave"])
    for at, bit, error in (
        (512 + 5, 1 << 7, RestoreRefused),
        (520, 1, BadField),
        (560, 1, BadField),
        (26, 2, BadField),
    ):
        broken = copy.deepcopy(vcpus)
        area_now = bytearray(area)
        area_now[at] |= bit
        broken[0]["xsave"] = bytes(area_now)
        with pytest.raises(error, match="xsave"):
            load_state(target.vm, vm, broken)
    longer = copy.deepcopy(vcpus)
    longer[0]["xsave"] = bytes(area) + bytes(4) + b"\1\0\0\0"
    with pytest.raises(RestoreRefused, match="xsave"):
        load_state(target.vm, vm, longer)
    longer[0]["xsave"] = bytes(area) + bytes(8)
    load_state(target.vm, vm, longer).require()
