"""Which boot method an image wants, for ``--boot auto``."""

from __future__ import annotations

from .image import Image
from .multiboot import find_header

SECTOR_BYTES = 512
SECTOR_SIGNATURE = b"\x55\xaa"


def detect(image: Image) -> str:
    """``multiboot`` or ``flat``. Raises :class:`ConfigError` that says what was looked for."""
    if find_header(image) is not None:
        return "multiboot"
    if len(image.data) >= SECTOR_BYTES and image.data[510:512] == SECTOR_SIGNATURE:
        return "flat"
    raise image.error(
        "no boot method fits: no multiboot header, no boot sector signature; say --boot flat@ADDR for a plain binary"
    )
