"""Check a snapshot, all of it, with code that is not the loader's: what is wrong, and where.

Imports nothing of kvmigrate but its own two helpers. What it knows is docs/snapshot-format.md; XXH3 and zstd are those
of PyPI, not of the C core. One damaged place does not end the check: whatever can still be checked is.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .verify_frames import CONFIG, END, HELLO, MANDATORY, MEMORY_INDEX, NAMES, SECTION, Bytes, Frame, payload, walk
from .verify_memory import Index, Slot, check_frames, check_raw

FORMAT = 1
MAX_FINDINGS = 1000
END_OF_TIME_MS = 253_402_300_800_000
"""The year 10000."""
_STATE_KINDS = (HELLO, CONFIG, SECTION, MEMORY_INDEX, END)


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong: in which file, at which byte, and what."""

    file: str
    offset: int
    what: str

    def __str__(self) -> str:
        return f"{self.file} at byte {self.offset}: {self.what}"


@dataclass(frozen=True)
class Report:
    """What :func:`verify` saw. ``findings`` is empty for a good snapshot; after ``MAX_FINDINGS`` no more are kept."""

    directory: str
    findings: tuple[Finding, ...]
    nr_frames: int
    nr_sections: int
    nr_pages: int
    """Pages of guest RAM that hold data."""
    nr_bytes: int
    """Of the files, holes not counted."""

    @property
    def ok(self) -> bool:
        return not self.findings

    def to_value(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "directory": self.directory,
            "ok": self.ok,
            "findings": [{"file": f.file, "offset": f.offset, "what": f.what} for f in self.findings],
            "frames": self.nr_frames,
            "sections": self.nr_sections,
            "pages": self.nr_pages,
            "bytes": self.nr_bytes,
        }


def verify(directory: Path) -> Report:
    """Read every byte of the snapshot ``directory``. Never raises for what is in it: that is what findings are."""
    return _Check(directory).run()


@dataclass
class _Seen:
    """What the frames of ``state`` held, as far as they could be read."""

    order: list[int] = field(default_factory=list)
    description: dict[str, Any] | None = None
    sections: set[str] = field(default_factory=set)
    index: Index | None = None
    end: int | None = None


