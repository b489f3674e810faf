"""The file ``state``: written as one sequence of frames, read as hostile input.

Order, checked by the reader: HELLO, CONFIG, SECTION…, MEMORY_INDEX…, END, and nothing after it.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from .._core import ffi, lib
from ..config import MAX_MEMORY_BYTES
from ..errors import BadField, SnapshotError, StreamError, TooLarge, UnexpectedFrame
from ..record import dataclass
from ..state import frame, section
from ..state.frame import FrameHeader, FrameKind
from ..state.section import Fields, Section, Value
from .format import FORMAT, STATE_FILE, ChunkHashes, Hello, MemoryIndex, decode_slots

READ_BYTES = 64 << 10
"""How much is read at once: all of a small guest's, of which each call would take as long as to decode a frame."""
MAX_FRAMES = 4096
MAX_SECTIONS = 1024
MAX_STATE_BYTES = 512 << 20
"""No ``state`` of a machine within config.py's limits comes near: 32 MiB of index and a few MiB of sections."""


@dataclass(frozen=True, slots=True)
class SavedState:
    """All that ``state`` holds, decoded and checked."""

    hello: Hello
    description: Mapping[str, Value]
    sections: tuple[Section, ...]
    index: MemoryIndex
    hashes: ChunkHashes


def version() -> str:
    """This program's version, as HELLO names it."""
    from importlib import metadata

    try:
        return metadata.version("kvmigrate")
    except metadata.PackageNotFoundError:
        return "unknown"


