"""A Linux guest for the emulated host to run: the distribution's kernel and an initramfs with a shell on its console.

Its init loads the virtio drivers, writes ``READY`` and then a heartbeat ten times a second, and runs what is typed on
the serial port. ``cpus`` in the console's output tells how many processors it found.
"""

from __future__ import annotations

import io
import shutil
import subprocess
import tempfile
from pathlib import Path

from .cpio import Archive
from .kernel import Kernel

KERNEL, INITRD = "/guest/vmlinuz", "/guest/initrd"
FULL_KERNEL, FULL_VMLINUX, FULL_INITRD = "/guest/full/vmlinuz", "/guest/full/vmlinux", "/guest/full/initrd"
DRIVERS = (
    "virtio-mmio", "virtio-blk", "virtio-net", "virtio-rng", "virtio-console", "virtio-balloon", "pvpanic-mmio",
    "button", "evdev",
)  # fmt: skip
TOOLS = (
    "sh", "mount", "insmod", "cat", "ls", "echo", "sleep", "dmesg", "grep", "nproc", "stty", "poweroff", "reboot", "dd",
    "md5sum", "sync", "ifconfig", "ip", "ping", "nc", "wc", "cut", "usleep", "cmp", "uptime", "mkdir", "awk", "kill",
    "pkill", "od", "udhcpc",
)  # fmt: skip
LOAD = Path(__file__).with_name("load.c")
INIT = """#!/bin/sh
export PATH=/bin
mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev; mount -t tmpfs tmp /tmp
for module in {drivers}; do insmod /modules/$module.ko; done
stty -echo -onlcr
echo "cpus $(nproc), clock $(cat /sys/devices/system/clocksource/clocksource0/current_clocksource)"
echo READY
(n=0; while :; do n=$((n + 1)); echo "H 0 $n"; usleep 100000; done) &
while read -r line; do eval "$line"; done
poweroff -f
"""


def add_guest(archive: Archive, kernel: Kernel) -> None:
    """Put the guest's kernel and initramfs into the host's file system, and the work for both to do."""
    load = _build_load()
    archive.add(kernel.image, KERNEL)
    archive.add_bytes(INITRD, _initramfs(kernel, load))
    archive.add_bytes("bin/load", load, 0o755)


def _build_load() -> bytes:
    with tempfile.TemporaryDirectory() as directory:
        program = Path(directory) / "load"
        command = ["gcc", "-static", "-O2", "-s", "-Wall", "-Wextra", "-Werror", "-o", str(program), str(LOAD)]
        subprocess.run(command, check=True)
        return program.read_bytes()


def add_full_guest(archive: Archive, kernel: Kernel) -> None:
    """Put the kernel for real machines in beside it: as bzImage, as the ELF file in that, and with its own modules."""
    archive.add(kernel.image, FULL_KERNEL)
    archive.add_bytes(FULL_VMLINUX, kernel.vmlinux())
    archive.add_bytes(FULL_INITRD, _initramfs(kernel, _build_load()))


def _initramfs(kernel: Kernel, load: bytes) -> bytes:
    out = io.BytesIO()
    archive = Archive(out)
    for name in ("proc", "sys", "dev", "tmp"):
        archive.add_directory(name)
    archive.add(Path(shutil.which("busybox") or "/bin/busybox").resolve(), "/bin/busybox")
    for tool in TOOLS:
        archive.add_link(f"bin/{tool}", "busybox")
    drivers = kernel.modules(DRIVERS)
    for name, content in drivers:
        archive.add_bytes(f"modules/{name}.ko", content)
    archive.add_bytes("bin/load", load, 0o755)
    archive.add_bytes("init", INIT.format(drivers=" ".join(name for name, _ in drivers)).encode(), 0o755)
    archive.close()
    return out.getvalue()
