"""Small real images, assembled and linked when a test needs them."""

from __future__ import annotations

import struct
import subprocess
from pathlib import Path

from kvmigrate.boot import load_boot
from kvmigrate.boot.entry import EntryState
from kvmigrate.config import BootConfig
from kvmigrate.memory.region import GuestMemory

MIB = 1 << 20
MULTIBOOT_MAGIC = 0x1BADB002
LINUX_CODE = bytes(range(256)) * 16


def link(directory: Path, source: str, *options: str, bits: int = 32) -> Path:
    """Assemble ``source`` and link it to an executable (or what ``options`` of ld say) for 32 or 64 bits."""
    emulation = {32: "elf_i386", 64: "elf_x86_64"}[bits]
    (directory / "image.S").write_text(source)
    subprocess.run(["as", f"--{bits}", "-o", "image.o", "image.S"], cwd=directory, check=True)
    command = ["ld", f"-m{emulation}", "-z", "max-page-size=4096", "-o", "image", "image.o", *options]
    subprocess.run(command, cwd=directory, check=True)
    return directory / "image"


def multiboot_header(flags: int) -> str:
    return f".balign 4\n.long {MULTIBOOT_MAGIC}, {flags}, {-(MULTIBOOT_MAGIC + flags) & 0xFFFFFFFF}\n"


def multiboot_source(flags: int = 3) -> str:
    """A kernel with data, 8 KiB of bss and its entry point behind the header."""
    return f""".text
{multiboot_header(flags)}
.globl _start
_start: cli
    hlt
.data
marker: .ascii "data of the kernel"
.bss
.skip 8192
"""


def multiboot_kernel(directory: Path, flags: int = 3) -> Path:
    return link(directory, multiboot_source(flags), "-Ttext=0x100000")


def pvh_source(note: str = '.long 4, 4, 18\n.asciz "Xen"\n.long pvh_entry') -> str:
    return f"""
.section .note.pvh, "a", @note
{note}
.text
.globl _start
_start: ud2
.code32
pvh_entry: cli
    hlt
"""


def pvh_kernel(directory: Path, source: str | None = None, bits: int = 64) -> Path:
    options = ("-Ttext=0x200000", "--section-start=.note.pvh=0x1ff000")
    return link(directory, pvh_source() if source is None else source, *options, bits=bits)


def bzimage(directory: Path, code: bytes = LINUX_CODE, **fields: int) -> Path:
    """A bzImage that is all header: ``code`` stands behind ``setup_sects`` sectors of setup code."""
    values = {
        "setup_sects": 4,
        "syssize": -(-len(code) // 16),
        "boot_flag": 0xAA55,
        "jump": 0x6AEB,
        "version": 0x20F,
        "loadflags": 0x01,
        "initrd_addr_max": 0x7FFFFFFF,
        "kernel_alignment": 0x200000,
        "relocatable_kernel": 1,
        "xloadflags": 0x7F,
        "cmdline_size": 2047,
        "pref_address": 0x1000000,
        "init_size": 0x800000,
    } | fields
    head = bytearray((values["setup_sects"] + 1) * 512)
    places = {
        "setup_sects": ("B", 0x1F1), "syssize": ("I", 0x1F4), "boot_flag": ("H", 0x1FE), "jump": ("H", 0x200),
        "version": ("H", 0x206), "loadflags": ("B", 0x211), "initrd_addr_max": ("I", 0x22C),
        "kernel_alignment": ("I", 0x230), "relocatable_kernel": ("B", 0x234), "xloadflags": ("H", 0x236),
        "cmdline_size": ("I", 0x238), "pref_address": ("Q", 0x258), "init_size": ("I", 0x260),
    }  # fmt: skip
    for name, (code_letter, offset) in places.items():
        struct.pack_into("<" + code_letter, head, offset, values[name])
    head[0x202:0x206] = b"HdrS"
    # What stands behind the header's end is code, and no loader's to pass on.
    head[0x202 + head[0x201] : 0x290] = b"\xee" * (0x290 - 0x202 - head[0x201])
    path = directory / "bzImage"
    path.write_bytes(bytes(head) + code)
    return path


class Loaded:
    """Guest memory with an image in it, and the registers to start with."""

    def __init__(self, image: Path, memory_bytes: int = 64 * MIB, **boot: object) -> None:
        self.memory = GuestMemory(memory_bytes)
        try:
            self.entry: EntryState = load_boot(self.memory, BootConfig(image, **boot), memory_bytes)  # type: ignore[arg-type]
        except BaseException:
            # A loader that refuses an image has written nothing.
            assert self.memory.resident_pages() == 0
            raise
        finally:
            if not hasattr(self, "entry"):
                self.memory.close()

    @property
    def regs(self) -> dict[str, int]:
        return self.entry.regs

    def segment(self, name: str) -> dict[str, int]:
        found = self.entry.sregs[name]
        assert isinstance(found, dict)
        return found

    def read(self, gpa: int, size: int) -> bytes:
        return self.memory.read(gpa, size)

    def words(self, gpa: int, layout: str) -> tuple[int, ...]:
        return struct.unpack("<" + layout, self.read(gpa, struct.calcsize("<" + layout)))

    def text(self, gpa: int) -> bytes:
        return self.read(gpa, 4096).split(b"\0")[0]

    def descriptor(self, selector: int) -> int:
        """The eight bytes that the GDT in memory has for ``selector``."""
        assert selector + 7 <= self.segment("gdt")["limit"]
        return self.words(self.segment("gdt")["base"] + selector, "Q")[0]


def flat_descriptor(*, code: bool, long: bool) -> int:
    """A 4 GiB segment at 0, ring 0, as the Intel manual draws it (volume 3, figure 3-8), written out by hand."""
    if code:
        return 0x00AF9B000000FFFF if long else 0x00CF9B000000FFFF
    return 0x00CF93000000FFFF
