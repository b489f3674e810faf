"""Hardware breakpoints as the debug registers have them (Intel SDM volume 3, 18.2.4, debug control register)."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import ConfigError

MAX_BREAKPOINTS = 4
_KINDS = {"x": 0b00, "w": 0b01, "rw": 0b11}
_LENGTHS = {1: 0b00, 2: 0b01, 4: 0b11, 8: 0b10}
_DR7_FIXED = 0x400
_DR7_GLOBAL_EXACT = 0x200


def debug_registers(breakpoints: Sequence[tuple[int, str, int]]) -> list[int]:
    """DR0 to DR7 for up to four (linear address, kind, length in bytes). Raises :class:`ConfigError`."""
    if len(breakpoints) > MAX_BREAKPOINTS:
        raise ConfigError(f"{len(breakpoints)} breakpoints: the CPU has {MAX_BREAKPOINTS}")
    registers = [0] * 8
    dr7 = _DR7_FIXED | _DR7_GLOBAL_EXACT
    for n, (address, kind, length) in enumerate(breakpoints):
        _check(address, kind, length)
        registers[n] = address
        dr7 |= 0b10 << (2 * n)
        dr7 |= (_KINDS[kind] | _LENGTHS[length] << 2) << (16 + 4 * n)
    registers[7] = dr7
    return registers


def _check(address: int, kind: str, length: int) -> None:
    if kind not in _KINDS or length not in _LENGTHS:
        raise ConfigError(f"a breakpoint {kind!r} of {length} bytes cannot be had: take x, w or rw and 1, 2, 4 or 8")
    if kind == "x" and length != 1:
        raise ConfigError(f"an execution breakpoint has length 1, not {length}")
    if address % length or not 0 <= address < 1 << 64:
        raise ConfigError(f"a breakpoint of {length} bytes at {address:#x} is not aligned: take a multiple of {length}")
