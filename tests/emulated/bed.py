"""Puts the emulated host together, keeps what can be kept under build/emulated, and runs a command in it."""

from __future__ import annotations

import hashlib
import sys
import threading
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from . import cpio, guest, image, kernel
from .host import Outcome, boot

CACHE = image.ROOT / "build" / "emulated"
_building = threading.Lock()


def run(
    command: str,
    directory: Path,
    timeout_s: float,
    *more: str,
    cpus: int = 2,
    full: bool = False,
    laid_over: Sequence[Path] = (),
) -> Outcome:
    """Boot a fresh host of ``cpus`` that runs ``command`` with kvmigrate installed. ``directory`` keeps what it leaves;
    ``more`` is for QEMU; the archives ``laid_over`` are unpacked over the others. A ``full`` one has the distribution's
    kernel for real machines too, for a guest."""
    job = directory / "job.cpio"
    # One at a time: a build writes beside the sources.
    with _building:
        linux, base = prepare()
        image.write_job(job, linux, image.build_wheel(directory), command)
        archives = [base, *([prepare_full()] if full else []), job, *laid_over]
    return boot(linux.image, archives, directory, timeout_s, *more, cpus=cpus)


def prepare() -> tuple[kernel.Kernel, Path]:
    """The host's kernel, and the archive that all hosts have in common; what is there already is kept."""
    CACHE.mkdir(parents=True, exist_ok=True)
    linux = kernel.fetch(CACHE)
    base = CACHE / f"base-{_key(linux)}.cpio"
    if not base.exists():
        for old in CACHE.glob("base-*"):
            old.unlink()
        beside = base.with_suffix(".new")
        image.write_base(beside, linux)
        beside.rename(base)
    return linux, base


def prepare_full() -> Path:
    """The archive with the other kernel, which few hosts need; kept as well."""
    linux = kernel.fetch(CACHE / "full", kernel.FULL_META_PACKAGES)
    path = CACHE / f"full-{_key(linux)}.cpio"
    if not path.exists():
        for old in CACHE.glob("full-*"):
            old.unlink()
        beside = path.with_suffix(".new")
        with beside.open("wb") as out:
            archive = cpio.Archive(out)
            guest.add_full_guest(archive, linux)
            archive.close()
        beside.rename(path)
    return path


def _key(linux: kernel.Kernel) -> str:
    """Changes with anything that the base is made of."""
    packages = sorted(f"{one.name} {one.version}" for one in metadata.distributions())
    sources = [Path(str(module.__file__)).read_text() for module in (image, cpio, guest, kernel)]
    sources.append(guest.LOAD.read_text())
    parts = [sys.version, str(image.python()), linux.image.name, *packages, *sources]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