class _Check:
    """One run over one directory."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._findings: list[Finding] = []
        self._nr_frames = 0
        self._nr_pages = 0
        self._nr_bytes = 0
        self._seen = _Seen()

    def run(self) -> Report:
        try:
            names = {path.name for path in self._directory.iterdir()}
        except OSError as error:
            self._tell("", 0, f"is no directory that can be read: {error.strerror}")
        else:
            self._check_file("state", self._check_state)
            index = self._seen.index
            if index is not None:
                self._check_file(index.file, lambda data: self._check_memory(index, data))
            self._check_names(names, index)
        return Report(
            str(self._directory), tuple(self._findings), self._nr_frames, len(self._seen.sections), self._nr_pages,
            self._nr_bytes,
        )  # fmt: skip

    def _tell(self, file: str, offset: int, what: str) -> None:
        if len(self._findings) < MAX_FINDINGS:
            self._findings.append(Finding(file or str(self._directory), offset, what))

    def _check_file(self, name: str, check: Callable[[Bytes], None]) -> None:
        """Let ``check`` look at the regular file ``name``; when it cannot be read, that is told."""
        try:
            fd = os.open(self._directory / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            self._tell(name, 0, f"cannot be opened: {error.strerror}")
            return
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                self._tell(name, 0, "is no regular file")
                return
            self._nr_bytes += status.st_blocks * 512
            check(Bytes(fd))
        except OSError as error:
            self._tell(name, 0, f"cannot be read to its end: {error.strerror or error}")
        finally:
            os.close(fd)

    def _check_names(self, names: set[str], index: Index | None) -> None:
        """A file that the snapshot does not have is a sign that two were mixed."""
        known = {"state", *([index.file] if index else ("memory.raw", "memory.frames"))}
        for name in sorted(names - known):
            self._tell(name, 0, "does not belong to the snapshot")

    def _check_state(self, data: Bytes) -> None:
        for frame in walk(data, lambda at, what: self._tell("state", at, what)):
            self._nr_frames += 1
            if frame.kind not in _STATE_KINDS:
                self._check_foreign(data, frame)
                continue
            value = payload(data, frame, lambda at, what: self._tell("state", at, what))
            self._check_order(frame)
            self._seen.order.append(frame.kind)
            if value is not None:
                self._take(frame, value)
        self._check_whole(len(data))

    def _check_foreign(self, data: Bytes, frame: Frame) -> None:
        if frame.kind in NAMES or frame.flags & MANDATORY:
            self._tell("state", frame.offset, f"{frame.name} does not belong here")
            return
        payload(data, frame, lambda at, what: self._tell("state", at, what) if "checksum" in what else None)

    def _check_order(self, frame: Frame) -> None:
        order = self._seen.order
        ranks = {HELLO: 0, CONFIG: 1, SECTION: 2, MEMORY_INDEX: 3, END: 4}
        expected = [HELLO, CONFIG][len(order)] if len(order) < 2 else None
        once_more = order and frame.kind == order[-1] and frame.kind not in (SECTION, MEMORY_INDEX)
        backwards = order and ranks[frame.kind] < ranks[order[-1]]
        if (expected and frame.kind != expected) or once_more or backwards:
            self._tell("state", frame.offset, f"{frame.name} may not come here")

    def _take(self, frame: Frame, value: Any) -> None:
        """Check one decoded payload by itself."""
        try:
            takers = {HELLO: self._hello, CONFIG: self._config, SECTION: self._section, MEMORY_INDEX: self._index}
            takers.get(frame.kind, self._end)(frame, value)
        except (TypeError, ValueError, KeyError) as error:
            self._tell("state", frame.payload_at, f"{frame.name} holds what it may not: {error}")

    def _hello(self, frame: Frame, value: Any) -> None:
        need(value, {"format": int, "kvmigrate": str, "created_ms": int})
        if not 1 <= value["format"] <= FORMAT:
            raise ValueError(f"format {value['format']}, and only up to {FORMAT} is known")
        if not 0 <= value["created_ms"] < END_OF_TIME_MS:
            raise ValueError(f"created_ms {value['created_ms']} is no time")

    def _config(self, frame: Frame, value: Any) -> None:
        need(value, {"description": dict})
        description = value["description"]
        for key, kind in {"name": str, "uuid": str, "memory_bytes": int, "slots": list}.items():
            if type(description.get(key)) is not kind:
                raise ValueError(f"description.{key} is missing, or no {kind.__name__}")
        slots = [Slot.of(row) for row in description["slots"]]
        if sum(slot.nr_pages for slot in slots) * 4096 != description["memory_bytes"]:
            raise ValueError("the slots do not add up to memory_bytes")
        self._seen.description = description

    def _section(self, frame: Frame, value: Any) -> None:
        need(value, {"name": str, "version": int, "body": dict})
        if value["name"] in self._seen.sections:
            raise ValueError(f"section {value['name']} comes twice")
        if value["version"] < 1:
            raise ValueError(f"section {value['name']} has version {value['version']}")
        self._seen.sections.add(value["name"])

    def _index(self, frame: Frame, value: Any) -> None:
        if self._seen.order[-2:-1] != [MEMORY_INDEX]:
            self._seen.index = Index.of(value)
        elif self._seen.index is not None:
            self._seen.index.add(value)

    def _end(self, frame: Frame, value: Any) -> None:
        need(value, {"nr_frames": int})
        if value["nr_frames"] != frame.sequence:
            raise ValueError(f"{value['nr_frames']} frames, but {frame.sequence} came before it")
        self._seen.end = frame.payload_at + frame.payload_bytes

    def _check_whole(self, size: int) -> None:
        """What is only known at the end of ``state``."""
        seen = self._seen
        for kind in (HELLO, CONFIG, SECTION, MEMORY_INDEX, END):
            if kind not in seen.order:
                self._tell("state", size, f"there is no {NAMES[kind]} frame")
        if seen.end is not None and seen.end != size:
            self._tell("state", seen.end, f"{size - seen.end} bytes follow END")
        index = seen.index
        if index is not None and not index.complete:
            self._tell("state", size, "the chunk hashes are not complete")
        slots = seen.description["slots"] if seen.description else None
        if index is not None and slots is not None and slots != [slot.row for slot in index.slots]:
            self._tell("state", size, "the slots of MEMORY_INDEX are not those of CONFIG")

    def _check_memory(self, index: Index, data: Bytes) -> None:
        if len(data) != index.size_bytes:
            self._tell(index.file, len(data), f"has {len(data)} bytes, the index says {index.size_bytes}")
        check = check_raw if index.file == "memory.raw" else check_frames
        self._nr_pages = check(data, index, lambda at, what: self._tell(index.file, at, what))


def need(value: Any, fields: dict[str, type]) -> None:
    """Raise :class:`ValueError` unless ``value`` is a map of exactly ``fields`` with exactly these types."""
    if type(value) is not dict or value.keys() != fields.keys():
        raise ValueError(f"expected a map of {', '.join(fields)}")
    for key, kind in fields.items():
        if type(value[key]) is not kind:
            raise ValueError(f"{key} is a {type(value[key]).__name__}, expected {kind.__name__}")