def encode_state(
    description: Mapping[str, Value], sections: Sequence[Section], index: MemoryIndex, hashes: ChunkHashes
) -> Iterator[bytes]:
    """The frames of ``state``, in order."""
    hello = Hello(FORMAT, version(), time.time_ns() // 1_000_000)
    payloads = [
        (FrameKind.HELLO, section.pack(hello.to_value())),
        (FrameKind.CONFIG, section.pack({"description": dict(description)})),
        *((FrameKind.SECTION, section.encode(part)) for part in sections),
        (FrameKind.MEMORY_INDEX, section.pack(index.to_value())),
        *((FrameKind.MEMORY_INDEX, section.pack(part)) for part in hashes.payloads()),
    ]
    payloads.append((FrameKind.END, section.pack({"nr_frames": len(payloads)})))
    for sequence, (kind, payload) in enumerate(payloads):
        yield frame.encode_frame(kind, payload, sequence)


@contextmanager
def opened(directory: Path) -> Iterator[int]:
    """The directory's descriptor: every file is opened beneath it, so that all come from one snapshot."""
    try:
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise SnapshotError(f"cannot read {directory}: {error.strerror}: name the directory of a snapshot") from error
    try:
        yield fd
    finally:
        os.close(fd)


def open_file(directory_fd: int, path: Path) -> int:
    """Open ``path.name`` in the directory for reading. Raises :class:`SnapshotError` unless it is a plain file.

    A symbolic link is refused: it could lead anywhere, and the guest would run from there.
    """
    try:
        # O_NONBLOCK: opening a FIFO that somebody put there must not block.
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        fd = os.open(path.name, flags, dir_fd=directory_fd)
    except OSError as error:
        raise SnapshotError(f"cannot read {path}: {error.strerror}: is it a whole snapshot?") from error
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise SnapshotError(f"{path} is not a regular file: restore from a whole snapshot")
    return fd


def read_state(directory_fd: int, directory: Path) -> SavedState:
    """Read and check all of ``state``. Raises :class:`SnapshotError`, naming the file and the place in it."""
    path = directory / STATE_FILE
    fd = open_file(directory_fd, path)
    try:
        reader = _Reader(fd, path)
        return reader.read()
    finally:
        os.close(fd)


class _Reader:
    """Walks the frames of one open file; ``offset`` is where the frame in hand starts."""

    def __init__(self, fd: int, path: Path) -> None:
        self._fd = fd
        self._path = path
        self._size = os.fstat(fd).st_size
        self._next = 0
        self._sequence = 0
        self._ahead = b""
        self._ahead_at = 0
        self.offset = 0

    def read(self) -> SavedState:
        """The whole file; every error is told with the path and the offset of the frame that it is in."""
        try:
            return self._read()
        except OSError as error:
            place = f"{self._path} at byte {self.offset}"
            raise SnapshotError(f"cannot read {place}: {error.strerror}: use another copy of the snapshot") from error
        except StreamError as error:
            # The frames' own advice is for a stream ("send again"): here it is another copy that helps.
            text = str(error).removesuffix("; send again")
            mend = "" if ": update" in text else ": use another copy of the snapshot"
            raise SnapshotError(f"{self._path} at byte {self.offset}: {text}{mend}") from error

    def _read(self) -> SavedState:
        if self._size > MAX_STATE_BYTES:
            raise TooLarge(f"{self._size} bytes are over the limit of {MAX_STATE_BYTES}")
        hello = Hello.from_value(self._expect(FrameKind.HELLO))
        description = decode_description(self._expect(FrameKind.CONFIG))
        sections: list[Section] = []
        header, payload = self._frame()
        while header.kind == FrameKind.SECTION:
            # All of it is looked at before a machine is built; what is loaded stays packed.
            decode = section.decode_well_formed if _is_plain(payload) else _decode_whole
            sections.append(decode(payload))
            if len(sections) > MAX_SECTIONS:
                raise TooLarge(f"more than {MAX_SECTIONS} sections")
            header, payload = self._frame()
        section.by_name(sections)
        index, hashes, header, payload = self._index(header, payload)
        self._end(header, payload)
        if [[s.id, s.base_gfn, s.nr_pages] for s in index.slots] != description["slots"]:
            raise BadField("the slots of MEMORY_INDEX are not those of CONFIG")
        return SavedState(hello, description, tuple(sections), index, hashes)

    def _index(self, header: FrameHeader, payload: bytes) -> tuple[MemoryIndex, ChunkHashes, FrameHeader, bytes]:
        """The index and its hashes, and the frame after them."""
        if header.kind != FrameKind.MEMORY_INDEX:
            raise UnexpectedFrame(f"frame {header.sequence} is of kind {header.kind}, expected MEMORY_INDEX")
        index = MemoryIndex.from_value(section.unpack(payload, "MEMORY_INDEX"))
        hashes = ChunkHashes(index.slots)
        header, payload = self._frame()
        while header.kind == FrameKind.MEMORY_INDEX:
            hashes.add(section.unpack(payload, "MEMORY_INDEX"))
            header, payload = self._frame()
        if not hashes.complete:
            raise BadField("MEMORY_INDEX: hashes are missing")
        return index, hashes, header, payload

    def _end(self, header: FrameHeader, payload: bytes) -> None:
        if header.kind != FrameKind.END:
            raise UnexpectedFrame(f"frame {header.sequence} is of kind {header.kind}, expected END")
        fields = Fields(section.unpack(payload, "END"), "END")
        fields.integer("nr_frames", header.sequence, header.sequence)
        fields.done()
        if self._next != self._size:
            raise UnexpectedFrame(f"{self._size - self._next} bytes follow END")

    def _expect(self, kind: FrameKind) -> Value:
        header, payload = self._frame()
        if header.kind != kind:
            raise UnexpectedFrame(f"frame {header.sequence} is of kind {header.kind}, expected {kind.name}")
        return section.unpack(payload, kind.name)

    def _frame(self) -> tuple[FrameHeader, bytes]:
        """The next frame of a known kind, checksum checked; unknown optional ones are skipped."""
        while True:
            self.offset = self._next
            header = frame.decode_header(self._bytes(frame.HEADER.size))
            if header.sequence != self._sequence or self._sequence >= MAX_FRAMES:
                raise UnexpectedFrame(f"frame {header.sequence} where frame {self._sequence} has to be")
            if header.length > frame.MAX_PAYLOAD_BYTES:
                raise TooLarge(f"a frame of {header.length} bytes is over the limit of {frame.MAX_PAYLOAD_BYTES}")
            payload = self._bytes(header.length)
            frame.check_payload(header, payload)
            self._sequence += 1
            if header.kind in _KNOWN:
                return header, payload
            if header.mandatory:
                raise UnexpectedFrame(f"frame {header.sequence} is of the unknown kind {header.kind}: update kvmigrate")

    def _bytes(self, length: int) -> bytes:
        if length > self._size - self._next:
            raise StreamError(f"the file ends {length - (self._size - self._next)} bytes too early")
        begin = self._next - self._ahead_at
        if begin + length > len(self._ahead):
            self._ahead = os.pread(self._fd, max(length, READ_BYTES), self._next)
            self._ahead_at, begin = self._next, 0
            if len(self._ahead) < length:
                raise StreamError("the file became shorter while it was read")
        self._next += length
        return self._ahead[begin : begin + length]


def _is_plain(payload: bytes) -> bool:
    """Whether there is nothing in ``payload`` that :func:`section.unpack` refuses, as far as C can tell: the objects
    that it makes of a vCPU take ten times as long, and nobody looks at them."""
    return bool(lib.kmig_is_plain(ffi.from_buffer(payload), len(payload), _LIMITS))


def _decode_whole(payload: bytes) -> Section:
    return section.decode(payload, whole=True)


_LIMITS = ffi.new("struct kmig_plain_limits *", [section.MAX_STR_BYTES, section.MAX_BIN_BYTES, section.MAX_ITEMS])
_KNOWN = frozenset(int(kind) for kind in FrameKind)


def decode_description(value: Value) -> dict[str, Value]:
    """CONFIG's description, with what snapshots themselves read of it checked: name, uuid, memory_bytes and slots."""
    config = Fields(value, "CONFIG")
    description = config.mapping("description")
    config.done()
    fields = Fields(description, "CONFIG")
    fields.text("name", 64)
    fields.text("uuid", 64)
    memory_bytes = fields.integer("memory_bytes", 1, MAX_MEMORY_BYTES)
    slots = decode_slots(fields.sequence("slots", 64), "CONFIG")
    if sum(slot.nr_pages for slot in slots) * 4096 != memory_bytes:
        raise BadField(f"CONFIG: the slots do not add up to {memory_bytes} bytes of memory")
    return description
