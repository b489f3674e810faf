"""The balloon as QMP speaks of it: in bytes that the guest keeps, where the device counts pages that it gives up."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..config import PAGE_BYTES
from ..devices.virtio.balloon import VirtioBalloon
from ..machine.machine import Machine
from .qmp import QmpError


def resize(machine: Machine, keep_bytes: int) -> None:
    """Ask the guest to keep no more than ``keep_bytes`` of its memory; all of it when that is more than it has.

    Raises :class:`QmpError`, of QEMU's class, when nobody in the guest would hear it."""
    balloon = _balloon(machine)
    if not balloon.has_driver:
        raise QmpError("the guest has no balloon driver, or it is not ready yet", "DeviceNotActive")
    surplus_bytes = max(machine.memory.size_bytes - keep_bytes, 0)
    balloon.set_target(surplus_bytes // PAGE_BYTES)


def facts(machine: Machine) -> Mapping[str, Any]:
    """What the guest has now and is asked to keep, in bytes; the first is its driver's word."""
    balloon, size_bytes = _balloon(machine), machine.memory.size_bytes
    return {
        "actual": max(size_bytes - balloon.actual_pages * PAGE_BYTES, 0),
        "x-kvmigrate-target": size_bytes - balloon.target_pages * PAGE_BYTES,
        "x-kvmigrate-driver": balloon.has_driver,
    }


def _balloon(machine: Machine) -> VirtioBalloon:
    found = machine.platform.virtio.balloon
    if found is None:
        raise QmpError("No balloon device has been activated", "DeviceNotActive")
    return found
