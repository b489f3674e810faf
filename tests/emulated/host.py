"""Boots the emulated host and waits until its command is done."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

MEMORY = "3G"
APPEND = "console=ttyS0 quiet panic=-1 mitigations=off random.trust_cpu=on rdinit=/init"


@dataclass(frozen=True)
class Outcome:
    """What a run of the host left: its console, what it sent out, and its command's exit status (None: no end)."""

    status: int | None
    console: str
    sent: str


def qemu() -> str:
    """The emulator. Raises RuntimeError when it is not installed."""
    found = shutil.which("qemu-system-x86_64")
    if found is None:
        raise RuntimeError("qemu-system-x86_64 is not installed: run make deps-test")
    return found


def boot(image: Path, archives: list[Path], directory: Path, timeout_s: float, *more: str, cpus: int) -> Outcome:
    """Run the host to its end, or until ``timeout_s``; ``directory`` takes what it sends, ``more`` goes to QEMU."""
    initramfs, sent, console = directory / "initramfs", directory / "sent", directory / "console"
    with initramfs.open("wb") as out:
        for archive in archives:
            out.write(archive.read_bytes())
    command = [qemu(), "-accel", "tcg,thread=multi", "-cpu", "max", "-smp", str(cpus), "-m", MEMORY, "-nodefaults"]
    command += ["-no-user-config", "-display", "none", "-no-reboot", "-serial", "stdio", "-serial", f"file:{sent}"]
    command += ["-kernel", str(image), "-initrd", str(initramfs), "-append", APPEND, *more]
    with console.open("wb") as out:
        try:
            subprocess.run(
                command, check=False, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, timeout=timeout_s
            )
        except subprocess.TimeoutExpired:
            out.write(f"\nhost: switched off after {timeout_s:g} s\n".encode())
    text = console.read_text(errors="replace").replace("\r", "")
    status = re.search(r"^host: exit status (\d+)$", text, re.MULTILINE)
    # A terminal line: what was sent as a line feed comes as carriage return and line feed.
    return Outcome(int(status[1]) if status else None, text, sent.read_text(errors="replace").replace("\r", ""))
