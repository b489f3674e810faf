"""What is in a snapshot, as plain values for a person or a program."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

from ..config import PAGE_BYTES
from ..state.section import Value
from .format import extents
from .statefile import SavedState, opened, read_state

_VCPU = re.compile(r"vcpu\d+")


def inspect(directory: Path) -> dict[str, Value]:
    """Registers, MSRs, devices and memory ranges of the snapshot ``directory``, under the kernel's field names.

    ``vcpus``, ``vm`` and ``devices`` hold the sections as they were saved, MSRs by name. Every value can be written as
    JSON: bytes are hexadecimal text. Reads ``state`` alone, no memory. Raises :class:`SnapshotError`.
    """
    with opened(directory) as directory_fd:
        saved = read_state(directory_fd, directory)
    shown = {part.name: {"version": part.version, "body": _plain(dict(part.body))} for part in saved.sections}
    vcpus = {name: body for name, body in shown.items() if _VCPU.fullmatch(name)}
    return {
        "directory": str(directory),
        "format": saved.hello.format,
        "kvmigrate": saved.hello.kvmigrate,
        "created": datetime.fromtimestamp(saved.hello.created_ms / 1e3, UTC).isoformat(timespec="milliseconds"),
        "description": _plain(dict(saved.description)),
        "vcpus": vcpus,
        "vm": shown.pop("vm", None),
        "devices": {name: body for name, body in shown.items() if name not in vcpus},
        "memory": _memory(saved),
    }


def _memory(saved: SavedState) -> dict[str, Value]:
    """The memory file, and for each slot the ranges that hold data: guest physical address, size, place in the file."""
    index = saved.index
    slots = []
    before = 0
    for slot, hashes in zip(index.slots, saved.hashes.of_slot, strict=True):
        ranges = [
            {
                "gpa": (slot.base_gfn + first) * PAGE_BYTES,
                "size_bytes": nr_pages * PAGE_BYTES,
                "file_offset": (before + first) * PAGE_BYTES if index.compression == "none" else None,
            }
            for first, nr_pages in extents(hashes, slot.nr_pages)
        ]
        gpa, size_bytes = slot.base_gfn * PAGE_BYTES, slot.nr_pages * PAGE_BYTES
        slots.append({"id": slot.id, "gpa": gpa, "size_bytes": size_bytes, "ranges": ranges})
        before += slot.nr_pages
    return {
        "file": index.file,
        "compression": index.compression,
        "file_bytes": index.size_bytes,
        "guest_bytes": index.nr_pages * PAGE_BYTES,
        "data_bytes": index.nr_hashed * PAGE_BYTES,
        "digest": f"{index.digest:016x}",
        "slots": slots,
    }


def _plain(value: Value) -> Value:
    """``value`` with what JSON does not know written out."""
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value
