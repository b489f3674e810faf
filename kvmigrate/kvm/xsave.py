"""The XSAVE area of another host: is it one that this host's CPU can load, and did it come back as it was?

Layout: Intel SDM volume 1, 13.4: 512 bytes of FXSAVE image, 64 bytes of header, then the components. KVM speaks the
standard form (XCOMP_BV is 0), whose component offsets are the same on all CPUs of one maker (CPUID leaf 0xD).
"""

from __future__ import annotations

import struct

from ..errors import BadField, RestoreRefused
from ..state.fidelity import Fidelity, first_difference
from ..state.section import Value
from .host import Host

MAX_XSAVE_BYTES = 64 << 10
_HEADER_AT = 512
_EXTENDED_AT = 576
_XSTATE_BV = struct.Struct("<QQ48s")
_MXCSR = struct.Struct("<II")
_MXCSR_AT = 24


def parse_xsave(value: Value, host: Host, own_bytes: int, where: str) -> bytes:
    """Check a saved XSAVE area, which is hostile, against itself. ``own_bytes`` is the size of this host's.

    Raises :class:`BadField` when no CPU can have saved it, :class:`RestoreRefused` when this one cannot load it."""
    if type(value) is not bytes or not _EXTENDED_AT <= len(value) <= MAX_XSAVE_BYTES or len(value) % 4:
        raise BadField(f"{where}: expected {_EXTENDED_AT} to {MAX_XSAVE_BYTES} bytes, a multiple of 4")
    xstate_bv, xcomp_bv, reserved = _XSTATE_BV.unpack_from(value, _HEADER_AT)
    if xcomp_bv or any(reserved):
        raise BadField(f"{where}: the header has reserved bits set")
    foreign = xstate_bv & ~host.xstate_mask
    if foreign:
        raise RestoreRefused(f"{where}.xstate_bv", hex(xstate_bv), hex(host.xstate_mask), "components missing here")
    mxcsr, _ = _MXCSR.unpack_from(value, _MXCSR_AT)
    if mxcsr & ~0x1FFFF:
        raise BadField(f"{where}: MXCSR {mxcsr:#x} has reserved bits set")
    if any(value[own_bytes:]):
        raise RestoreRefused(where, f"{len(value)} bytes", f"{own_bytes} bytes", "the rest is not empty")
    return value[:own_bytes].ljust(own_bytes, b"\0")


def compare_xsave(saved: bytes, read_back: bytes, fidelity: Fidelity, where: str) -> None:
    """Exact when all bytes are equal. The mask of MXCSR tells of the CPU, not of the guest, and is left out."""
    mask_at = _MXCSR_AT + 4
    if saved[:mask_at] == read_back[:mask_at] and saved[mask_at + 4 :] == read_back[mask_at + 4 :]:
        fidelity.exact(where)
        return
    at = first_difference(saved, read_back)
    fidelity.refused(f"{where}[{at}]", saved[at : at + 16], read_back[at : at + 16], "the register file differs here")
