"""Control frames that go in one piece, made and taken apart by one call into the C core: a guest may wait for them."""

from __future__ import annotations

from collections.abc import Iterable

from .._core import ffi, lib
from ..errors import TooLarge
from ..state import section
from ..state.frame import FLAG_MANDATORY, HEADER, MAX_PAYLOAD_BYTES, FrameKind
from ..state.section import Section, decode_well_formed

_ROOM = bytes(HEADER.size)
_LIMITS = ffi.new("struct kmig_plain_limits *", [section.MAX_STR_BYTES, section.MAX_BIN_BYTES, section.MAX_ITEMS])


def join(frames: Iterable[tuple[FrameKind, bytes]], sequence: int, *, mandatory: bool = True) -> tuple[bytearray, int]:
    """``frames``, numbered from ``sequence`` on, as bytes, and how many they are. Raises :class:`TooLarge`."""
    flags = FLAG_MANDATORY if mandatory else 0
    pieces: list[bytes] = []
    heads: list[tuple[int, int, int, int]] = []
    for kind, payload in frames:
        if len(payload) > MAX_PAYLOAD_BYTES:
            raise TooLarge(f"a {kind.name} frame of {len(payload)} bytes is over the limit of {MAX_PAYLOAD_BYTES}")
        pieces += (_ROOM, payload)
        heads.append((kind, flags, 0, len(payload)))
    data = bytearray().join(pieces)
    lib.kmig_frames_seal(ffi.from_buffer(data), ffi.new("struct kmig_frame[]", heads), len(heads), sequence)
    return data, len(heads)


def split_sections(data: bytes, nr_frames: int, sequence: int) -> list[Section] | None:
    """The sections of ``nr_frames`` undamaged SECTION frames, numbered from ``sequence`` on, which are all of ``data``.
    None when there is anything to complain about, or that C leaves to a decoder. Raises :class:`StreamError`."""
    frames = ffi.new("struct kmig_frame[]", nr_frames)
    limits = (FrameKind.SECTION, sequence, _LIMITS)
    if not lib.kmig_frames_split(ffi.from_buffer(data), len(data), *limits, frames, nr_frames):
        return None
    return [decode_well_formed(data[frame.at : frame.at + frame.length]) for frame in frames]
