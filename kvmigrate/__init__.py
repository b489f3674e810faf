"""kvmigrate: live migration and snapshots of Linux KVM guests, with evidence that nothing was lost.

::

    machine = Machine.create(MachineConfig("web", memory_bytes=1 << 30, boot=BootConfig(Path("kernel"))))
    machine.start()
    machine.resume()
    take_snapshot(machine, Path("web.snapshot"))
    send(machine, "tcp://192.0.2.7:4444")

The names below are loaded on first use, so that importing the package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import errors
    from .api import Received, Restored, check, receive, restore, send, take_snapshot
    from .config import (
        BootConfig,
        Compression,
        DiskConfig,
        MachineConfig,
        MemoryBackend,
        MigrationParameters,
        NetConfig,
        SnapshotParameters,
    )
    from .machine.machine import Machine

_HOME = {
    "BootConfig": "config",
    "Compression": "config",
    "Machine": "machine.machine",
    "DiskConfig": "config",
    "MachineConfig": "config",
    "MemoryBackend": "config",
    "MigrationParameters": "config",
    "NetConfig": "config",
    "Received": "api",
    "Restored": "api",
    "SnapshotParameters": "config",
    "check": "api",
    "receive": "api",
    "restore": "api",
    "send": "api",
    "take_snapshot": "api",
}

__all__ = [
    "BootConfig",
    "Compression",
    "DiskConfig",
    "Machine",
    "MachineConfig",
    "MemoryBackend",
    "MigrationParameters",
    "NetConfig",
    "Received",
    "Restored",
    "SnapshotParameters",
    "check",
    "errors",
    "receive",
    "restore",
    "send",
    "take_snapshot",
]


def __getattr__(name: str) -> Any:
    if name == "errors":
        return import_module(".errors", __name__)
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)
