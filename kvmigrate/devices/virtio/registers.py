"""The numbers of virtio-mmio: register offsets, status and feature bits (virtio 1.2, 4.2.2, 2.1 and 6)."""

from __future__ import annotations

from ..._core import lib

MAGIC, VERSION, DEVICE_ID, VENDOR = 0x000, 0x004, 0x008, 0x00C
DEVICE_FEATURES, DEVICE_FEATURES_SEL = 0x010, 0x014
DRIVER_FEATURES, DRIVER_FEATURES_SEL = 0x020, 0x024
QUEUE_SEL, QUEUE_NUM_MAX, QUEUE_NUM, QUEUE_READY, QUEUE_NOTIFY = 0x030, 0x034, 0x038, 0x044, 0x050
INTERRUPT_STATUS, INTERRUPT_ACK, STATUS = 0x060, 0x064, 0x070
QUEUE_ADDRESSES = {
    0x080: ("desc", 0),
    0x084: ("desc", 32),
    0x090: ("avail", 0),
    0x094: ("avail", 32),
    0x0A0: ("used", 0),
    0x0A4: ("used", 32),
}
"""Offset → the part of a queue whose address is set here, and by how many bits this half of it is shifted."""
SHM_REGISTERS = frozenset({0x0B0, 0x0B4, 0x0B8, 0x0BC})
CONFIG_GENERATION, CONFIG = 0x0FC, 0x100

MAGIC_VALUE = int.from_bytes(b"virt", "little")
VENDOR_ID = int.from_bytes(b"KMIG", "little")

ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK, NEEDS_RESET, FAILED = 1, 2, 4, 8, 64, 128
STATUS_BITS = ACKNOWLEDGE | DRIVER | DRIVER_OK | FEATURES_OK | FAILED
"""What a driver can set."""

F_INDIRECT_DESC, F_EVENT_IDX, F_VERSION_1 = 1 << 28, 1 << 29, 1 << 32
TRANSPORT_FEATURES = F_INDIRECT_DESC | F_EVENT_IDX | F_VERSION_1

QUEUE_FIELDS = ("size", "ready", "desc", "avail", "used", "last_avail", "used_idx")
"""The fields of ``struct kmig_virtq`` that are its state."""
ISR_BITS: int = lib.KMIG_VIRTIO_ISR_USED | lib.KMIG_VIRTIO_ISR_CONFIG


def acceptable(driver_features: int, offered: int) -> bool:
    """Whether a device may set FEATURES_OK: nothing was taken that it did not offer, and no legacy driver asks."""
    return not driver_features & ~offered and bool(driver_features & F_VERSION_1)


def is_queue_size(value: int, most: int) -> bool:
    """Whether a split queue may have ``value`` entries (2.7: a power of two)."""
    return 0 < value <= most and value & value - 1 == 0
