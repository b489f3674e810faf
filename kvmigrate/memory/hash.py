"""The hash by which bytes are told apart throughout: XXH3-64 of the C core."""

from __future__ import annotations

from .._core import ffi, lib


def hash_bytes(data: bytes) -> int:
    """XXH3-64 of ``data``."""
    return int(lib.kmig_hash(ffi.from_buffer(data), len(data)))
