"""What a guest was booted from: it travels with the guest, which is to boot the same again wherever it is reset."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import xxhash

from ..config import BOOT_METHODS, MAX_CMDLINE_BYTES, MAX_MEMORY_BYTES, BootConfig
from ..errors import BadField, ConfigError
from ..record import dataclass, replace
from ..state.section import Fields, Value

if TYPE_CHECKING:
    from ..boot import BootFiles
    from ..boot.image import Image

MAX_PATH_BYTES = 4095


@dataclass(frozen=True, slots=True)
class BootSource:
    """A boot configuration whose paths are absolute, and the XXH3-64 of its files. Those may be the word of a peer: a
    path is opened at a reset only, and what is not the same file is not used."""

    config: BootConfig
    image_hash: int
    initrd_hash: int = 0

    @classmethod
    def of(cls, config: BootConfig, files: BootFiles) -> BootSource:
        """Of a guest that starts here and now."""
        initrd = config.initrd.absolute() if config.initrd else None
        absolute = replace(config, image=config.image.absolute(), initrd=initrd)
        initrd_hash = xxhash.xxh3_64_intdigest(files.initrd.data) if files.initrd else 0
        return cls(absolute, xxhash.xxh3_64_intdigest(files.image.data), initrd_hash)

    def read(self, memory_bytes: int) -> BootFiles:
        """The files, for a guest with ``memory_bytes`` of RAM. Raises :class:`ConfigError`, naming the one that is
        missing here or is another than it was."""
        # Not at the top: needed by a guest that reboots alone.
        from ..boot import read_files

        for path in filter(None, (self.config.image, self.config.initrd)):
            # Before it is opened: to open some devices is enough to change what they do.
            if not path.is_file():
                raise ConfigError(f"{path}, which it was booted from, is not here")
        files = read_files(self.config, memory_bytes)
        _require_same(files.image, self.image_hash)
        if files.initrd is not None:
            _require_same(files.initrd, self.initrd_hash)
        return files

    def to_value(self) -> dict[str, Value]:
        """As a msgpack map, as :func:`read_boot_source` reads it. Paths and the command line need not be valid text."""
        config = self.config
        return {
            "image": os.fsencode(config.image),
            "image_hash": self.image_hash,
            "method": config.method,
            "load_addr": config.load_addr,
            "initrd": os.fsencode(config.initrd) if config.initrd else b"",
            "initrd_hash": self.initrd_hash,
            "cmdline": config.cmdline.encode("utf-8", "surrogateescape"),
        }


def read_boot_source(value: Value) -> BootSource:
    """Check what a description says. Raises :class:`BadField`."""
    fields = Fields(value, "description: boot")
    image, initrd = _path(fields, "image"), _path(fields, "initrd")
    method = fields.text("method", 16)
    load_addr = fields.integer("load_addr", 0, MAX_MEMORY_BYTES)
    cmdline = fields.blob("cmdline", MAX_CMDLINE_BYTES).decode("utf-8", "surrogateescape")
    source = BootSource(
        BootConfig(image or Path(), method, load_addr, initrd, cmdline),
        fields.integer("image_hash"),
        fields.integer("initrd_hash"),
    )
    fields.done()
    if image is None or method not in BOOT_METHODS:
        raise BadField(f"description: boot: there is no image, or {method!r} is not a boot method")
    return source


def _path(fields: Fields, key: str) -> Path | None:
    packed = fields.blob(key, MAX_PATH_BYTES)
    if packed and (not packed.startswith(b"/") or b"\0" in packed):
        raise BadField(f"description: boot: field {key!r} is not an absolute path")
    return Path(os.fsdecode(packed)) if packed else None


def _require_same(file: Image, wanted: int) -> None:
    if xxhash.xxh3_64_intdigest(file.data) != wanted:
        raise file.error("this is not the file any more that it was booted from")
