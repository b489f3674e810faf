"""A writer of ACPI Machine Language (ACPI 6.5, chapter 20): the few terms that our DSDT is made of, each as bytes."""

from __future__ import annotations

import struct

SYSTEM_IO = 1
DWORD_ACCESS, WRITE_AS_ZEROS = 3, 2 << 5
LOCAL0 = b"\x60"
END_TAG = b"\x79\x00"
EXT_OP, ROOT = b"\x5b", b"\\"


def _length(content: bytes) -> bytes:
    """``content`` behind its package length, which counts its own bytes too (20.2.4)."""
    size = len(content) + 1
    if size < 1 << 6:
        return bytes((size,)) + content
    for more in (1, 2, 3):
        size = len(content) + 1 + more
        if size < 1 << 4 + 8 * more:
            return bytes((more << 6 | size & 0xF,)) + (size >> 4).to_bytes(more, "little") + content
    raise ValueError(f"{len(content)} bytes of AML are too many for one package")


def path(name: str) -> bytes:
    """A name of up to 255 segments, such as ``_HID``, ``\\_SB.GED`` (20.2.2). Short segments are padded with ``_``."""
    root = ROOT if name.startswith("\\") else b""
    segments = [part.ljust(4, "_").encode() for part in name.lstrip("\\").split(".") if part]
    if len(segments) == 1:
        return root + segments[0]
    prefix = b"\x2e" if len(segments) == 2 else b"\x2f" + bytes((len(segments),))
    return root + prefix + b"".join(segments)


def integer(value: int) -> bytes:
    """A constant of as many bytes as it needs."""
    if value in (0, 1):
        return bytes((value,))
    for prefix, size in ((b"\x0a", 1), (b"\x0b", 2), (b"\x0c", 4), (b"\x0e", 8)):
        if value < 1 << 8 * size:
            return prefix + value.to_bytes(size, "little")
    raise ValueError(f"{value:#x} has more than 64 bits")


def string(text: str) -> bytes:
    """A text, which AML ends with a zero byte (20.2.3)."""
    return b"\x0d" + text.encode("ascii") + b"\0"


def eisa_id(text: str) -> bytes:
    """The compressed form of an identifier such as ``PNP0C0C`` (ACPI 6.5, 19.3.4)."""
    vendor = [ord(letter) - 0x40 for letter in text[:3]]
    word = vendor[0] << 26 | vendor[1] << 21 | vendor[2] << 16 | int(text[3:], 16)
    return b"\x0c" + word.to_bytes(4, "big")


def package(*elements: bytes) -> bytes:
    """A list of at most 255 data objects (20.2.5.4)."""
    return b"\x12" + _length(bytes((len(elements),)) + b"".join(elements))


def buffer(content: bytes) -> bytes:
    """Bytes as a data object (20.2.5.4)."""
    return b"\x11" + _length(integer(len(content)) + content)


def name(at: str, value: bytes) -> bytes:
    """A named object that is ``value`` (20.2.5.1)."""
    return b"\x08" + path(at) + value


def scope(at: str, *terms: bytes) -> bytes:
    """``terms`` as if they stood in the object ``at`` (20.2.5.1)."""
    return b"\x10" + _length(path(at) + b"".join(terms))


def device(at: str, *terms: bytes) -> bytes:
    """A device of ``terms`` (20.2.5.2)."""
    return EXT_OP + b"\x82" + _length(path(at) + b"".join(terms))


def method(at: str, nr_arguments: int, *terms: bytes, serialized: bool = False) -> bytes:
    """A control method of ``terms`` (20.2.5.2)."""
    flags = nr_arguments | serialized << 3
    return b"\x14" + _length(path(at) + bytes((flags,)) + b"".join(terms))


def operation_region(at: str, space: int, offset: int, size_bytes: int) -> bytes:
    """``size_bytes`` of an address space under a name (20.2.5.2)."""
    return EXT_OP + b"\x80" + path(at) + bytes((space,)) + integer(offset) + integer(size_bytes)


def field(region: str, at: str, bits: int) -> bytes:
    """One 32-bit accessed field at the region's start."""
    flags = bytes((DWORD_ACCESS | WRITE_AS_ZEROS,))
    return EXT_OP + b"\x81" + _length(path(region) + flags + path(at) + bytes((bits,)))


def store(value: bytes, target: bytes) -> bytes:
    """Put ``value`` into ``target``."""
    return b"\x70" + value + target


def bit_and(left: bytes, right: bytes) -> bytes:
    """``left & right``, its result stored nowhere."""
    return b"\x7b" + left + right + b"\0"


def if_(condition: bytes, *terms: bytes) -> bytes:
    """``terms`` when ``condition`` is not zero (20.2.5.3)."""
    return b"\xa0" + _length(condition + b"".join(terms))


def notify(at: str, value: int) -> bytes:
    """Tell the drivers of a device that ``value`` happened to it (20.2.5.3)."""
    return b"\x86" + path(at) + integer(value)


def resources(*descriptors: bytes) -> bytes:
    """A resource template (ACPI 6.5, 6.4): descriptors and the end tag."""
    return buffer(b"".join(descriptors) + END_TAG)


def memory32(gpa: int, size_bytes: int) -> bytes:
    """A read-write range of fixed addresses (6.4.3.4)."""
    return struct.pack("<BHBII", 0x86, 9, 1, gpa, size_bytes)


def ports(first: int, count: int) -> bytes:
    """I/O ports, decoded by 16 bits (6.4.2.5)."""
    return struct.pack("<BBHHBB", 0x47, 1, first, first, 1, count)


def interrupt(gsi: int) -> bytes:
    """One exclusive, edge-triggered, active-high interrupt that the device consumes (6.4.3.6)."""
    consumer, edge = 1 << 0, 1 << 1
    return struct.pack("<BHBBI", 0x89, 6, consumer | edge, 1, gsi)
