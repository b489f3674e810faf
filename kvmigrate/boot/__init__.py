"""How a guest's image becomes memory and registers: flat binaries, multiboot, PVH and Linux."""

from __future__ import annotations

from ..config import MAX_CMDLINE_BYTES, BootConfig
from ..errors import ConfigError
from ..memory.region import GuestMemory
from ..record import dataclass
from .detect import detect
from .entry import EntryState
from .flat import load_flat
from .hardware import Hardware, VirtioSlot
from .image import MAX_IMAGE_BYTES, Image, read_image
from .linux import load_linux
from .multiboot import load_multiboot
from .plan import LoadPlan
from .pvh import load_pvh

LOADERS = {"linux": load_linux, "multiboot": load_multiboot, "pvh": load_pvh}

__all__ = ["BootFiles", "EntryState", "Hardware", "VirtioSlot", "load_boot", "read_files"]


@dataclass(frozen=True, slots=True)
class BootFiles:
    """The files of a :class:`BootConfig`, read whole."""

    image: Image
    initrd: Image | None


def read_files(boot: BootConfig, memory_bytes: int) -> BootFiles:
    """The files that a guest with ``memory_bytes`` of RAM boots. Raises :class:`ConfigError`, naming the file."""
    image = read_image(boot.image, "image", MAX_IMAGE_BYTES)
    return BootFiles(image, read_image(boot.initrd, "initrd", memory_bytes) if boot.initrd else None)


def load_boot(
    memory: GuestMemory,
    boot: BootConfig,
    memory_bytes: int,
    hardware: Hardware | None = None,
    files: BootFiles | None = None,
) -> EntryState:
    """Load ``boot`` into guest ``memory`` of ``memory_bytes``, all zero so far, and say how the first vCPU starts.

    ``hardware`` is what the ACPI tables of a Linux or PVH guest tell of the machine; ``files`` are those of ``boot``
    when they have been read already.

    All is checked before the first byte is written. Raises :class:`ConfigError`, naming the file.
    """
    found = files or read_files(boot, memory_bytes)
    plan = LoadPlan(found.image, memory_bytes, hardware)
    entry = _load(plan, boot, found.initrd)
    plan.write(memory)
    return entry


def _load(plan: LoadPlan, boot: BootConfig, initrd: Image | None) -> EntryState:
    method = detect(plan.image) if boot.method == "auto" else boot.method
    cmdline = _encode_cmdline(boot.cmdline)
    if method in LOADERS:
        return LOADERS[method](plan, initrd, cmdline)
    if method == "flat":
        if initrd is not None or cmdline:
            raise plan.image.error("a flat image takes neither an initrd nor a command line")
        return load_flat(plan, boot.load_addr)
    raise plan.image.error(f"{method!r} is not a boot method: take auto, flat@ADDR, multiboot, pvh or linux")


def _encode_cmdline(text: str) -> bytes:
    cmdline = text.encode("utf-8", "surrogateescape")
    if b"\0" in cmdline or len(cmdline) > MAX_CMDLINE_BYTES:
        raise ConfigError(f"a command line must not hold NUL nor be longer than {MAX_CMDLINE_BYTES} bytes")
    return cmdline
