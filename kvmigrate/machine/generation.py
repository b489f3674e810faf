"""The generation of a machine (VMGenID): 16 random bytes by which a guest learns that its past may have been copied.

They lie in guest memory, where boot/acpi.py put them for guests that get ACPI tables, so that a live migration carries
them along unchanged (Microsoft, "Virtual Machine Generation ID", 2012).
"""

from __future__ import annotations

import os

from ..memory.region import GuestMemory

# Of boot/acpi.py, which a restore should not wait to have imported.
TABLES_GPA, GENERATION_GPA, GENERATION_BYTES = 0xE0000, 0xF0000, 16
RSDP_HEAD_BYTES = 15
_SIGNATURE, _OEM_ID = b"RSD PTR ", b"KVMIGR"


def new_generation_id() -> bytes:
    """One that no machine has had."""
    return os.urandom(GENERATION_BYTES)


def read_generation(memory: GuestMemory) -> bytes | None:
    """The guest's generation, which a reboot does not change; None for one that has no tables to find it by."""
    return memory.read(GENERATION_GPA, GENERATION_BYTES) if _has_tables(memory) else None


def write_generation(memory: GuestMemory) -> bool:
    """Give the guest a new generation; False, and nothing written, for one that has no tables to find it by.

    Where the tables should lie is plain RAM to a guest without them. One that puts their first bytes there all the same
    has 16 bytes of its own memory changed, and nobody else's."""
    if not _has_tables(memory):
        return False
    memory.write(GENERATION_GPA, new_generation_id())
    return True


def _has_tables(memory: GuestMemory) -> bool:
    head = memory.read(TABLES_GPA, RSDP_HEAD_BYTES)
    return head.startswith(_SIGNATURE) and head.endswith(_OEM_ID)
