"""The test guests of kvmigrate: multiboot images in assembly, built together with the package.

``ledger`` writes to its memory all the time and checks all of it for ever; ``idle`` sleeps and prints one
heartbeat per wake; ``writer`` rewrites a part of its memory at a given speed. Their parameters are listed at the
end of ``setup.S``.
"""

from __future__ import annotations

from pathlib import Path

from ..errors import ConfigError

NAMES = ("idle", "ledger", "writer")


def path(name: str) -> Path:
    """Where the image of the guest ``name`` lies.

    Raises :class:`ConfigError` for a name that is not in :data:`NAMES` and for an image that was not built.
    """
    if name not in NAMES:
        raise ConfigError(f"{name!r} is not a guest of this package: take one of {', '.join(NAMES)}")
    image = Path(__file__).with_name(f"{name}.elf")
    if not image.is_file():
        raise ConfigError(f"{image} was not built: install gcc and binutils, then run pip install -e . again")
    return image
