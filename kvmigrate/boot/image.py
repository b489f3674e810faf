"""An image file: read whole, within a limit, and the name for every error about it."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from ..errors import ConfigError
from ..record import dataclass

MAX_IMAGE_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class Image:
    """The bytes of the file at ``path``."""

    path: Path
    data: bytes

    def error(self, text: str) -> ConfigError:
        """An error that names the file."""
        return ConfigError(f"{self.path}: {text}")

    def bytes_at(self, offset: int, size: int, what: str) -> memoryview:
        """``size`` bytes from ``offset``; raises :class:`ConfigError` when the file ends before."""
        if offset < 0 or size < 0 or offset + size > len(self.data):
            raise self.error(
                f"{what} lies at {offset:#x} with {size:#x} bytes, the file has {len(self.data):#x}: is it cut short?"
            )
        return memoryview(self.data)[offset : offset + size]


def read_image(path: Path, what: str, max_bytes: int) -> Image:
    """Read a regular file of at most ``max_bytes``. Raises :class:`ConfigError`."""
    try:
        with open(path, "rb", opener=_open_at_once) as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise ConfigError(f"{path}: the {what} is not a regular file")
            # A read makes room for all that it is asked for, and the most that is taken may be all the memory there is.
            data = file.read(found.st_size + 1) if found.st_size <= max_bytes else b""
    except OSError as error:
        raise ConfigError(f"{path}: the {what} cannot be read: {error.strerror}") from error
    if found.st_size > max_bytes:
        raise ConfigError(f"{path}: the {what} is larger than {max_bytes} bytes")
    if len(data) > found.st_size:
        raise ConfigError(f"{path}: the {what} grows while it is read: try again when it is complete")
    if not data:
        raise ConfigError(f"{path}: the {what} is empty")
    return Image(path, data)


def _open_at_once(path: str, flags: int) -> int:
    """Opening a FIFO without O_NONBLOCK would wait for a writer."""
    return os.open(path, flags | os.O_NONBLOCK)
