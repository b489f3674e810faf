"""A reader of ELF executables for x86 (System V gABI, chapter 5) that believes nothing the file says."""

from __future__ import annotations

import struct
from collections.abc import Iterator

from ..record import dataclass
from .image import Image
from .plan import LoadPlan

MAGIC = b"\x7fELF"
CLASS_BITS = {1: 32, 2: 64}
LITTLE_ENDIAN = 1
ET_EXEC, ET_DYN = 2, 3
EM_386, EM_X86_64 = 3, 62
PT_LOAD, PT_NOTE = 1, 4
MAX_SEGMENTS = 256
MAX_NOTE_BYTES = 64 << 10
HEADERS = {32: struct.Struct("<16xHHIIIIIHHH"), 64: struct.Struct("<16xHHIQQQIHHH")}
PROGRAM_HEADERS = {32: struct.Struct("<8I"), 64: struct.Struct("<IIQQQQQQ")}
NOTE = struct.Struct("<III")


@dataclass(frozen=True, slots=True)
class Segment:
    """A program header: ``file_bytes`` at ``offset`` of the file go to ``paddr``; ``memory_bytes`` are kept there."""

    type: int
    offset: int
    vaddr: int
    paddr: int
    file_bytes: int
    memory_bytes: int
    align: int


@dataclass(frozen=True, slots=True)
class Elf:
    """A parsed executable; every segment lies inside the file and inside the address space."""

    image: Image
    bits: int
    entry: int
    segments: tuple[Segment, ...]

    def loaded(self) -> list[Segment]:
        """The segments that take memory."""
        return [segment for segment in self.segments if segment.type == PT_LOAD and segment.memory_bytes]

    def entry_gpa(self) -> int:
        """The physical address of the entry point, which the header gives as a virtual one."""
        for segment in self.loaded():
            if segment.vaddr <= self.entry < segment.vaddr + segment.memory_bytes:
                return self.entry - segment.vaddr + segment.paddr
        raise self.image.error(f"the ELF entry point {self.entry:#x} lies in no loaded segment")

    def contains(self, gpa: int) -> bool:
        """Whether ``gpa`` lies in a loaded segment."""
        return any(segment.paddr <= gpa < segment.paddr + segment.memory_bytes for segment in self.loaded())


def is_elf(image: Image) -> bool:
    """Whether the file says that it is ELF."""
    return image.data.startswith(MAGIC)


def parse_elf(image: Image) -> Elf:
    """Parse an ELF executable for i386 or x86-64. Raises :class:`ConfigError`."""
    ident = bytes(image.bytes_at(0, 16, "the ELF header"))
    bits = CLASS_BITS.get(ident[4], 0)
    if not ident.startswith(MAGIC) or not bits or ident[5] != LITTLE_ENDIAN:
        raise image.error("this is not a little-endian ELF file of 32 or 64 bits")
    header = HEADERS[bits]
    type_, machine, _, entry, offset, _, _, _, entry_bytes, count = header.unpack(
        image.bytes_at(0, header.size, "the ELF header")
    )
    if machine not in (EM_386, EM_X86_64):
        raise image.error(f"this ELF file is for machine {machine}, not for x86 (3 or 62)")
    if type_ not in (ET_EXEC, ET_DYN):
        raise image.error(f"this ELF file has type {type_}: link it to an executable (2)")
    if entry_bytes != PROGRAM_HEADERS[bits].size or not 1 <= count <= MAX_SEGMENTS:
        raise image.error(f"{count} program headers of {entry_bytes} bytes cannot be: is the file damaged?")
    table = image.bytes_at(offset, count * entry_bytes, "the program header table")
    segments = tuple(_parse_segment(image, bits, fields) for fields in PROGRAM_HEADERS[bits].iter_unpack(table))
    elf = Elf(image, bits, entry, segments)
    if not elf.loaded():
        raise image.error("this ELF file has nothing to load")
    return elf


def _parse_segment(image: Image, bits: int, fields: tuple[int, ...]) -> Segment:
    if bits == 32:
        type_, offset, vaddr, paddr, file_bytes, memory_bytes, _, align = fields
    else:
        type_, _, offset, vaddr, paddr, file_bytes, memory_bytes, align = fields
    segment = Segment(type_, offset, vaddr, paddr, file_bytes, memory_bytes, align)
    if type_ not in (PT_LOAD, PT_NOTE):
        return segment
    image.bytes_at(offset, file_bytes, f"the segment for {paddr:#x}")
    if type_ == PT_NOTE and file_bytes > MAX_NOTE_BYTES:
        raise image.error(f"{file_bytes:#x} bytes of ELF notes cannot be: is the file damaged?")
    if type_ == PT_LOAD and file_bytes > memory_bytes:
        raise image.error(
            f"the segment for {paddr:#x} has {file_bytes:#x} bytes in the file but {memory_bytes:#x} in memory"
        )
    if paddr + memory_bytes > 1 << bits or vaddr + memory_bytes > 1 << bits:
        raise image.error(f"the segment for {paddr:#x} runs over the end of the address space")
    return segment


def place_elf(plan: LoadPlan, elf: Elf) -> None:
    """Plan every loaded segment at its physical address."""
    for segment in elf.loaded():
        data = elf.image.bytes_at(segment.offset, segment.file_bytes, "a segment")
        plan.place(segment.paddr, data, f"the segment for {segment.paddr:#x}", segment.memory_bytes)


def notes(elf: Elf) -> Iterator[tuple[bytes, int, bytes]]:
    """(name, type, descriptor) of every note. Raises :class:`ConfigError` when one runs over its segment's end."""
    for segment in elf.segments:
        if segment.type == PT_NOTE:
            align = 8 if segment.align == 8 else 4
            yield from _notes_of(
                elf.image, bytes(elf.image.bytes_at(segment.offset, segment.file_bytes, "a note")), align
            )


def _notes_of(image: Image, data: bytes, align: int) -> Iterator[tuple[bytes, int, bytes]]:
    at = 0
    while at + NOTE.size <= len(data):
        name_bytes, descriptor_bytes, type_ = NOTE.unpack_from(data, at)
        name_at = at + NOTE.size
        descriptor_at = _align(name_at + name_bytes, align)
        at = _align(descriptor_at + descriptor_bytes, align)
        if descriptor_at + descriptor_bytes > len(data):
            raise image.error(f"an ELF note of type {type_} runs over the end of its segment: is the file damaged?")
        yield data[name_at : name_at + name_bytes], type_, data[descriptor_at : descriptor_at + descriptor_bytes]


def _align(value: int, align: int) -> int:
    return -(-value // align) * align
