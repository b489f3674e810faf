"""What a loader is going to write where: checked as a whole before the first byte is written.

The memory map that guests are told is made here too, so that what is loaded and what is told agree.
"""

from __future__ import annotations

from ..config import PAGE_BYTES
from ..memory.layout import HOLE_START, slots_for
from ..memory.region import GuestMemory
from ..record import dataclass
from .hardware import Hardware
from .image import Image

LOW_RAM_END = 0x9FC00
"""The end of conventional memory: 639 KiB, the last KiB being the extended BIOS data area's."""
HIGH_RAM = 0x100000
LOWEST = 0x1000
"""Nothing of ours lies in the first page: it holds the real-mode vectors, and PVH takes address 0 for absent."""
RAM, RESERVED = 1, 2


@dataclass(frozen=True, slots=True)
class Piece:
    """``size_bytes`` at ``gpa`` that ``what`` takes; ``data`` goes to its start, and the rest stays zero."""

    gpa: int
    size_bytes: int
    what: str
    data: bytes | memoryview

    @property
    def end(self) -> int:
        return self.gpa + self.size_bytes


def ram_ranges(memory_bytes: int) -> list[tuple[int, int]]:
    """[start, end) of all RAM, lowest first; the second, if any, begins at 4 GiB."""
    return [(gfn * PAGE_BYTES, (gfn + nr_pages) * PAGE_BYTES) for _, gfn, nr_pages in slots_for(memory_bytes)]


def memory_map(memory_bytes: int) -> list[tuple[int, int, int]]:
    """(start, size, type) in the way of the BIOS's E820 call, types as in ACPI 6.5, table 15.4."""
    low, *high = ram_ranges(memory_bytes)
    return [
        (0, LOW_RAM_END, RAM),
        (LOW_RAM_END, HIGH_RAM - LOW_RAM_END, RESERVED),
        *((start, end - start, RAM) for start, end in [(HIGH_RAM, low[1]), *high] if end > start),
    ]


class LoadPlan:
    """Pieces for a guest with ``memory_bytes`` of RAM, which is all zero so far. Errors name ``image``'s file;
    ``hardware`` is what the guest's firmware tables will tell."""

    def __init__(self, image: Image, memory_bytes: int, hardware: Hardware | None = None) -> None:
        self.image = image
        self.memory_bytes = memory_bytes
        self.hardware = hardware or Hardware()
        self._pieces: list[Piece] = []

    def place(self, gpa: int, data: bytes | memoryview, what: str, size_bytes: int | None = None) -> None:
        """Plan to write ``data`` at ``gpa`` and keep ``size_bytes`` there (at least as many) for it.

        Raises :class:`ConfigError` unless all of it is RAM that no other piece takes.
        """
        size = len(data) if size_bytes is None else size_bytes
        piece = Piece(gpa, size, what, data)
        if len(data) > size:
            raise self.image.error(f"{what} has {len(data):#x} bytes, but only {size:#x} are kept for it")
        if not any(start <= gpa and piece.end <= end for start, end in ram_ranges(self.memory_bytes)):
            raise self.image.error(
                f"{what} takes {gpa:#x} to {piece.end:#x}, which is not all RAM: the guest has {self.memory_bytes:#x}"
                " bytes, with a hole from 3 to 4 GiB; give it more memory or link the image elsewhere"
            )
        for other in self._pieces:
            if gpa < other.end and other.gpa < piece.end:
                raise self.image.error(
                    f"{what} ({gpa:#x} to {piece.end:#x}) overlaps {other.what} ({other.gpa:#x} to {other.end:#x})"
                )
        self._pieces.append(piece)

    def place_below(self, end: int, data: bytes, what: str, lowest: int = LOWEST, align: int = 16) -> int:
        """Place ``data`` as high as it fits below ``end`` and not below ``lowest``; returns its address."""
        tops = [end, *(start_end[1] for start_end in ram_ranges(self.memory_bytes)), *(p.gpa for p in self._pieces)]
        for top in sorted(tops, reverse=True):
            gpa = (top - len(data)) // align * align
            if top <= end and gpa >= lowest and self._is_free(gpa, len(data)):
                self.place(gpa, data, what)
                return gpa
        raise self.image.error(
            f"{what} of {len(data):#x} bytes does not fit below {end:#x}: give the guest more memory"
        )

    def place_low(self, data: bytes, what: str, align: int = 16) -> int:
        """Place ``data`` in conventional memory, which every guest has; returns its address."""
        return self.place_below(LOW_RAM_END, data, what, align=align)

    def place_after(self, data: bytes, what: str) -> int:
        """Place ``data`` on a page boundary behind all that lies from 1 MiB to 3 GiB, or else in the highest gap.

        Returns its address.
        """
        ends = sorted([HIGH_RAM, *(piece.end for piece in self._pieces if piece.end > HIGH_RAM)], reverse=True)
        for end in ends:
            gpa = -(-end // PAGE_BYTES) * PAGE_BYTES
            if gpa + len(data) <= HOLE_START and self._is_free(gpa, len(data)):
                self.place(gpa, data, what)
                return gpa
        raise self.image.error(f"{what} of {len(data):#x} bytes does not fit below 3 GiB: give the guest more memory")

    def _is_free(self, gpa: int, size: int) -> bool:
        in_ram = any(start <= gpa and gpa + size <= end for start, end in ram_ranges(self.memory_bytes))
        return in_ram and not any(gpa < piece.end and piece.gpa < gpa + size for piece in self._pieces)

    def write(self, memory: GuestMemory) -> None:
        """Write all pieces."""
        for piece in self._pieces:
            if len(piece.data):
                memory.write(piece.gpa, piece.data)
