"""The saved state that all virtio devices have in common, checked by itself and field against field."""

from __future__ import annotations

from typing import Any

from ..._core import ffi, lib
from ...errors import BadField
from ...record import dataclass
from ...state.section import Fields, Value
from . import registers as reg


@dataclass(frozen=True, slots=True)
class Saved:
    """The registers of one device, and of each queue what :data:`registers.QUEUE_FIELDS` names."""

    status: int
    device_features_sel: int
    driver_features_sel: int
    driver_features: int
    queue_sel: int
    generation: int
    isr: int
    broken: bool
    queues: list[dict[str, int]]

    def set_queues(self, handle: Any, where: str) -> None:
        """Give the parked device behind ``handle`` these queues, features and interrupt bits. Raises :class:`BadField`
        when a ring is not aligned or not in RAM, and changes nothing then."""
        before = bytes(ffi.buffer(handle.queue))
        for at, queue in enumerate(self.queues):
            for name, value in queue.items():
                setattr(handle.queue[at], name, value)
            handle.queue[at].ready = 0
            if queue["ready"] and lib.kmig_virtio_enable(handle, at) < 0:
                ffi.memmove(handle.queue, before, len(before))
                raise BadField(f"{where}: the rings of queue {at} are not aligned or not in the guest's memory")
        handle.features = self.driver_features if self.status & reg.FEATURES_OK else 0
        handle.isr, handle.broken = self.isr, self.broken


def saved_queue(queue: Any) -> dict[str, int]:
    """What :data:`registers.QUEUE_FIELDS` names of a ``struct kmig_virtq``. Spelt out: a guest waits for it."""
    return {
        "size": queue.size,
        "ready": queue.ready,
        "desc": queue.desc,
        "avail": queue.avail,
        "used": queue.used,
        "last_avail": queue.last_avail,
        "used_idx": queue.used_idx,
    }


def read_saved(fields: Fields, where: str, offered: int, nr_queues: int, queue_max: int) -> Saved:
    """Check all that is left of a hostile body. Raises :class:`BadField`."""
    word = 0xFFFFFFFF
    saved = Saved(
        status=fields.integer("status", 0, reg.STATUS_BITS),
        device_features_sel=fields.integer("device_features_sel", 0, word),
        driver_features_sel=fields.integer("driver_features_sel", 0, word),
        driver_features=fields.integer("driver_features"),
        queue_sel=fields.integer("queue_sel", 0, word),
        generation=fields.integer("generation", 0, word),
        isr=fields.integer("isr", 0, reg.ISR_BITS),
        broken=fields.boolean("broken"),
        queues=[_read_queue(queue, where, queue_max) for queue in fields.sequence("queues", nr_queues)],
    )
    fields.done()
    _check_together(saved, where, offered, nr_queues)
    return saved


def _read_queue(value: Value, where: str, queue_max: int) -> dict[str, int]:
    fields = Fields(value, f"{where}: queue")
    high = {"size": queue_max, "ready": 1, "last_avail": 0xFFFF, "used_idx": 0xFFFF}
    queue = {name: fields.integer(name, 0, high.get(name, 2**64 - 1)) for name in reg.QUEUE_FIELDS}
    fields.done()
    if queue["size"] and not reg.is_queue_size(queue["size"], queue_max):
        raise BadField(f"{where}: a queue of {queue['size']} entries cannot be: it has a power of two")
    if queue["last_avail"] - queue["used_idx"] & 0xFFFF > queue["size"]:
        raise BadField(f"{where}: a queue has more requests in hand than entries")
    return queue


def _check_together(saved: Saved, where: str, offered: int, nr_queues: int) -> None:
    if saved.status & ~reg.STATUS_BITS:
        raise BadField(f"{where}: field 'status' is {saved.status}, which has bits that no driver sets")
    if len(saved.queues) != nr_queues:
        raise BadField(f"{where}: {len(saved.queues)} queues were saved, this device has {nr_queues}")
    agreed = saved.status & reg.FEATURES_OK
    if agreed and not reg.acceptable(saved.driver_features, offered):
        missing = saved.driver_features & ~offered
        raise BadField(f"{where}: the guest uses features {missing:#x}, which this device does not offer")
    if not agreed and (saved.status & reg.DRIVER_OK or any(queue["ready"] for queue in saved.queues)):
        raise BadField(f"{where}: the device is in use, but no features were agreed on")
