"""Guests of one boot sector each: a few bytes of real-mode code at 0x7c00."""

from __future__ import annotations

import struct
from pathlib import Path

SLEEP = bytes.fromhex("f4ebfd")
"""``1: hlt; jmp 1b``"""
POWER_OFF = bytes.fromhex("ba0406b80020ef")
"""``mov dx, 0x604; mov ax, 0x2000; out dx, ax``"""
DEBUG_EXIT_3 = bytes.fromhex("baf400b003ee")
"""``mov dx, 0xf4; mov al, 3; out dx, al``: status 7"""
RESET = bytes.fromhex("b0fee664")
"""``mov al, 0xfe; out 0x64, al``"""


def triple_fault(directory: Path) -> Path:
    """A multiboot image that loads an empty interrupt table in protected mode, then meets ``ud2``."""
    magic, flags, start = 0x1BADB002, 1 << 16, 1 << 20
    header = struct.pack("<IIIIIIII", magic, flags, -(magic + flags) & 0xFFFFFFFF, start, start, 0, 0, start + 32)
    lidt = bytes.fromhex("0f011d") + (start + 41).to_bytes(4, "little")
    image = directory / "triple-fault.bin"
    image.write_bytes(header + lidt + bytes.fromhex("0f0b") + bytes(6))
    return image


def sector(directory: Path, code: bytes) -> Path:
    """An image that starts ``code``."""
    image = directory / f"{code.hex()[:16]}.bin"
    image.write_bytes(code.ljust(510, b"\0") + b"\x55\xaa")
    return image


def echo(*, first: bytes = b"ready\r\n", ends: bytes = b"\x04") -> bytes:
    """Says ``first``, then echoes its serial port; the byte ``ends`` switches it off.

    It looks at LSR before each byte either way, with the FIFOs off.
    """
    put = bytes.fromhex("88c4bafd03eca82074f988e0baf803ee")
    """``mov ah, al; mov dx, 0x3fd; 1: in al, dx; test al, 0x20; jz 1b; mov al, ah; mov dx, 0x3f8; out dx, al``"""
    greeting = b"".join(b"\xb0" + bytes((byte,)) + put for byte in first)
    get = bytes.fromhex("bafd03eca80174fbbaf803ec") + b"\x3c" + ends
    """``mov dx, 0x3fd; 1: in al, dx; test al, 1; jz 1b; mov dx, 0x3f8; in al, dx; cmp al, ENDS``"""
    loop = get + b"\x74" + bytes((len(put) + 2,)) + put
    return greeting + loop + b"\xeb" + (-len(loop) - 2 & 0xFF).to_bytes(1) + POWER_OFF
