"""The emulated host's kernel: the distribution's package, unpacked, never installed."""

from __future__ import annotations

import lzma
import re
import struct
import subprocess
from collections.abc import Iterable
from pathlib import Path

import zstandard

# Meta packages in order of preference: Debian's, Ubuntu's. Each depends on the image of one version.
META_PACKAGES = ("linux-image-cloud-amd64", "linux-image-virtual", "linux-image-generic")
FULL_META_PACKAGES = ("linux-image-amd64", "linux-image-generic")
"""Of the kernel for real machines; these have an image that Python can unpack."""
MODULES = ("kvm-amd", "tun", "bridge", "virtio-pci", "virtio-net", "virtio-blk")


class Kernel:
    """An unpacked kernel package: ``image`` and the modules that the host loads."""

    def __init__(self, directory: Path) -> None:
        self.image = next(iter(sorted((directory / "boot").glob("vmlinuz-*"))))
        self._modules = {
            path.name.split(".")[0].replace("_", "-"): path
            for pattern in ("*.ko", "*.ko.xz", "*.ko.zst")
            for path in (directory / "lib/modules").rglob(pattern)
        }

    def modules(self, names: Iterable[str] = MODULES) -> list[tuple[str, bytes]]:
        """What to insert for ``names``: each name with its content, after what it depends on."""
        found: dict[str, bytes] = {}
        for name in names:
            self._add(name, found)
        return list(found.items())

    def _add(self, name: str, found: dict[str, bytes]) -> None:
        """Add ``name`` after its dependencies; one that is no file is built into the kernel."""
        path = self._modules.get(name)
        if path is None or name in found:
            return
        content = _unpacked(path)
        depends = re.search(rb"\0depends=([^\0]*)", content)
        for other in (depends[1].decode() if depends else "").split(","):
            self._add(other.replace("_", "-"), found)
        found[name] = content

    def vmlinux(self) -> bytes:
        """The ELF file that the bzImage carries (linux Documentation/arch/x86/boot.rst, payload_offset)."""
        data = self.image.read_bytes()
        offset, size = struct.unpack_from("<II", data, 0x248)
        start = (data[0x1F1] + 1) * 512 + offset
        payload = data[start : start + size]
        if payload.startswith(b"\xfd7zXZ"):
            # Behind the stream stands the size that it unpacks to.
            return lzma.LZMADecompressor().decompress(payload)
        if payload.startswith(b"\x28\xb5\x2f\xfd"):
            return zstandard.ZstdDecompressor().decompressobj().decompress(payload)
        raise RuntimeError(f"{self.image}: a payload of an unknown kind, {payload[:4].hex()}")


def _unpacked(path: Path) -> bytes:
    data = path.read_bytes()
    if path.suffix == ".xz":
        return lzma.decompress(data)
    if path.suffix == ".zst":
        return zstandard.ZstdDecompressor().decompressobj().decompress(data)
    return data


def fetch(cache: Path, meta_packages: Iterable[str] = META_PACKAGES) -> Kernel:
    """The newest kernel that apt offers for the first of ``meta_packages`` that it knows, from ``cache`` when it is
    there. Raises RuntimeError."""
    directory = cache / "kernel"
    if not (directory / "complete").exists():
        packages = _packages(tuple(meta_packages))
        directory.mkdir(parents=True, exist_ok=True)
        _run(["apt-get", "-o", "APT::Sandbox::User=root", "download", "-qq", *packages], directory)
        for package in sorted(directory.glob("*.deb")):
            _run(["dpkg", "-x", package.name, "."], directory)
            package.unlink()
        (directory / "complete").touch()
    return Kernel(directory)


def _packages(meta_packages: tuple[str, ...]) -> list[str]:
    """The package with the image, and the one with its modules where the distribution keeps them apart."""
    for meta in meta_packages:
        for package in _depends(meta):
            if package.startswith("linux-image-"):
                return [package, *(name for name in _depends(package) if name.startswith("linux-modules-"))]
    raise RuntimeError(f"apt knows none of {', '.join(meta_packages)}: run apt-get update")


def _depends(package: str) -> list[str]:
    shown = subprocess.run(["apt-cache", "depends", package], check=False, capture_output=True, text=True)
    return re.findall(r"^ *\|?Depends: (\S+)$", shown.stdout, re.MULTILINE)


def _run(command: list[str], directory: Path) -> None:
    done = subprocess.run(command, cwd=directory, check=False, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip() or done.stdout.strip()}")
