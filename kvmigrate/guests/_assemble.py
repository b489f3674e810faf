"""Assembles the guests when the package is built; setup.py loads this by path, the package being unbuilt.

Needs gcc and binutils, as the C core does. The images are linked as 64-bit code, then wrapped as 32-bit ELF,
which is what multiboot 1 loads.
"""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path

from setuptools.command.build_py import build_py

SOURCES = Path("kvmigrate/guests")
COMMON = ("boot", "traps", "output", "setup", "memory", "heartbeat")
GUESTS = {"idle": (), "ledger": ("pages", "registers"), "writer": ()}

LINK = ("-m", "elf_x86_64", "-nostdlib", "--build-id=none", "--no-warn-rwx-segments", "--fatal-warnings")


def run(*command: str | Path) -> None:
    """Run a tool of binutils. Raises :class:`subprocess.CalledProcessError`."""
    subprocess.run([str(word) for word in command], check=True)


def assemble(name: str, target: Path) -> None:
    """Build the guest ``name`` to the file ``target``. Raises :class:`subprocess.CalledProcessError`."""
    with tempfile.TemporaryDirectory() as scratch:
        objects = []
        for source in (*COMMON, *GUESTS[name], name):
            objects.append(Path(scratch, f"{source}.o"))
            run("gcc", "-m64", "-c", "-Wa,--fatal-warnings", "-o", objects[-1], SOURCES / f"{source}.S")
        image = Path(scratch, name)
        run("ld", *LINK, "-T", SOURCES / "guest.ld", "-o", image, *objects)
        run("objcopy", "--strip-all", "-O", "elf32-i386", image, target)


class BuildPy(build_py):
    """Assembles into the source tree, where editable installs look and where package_data is copied from."""

    def run(self) -> None:
        for name in GUESTS:
            assemble(name, SOURCES / f"{name}.elf")
        super().run()
