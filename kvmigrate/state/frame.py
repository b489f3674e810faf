"""The one byte frame of kvmigrate: a migration stream and a snapshot's state file are sequences of these.

Header, 32 bytes, little endian, readable by every version for ever::

    offset size field
     0     4    magic            b"KVMG"
     4     2    kind             see FrameKind
     6     2    flags            bit 0: mandatory
     8     8    length           bytes of payload that follow the header
    16     8    checksum         XXH3-64 of the payload; of a PAGES frame: of its page table only
    24     4    sequence         counts the frames of one direction from 0
    28     4    header_checksum  the low 32 bits of XXH3-64 over bytes 0 to 27

A reader that meets a kind it does not know refuses the stream when the mandatory bit is set and skips the frame
when it is not.

Payloads are msgpack maps, but for PAGES::

    u32 nr_runs, u32 flags (bit 0: the data is one zstd frame, bit 1: there are delta runs), u64 data_bytes
    nr_runs × { u64 gfn, u32 nr_pages, u32 kind (0 data, 1 zero, 2 delta) }        the page table
    with bit 1: u64, the sum of the digest terms of the pages that delta runs build upon
    the pages of every data and delta run, in order, 4096 bytes each, or one zstd frame that holds them

A page of a delta run is the XOR of its new content and the one it was last sent with. The checksum of a PAGES frame
covers all before the data. The data is covered page by page: both
sides keep an XXH3-64 of each page as last sent and as last received, and the sums of both are compared before
ownership changes hands (see ``migration/wire.py``).
"""

from __future__ import annotations

import struct
from enum import IntEnum

import xxhash

from ..errors import BadChecksum, BadMagic, TooLarge
from ..record import dataclass

HEADER = struct.Struct("<4sHHQQII")
MAGIC = b"KVMG"
FLAG_MANDATORY = 1
MAX_PAYLOAD_BYTES = 16 << 20
"""No payload that is held in memory as a whole may be larger; a PAGES frame has its own, smaller limit."""


class FrameKind(IntEnum):
    """What a frame holds. Numbers are part of the format: never reuse one."""

    HELLO = 1
    CONFIG = 2
    PAGES = 3
    ROUND = 4
    SECTION = 5
    END = 6
    READY = 7
    COMMIT = 8
    RUNNING = 9
    FAILED = 10
    QUERY = 11
    ANSWER = 12
    DONE = 13
    ACCEPT = 14
    RESIDENT = 15
    CHECK = 16
    CHECKED = 17
    OFFER = 18
    JOIN = 19
    LAST = 20
    MEMORY_INDEX = 32


@dataclass(frozen=True, slots=True)
class FrameHeader:
    """A decoded frame header; ``length`` in bytes, ``checksum`` as the XXH3-64 of what the kind says."""

    kind: int
    flags: int
    length: int
    checksum: int
    sequence: int

    @property
    def mandatory(self) -> bool:
        return bool(self.flags & FLAG_MANDATORY)


def encode_header(header: FrameHeader) -> bytes:
    """The 32 bytes of ``header``."""
    head = HEADER.pack(MAGIC, header.kind, header.flags, header.length, header.checksum, header.sequence, 0)[:28]
    return head + (xxhash.xxh3_64_intdigest(head) & 0xFFFFFFFF).to_bytes(4, "little")


def decode_header(data: bytes | memoryview) -> FrameHeader:
    """Decode 32 bytes. Raises :class:`BadMagic` or :class:`BadChecksum`; the length is the caller's to judge."""
    magic, kind, flags, length, checksum, sequence, header_checksum = HEADER.unpack(data)
    if magic != MAGIC:
        raise BadMagic(f"this is not a kvmigrate stream: it starts with {bytes(magic)!r} instead of {MAGIC!r}")
    if xxhash.xxh3_64_intdigest(bytes(data[:28])) & 0xFFFFFFFF != header_checksum:
        raise BadChecksum(f"the header of frame {sequence} (kind {kind}) is damaged; send again")
    return FrameHeader(kind, flags, length, checksum, sequence)


def encode_frame(kind: FrameKind, payload: bytes, sequence: int, *, mandatory: bool = True) -> bytes:
    """One whole frame with a payload that is held in memory."""
    if len(payload) > MAX_PAYLOAD_BYTES:
        raise TooLarge(f"a {kind.name} frame of {len(payload)} bytes is over the limit of {MAX_PAYLOAD_BYTES}")
    flags = FLAG_MANDATORY if mandatory else 0
    header = FrameHeader(kind, flags, len(payload), xxhash.xxh3_64_intdigest(payload), sequence)
    return encode_header(header) + payload


def check_payload(header: FrameHeader, payload: bytes | memoryview) -> None:
    """Raise :class:`BadChecksum` unless ``payload`` is what ``header`` announced."""
    if xxhash.xxh3_64_intdigest(payload) != header.checksum:
        raise BadChecksum(f"frame {header.sequence} (kind {header.kind}) is damaged; send again")
