"""Comparison of two digests of a guest: every page and every item of state, clocks apart."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgpack

from tests.backends import EMULATED

from .heartbeat import OracleError

HASH_BYTES = 8
CLOCKS = (
    r"vm\.clock\.(clock|host_tsc|realtime):",
    r"vm\.host_tsc:",
    r"vm\.pit2\.channels\[\d\]\.count_load_time:",
    r"vcpu\d+\.msrs\.MSR_IA32_TSC:",
    r"vcpu\d+\.msrs\.MSR_KVM_WALL_CLOCK(_NEW)?: \d+ -> 0$",
)
"""What goes on by itself between two looks, or is a request that is not made again; everything else must not differ."""
UNSTABLE_TSC = r"vcpu\d+\.tsc_offset:"
"""Goes on as well where the host's TSC is unstable, as an emulated one's is: KVM moves the offset whenever a vCPU is
loaded (Linux, kvm_arch_vcpu_load)."""
_IRR, _LVT_TIMER, _CURRENT_COUNT = 0x200, 0x320, 0x390
_PIT_PIC_LINE, _PIT_IOAPIC_PINS = 1 << 0, 1 << 0 | 1 << 2


def load_pairs(directory: Path) -> list[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """Every (stopped here, started there) pair that the witnesses wrote, in time's order."""
    found = [(path.name.split(".")[1], json.loads(path.read_text())) for path in sorted(directory.glob("*.json"))]
    outs = [digest for direction, digest in found if direction == "out"]
    ins = [digest for direction, digest in found if direction == "in"]
    assert len(outs) == len(ins), f"{len(outs)} guests stopped for good and {len(ins)} started"
    return list(zip(outs, ins, strict=True))


def require_equal(out: Mapping[str, Any], into: Mapping[str, Any]) -> int:
    """Raise :class:`OracleError` at any difference; the number of pages compared."""
    pages = sum(compare_pages(out, into))
    require_state(out, into)
    return pages


def require_state(out: Mapping[str, Any], into: Mapping[str, Any]) -> None:
    """Raise :class:`OracleError` when an item of state differs that is no clock."""
    differences = [text for text in state_differences(out, into) if not is_clock(text)]
    if differences:
        raise OracleError("state digest", f"{len(differences)} items differ: {'; '.join(differences[:5])}")


def compare_pages(out: Mapping[str, Any], into: Mapping[str, Any]) -> Iterator[int]:
    """The number of pages of each slot. Raises :class:`OracleError` when one differs."""
    if [_shape(slot) for slot in out["slots"]] != [_shape(slot) for slot in into["slots"]]:
        raise OracleError("page digest", "the slots differ")
    for one, other in zip(out["slots"], into["slots"], strict=True):
        left, right = base64.b64decode(one["hashes"]), base64.b64decode(other["hashes"])
        if left != right:
            gfns = [one["base-gfn"] + at for at in range(one["nr-pages"]) if _hash(left, at) != _hash(right, at)]
            raise OracleError("page digest", f"{len(gfns)} pages differ, first at gfn {gfns[0]:#x}")
        yield one["nr-pages"]


def _shape(slot: Mapping[str, Any]) -> tuple[int, int]:
    return slot["base-gfn"], slot["nr-pages"]


def _hash(words: bytes, at: int) -> bytes:
    return words[at * HASH_BYTES : (at + 1) * HASH_BYTES]


def state_differences(out: Mapping[str, Any], into: Mapping[str, Any]) -> list[str]:
    """``section.path: saved -> found`` for every item that differs."""
    found: list[str] = []
    for name in sorted(out["state"].keys() | into["state"].keys()):
        left, right = (_unpacked(side["state"].get(name)) for side in (out, into))
        found += _differences(name, left, right)
    return found


def _unpacked(text: str | None) -> Any:
    body = None if text is None else msgpack.unpackb(base64.b64decode(text), strict_map_key=False)
    if body and "lapic" in body:
        body["lapic"]["regs"] = _without_timer(bytearray(body["lapic"]["regs"]))
    if body and "pic_master" in body:
        # The PIT ticks while no vCPU runs: whether its interrupt is pending is a matter of time.
        for name in ("irr", "last_irr"):
            body["pic_master"][name] &= ~_PIT_PIC_LINE
        body["ioapic"]["irr"] &= ~_PIT_IOAPIC_PINS
    return body


def _without_timer(registers: bytearray) -> dict[str, str]:
    """The local APIC's registers by offset, without its timer's count and without whether its interrupt is pending."""
    registers[_CURRENT_COUNT : _CURRENT_COUNT + 4] = bytes(4)
    vector = registers[_LVT_TIMER]
    registers[_IRR + vector // 32 * 16 + vector % 32 // 8] &= ~(1 << vector % 8)
    return {f"{at:#x}": registers[at : at + 4].hex() for at in range(0, len(registers), 16)}


def _differences(path: str, left: Any, right: Any) -> Iterator[str]:
    if isinstance(left, dict) and isinstance(right, dict):
        for key in sorted(left.keys() | right.keys(), key=str):
            yield from _differences(f"{path}.{key}", left.get(key), right.get(key))
    elif isinstance(left, list) and isinstance(right, list) and len(left) == len(right):
        for at, (one, other) in enumerate(zip(left, right, strict=True)):
            yield from _differences(f"{path}[{at}]", one, other)
    elif left != right:
        yield f"{path}: {left!r:.60} -> {right!r:.60}"


def is_clock(text: str, *, unstable_tsc: bool = EMULATED) -> bool:
    """Whether the difference ``text`` is of an item that goes on by itself, see :data:`CLOCKS`."""
    return any(re.match(pattern, text) for pattern in (*CLOCKS, *[UNSTABLE_TSC] * unstable_tsc))
