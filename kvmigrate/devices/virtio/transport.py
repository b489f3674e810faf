"""The registers of a virtio-mmio device (virtio 1.2, 4.2.2), and what every virtio device saves.

The driver sets a device up through these registers; from DRIVER_OK on, the device's thread, one call into C, works on
the queues in guest memory. Until then the thread is parked, so the registers may change the queues freely.
"""

from __future__ import annotations

import os
import sys
import threading
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

from ..._core import ffi, lib
from ...errors import check
from ...memory.region import GuestMemory
from ...state.section import Fields, Value
from ...threads import Thread
from ..bus import Device
from . import registers as reg
from .saved import read_saved, saved_queue

WINDOW_BYTES = 0x200
"""How much of the address space a device answers: its registers, and 256 bytes of configuration."""


class VirtioDevice(Device):
    """One virtio device on ``memory``, paused. A subclass says what it is; :meth:`close` it before ``memory``."""

    samples_alone = True
    max_access_bytes = 4
    device_id: int
    nr_queues: int = 1
    queue_max: int = lib.KMIG_VIRTQ_MAX_SIZE

    def __init__(self, name: str, memory: GuestMemory) -> None:
        self.name = name
        self._lock = threading.RLock()
        self._paused = True
        created = ffi.new("struct kmig_virtio **")
        check(lib.kmig_virtio_create(memory.handle, self.nr_queues, created), f"making the device {name}")
        self.handle: Any = created[0]
        self._status = self._driver_features = self._generation = 0
        self._device_features_sel = self._driver_features_sel = self._queue_sel = 0
        self._thread: Thread | None = None

    # What a subclass is

    @property
    @abstractmethod
    def features(self) -> int:
        """The bits of its own kind that the device offers; the transport adds those of the queues."""

    @abstractmethod
    def config(self) -> bytes:
        """Its configuration space as it is now."""

    @abstractmethod
    def serve(self) -> None:
        """The body of the device's thread: one call into C, which returns once the device is closed."""

    def _serve_on(self) -> None:
        self.serve()
        if self.handle.failed:
            why = os.strerror(self.handle.failed)
            print(
                f"kvmigrate: {self.name}: {why}: the device has stopped, broken for the guest; restart that",
                file=sys.stderr,
                flush=True,
            )

    def own_state(self) -> dict[str, Value]:
        """What a section has beside the transport's fields: what must be the same where the guest goes on."""
        return {}

    def check_own_state(self, fields: Fields) -> None:
        """Take the keys of :meth:`own_state` from a saved section. Raises ``BadField``; changes nothing."""

    @property
    def offered(self) -> int:
        """All feature bits that the driver may take."""
        return self.features | reg.TRANSPORT_FEATURES

    def config_changed(self) -> None:
        """Tell the driver that :meth:`config` gives something else now (2.5)."""
        with self._lock:
            self._generation = self._generation + 1 & 0xFFFFFFFF
            lib.kmig_virtio_interrupt(self.handle, lib.KMIG_VIRTIO_ISR_CONFIG)

    # Guest accesses

    def read(self, offset: int, size: int) -> int:
        """A register, or some of the configuration."""
        with self._lock:
            if offset >= reg.CONFIG:
                config, at = self.config(), offset - reg.CONFIG
                return int.from_bytes(config[at : at + size], "little")
            # A driver must use aligned 32-bit accesses (4.2.2.2); another one reads nothing.
            return self._register(offset) if size == 4 else 0

    def write(self, offset: int, size: int, value: int) -> None:
        """A register; no device here has configuration that can be written."""
        with self._lock:
            if size == 4 and offset < reg.CONFIG:
                self._set_register(offset, value)

    def _register(self, offset: int) -> int:
        reader = self._readers.get(offset)
        return reader(self) if reader is not None else 0

    def _read_status(self) -> int:
        return self._status | (reg.NEEDS_RESET if self.handle.broken else 0)

    def _read_ready(self) -> int:
        queue = self._queue()
        return int(queue.ready) if queue is not None else 0

    _readers: ClassVar[dict[int, Callable[[VirtioDevice], int]]] = {
        reg.MAGIC: lambda _: reg.MAGIC_VALUE,
        reg.VERSION: lambda _: 2,
        reg.DEVICE_ID: lambda self: self.device_id,
        reg.VENDOR: lambda _: reg.VENDOR_ID,
        reg.DEVICE_FEATURES: lambda self: self._word(self.offered, self._device_features_sel),
        reg.QUEUE_NUM_MAX: lambda self: self.queue_max if self._queue() is not None else 0,
        reg.QUEUE_READY: _read_ready,
        reg.INTERRUPT_STATUS: lambda self: int(self.handle.isr),
        reg.STATUS: _read_status,
        # No region of shared memory exists: its length and base read as all ones (4.2.2).
        **dict.fromkeys(reg.SHM_REGISTERS, lambda _: 0xFFFFFFFF),
        reg.CONFIG_GENERATION: lambda self: self._generation,
    }

    def _set_register(self, offset: int, value: int) -> None:
        if offset == reg.QUEUE_NOTIFY:
            lib.kmig_virtio_kick(self.handle, value)
        elif offset == reg.INTERRUPT_ACK:
            lib.kmig_virtio_ack(self.handle, value)
        elif offset == reg.STATUS:
            self._set_status(value)
        elif offset == reg.DEVICE_FEATURES_SEL:
            self._device_features_sel = value
        elif offset == reg.DRIVER_FEATURES_SEL:
            self._driver_features_sel = value
        elif offset == reg.QUEUE_SEL:
            self._queue_sel = value
        elif offset == reg.DRIVER_FEATURES:
            self._set_driver_features(value)
        else:
            self._set_queue(offset, value)

    @staticmethod
    def _word(bits: int, number: int) -> int:
        return bits >> 32 * number & 0xFFFFFFFF if number < 2 else 0

    def _set_driver_features(self, value: int) -> None:
        at = self._driver_features_sel
        if at < 2 and not self._status & reg.FEATURES_OK:
            self._driver_features = self._driver_features & ~(0xFFFFFFFF << 32 * at) | value << 32 * at

    def _set_status(self, value: int) -> None:
        if value == 0:
            self.reset()
            return
        new = value & reg.STATUS_BITS & ~self._status
        if new & reg.FEATURES_OK and not reg.acceptable(self._driver_features, self.offered):
            # The driver reads the bit back and sees that it may not go on (3.1.1).
            new &= ~reg.FEATURES_OK
        self._status |= new
        if not self._status & reg.FEATURES_OK:
            self._status &= ~reg.DRIVER_OK
        if self._status & reg.FEATURES_OK:
            self.handle.features = self._driver_features
        self._run_thread()

    # Queues

    def _queue(self) -> Any | None:
        """The selected queue, or None when there is none of that number."""
        return self.handle.queue[self._queue_sel] if self._queue_sel < self.nr_queues else None

    def _set_queue(self, offset: int, value: int) -> None:
        queue = self._queue()
        if queue is None:
            return
        if offset == reg.QUEUE_READY and not value & 1:
            lib.kmig_virtio_pause(self.handle)
            queue.ready = 0
            self._run_thread()
        elif queue.ready or not self._may_set_up():
            return
        elif offset == reg.QUEUE_READY:
            if lib.kmig_virtio_enable(self.handle, self._queue_sel) < 0:
                lib.kmig_virtio_break(self.handle)
        elif offset == reg.QUEUE_NUM and reg.is_queue_size(value, self.queue_max):
            queue.size = value
        elif offset in reg.QUEUE_ADDRESSES:
            part, shift = reg.QUEUE_ADDRESSES[offset]
            setattr(queue, part, getattr(queue, part) & ~(0xFFFFFFFF << shift) | value << shift)

    def _may_set_up(self) -> bool:
        """Whether queues may change: between the agreement on features and DRIVER_OK (3.1.1)."""
        return bool(self._status & reg.FEATURES_OK) and not self._status & reg.DRIVER_OK

    # States

    def _run_thread(self) -> None:
        """Let the thread go on or park, as it should now. There is none until a driver is: most guests leave most of
        their devices alone, and two threads take half as long to start as KVM takes to make a VM."""
        if self._status & reg.DRIVER_OK and self._thread is None:
            self._thread = Thread(self._serve_on)
            self._thread.start()
        if self._status & reg.DRIVER_OK and not self._paused:
            lib.kmig_virtio_resume(self.handle)
        else:
            lib.kmig_virtio_pause(self.handle)

    def _clear(self) -> None:
        self._status = self._driver_features = self._generation = 0
        self._device_features_sel = self._driver_features_sel = self._queue_sel = 0

    def reset(self) -> None:
        """Also what the driver does by writing 0 to the status: waits for the request in hand."""
        with self._lock:
            lib.kmig_virtio_pause(self.handle)
            lib.kmig_virtio_reset(self.handle)
            self._clear()

    def pause(self) -> None:
        with self._lock:
            self._paused = True
            self._run_thread()

    def resume(self) -> None:
        with self._lock:
            self._paused = False
            self._run_thread()

    def save(self) -> dict[str, Value]:
        """Registers and queues. What is in the rings lies in guest memory."""
        with self._lock:
            handle = self.handle
            queues = handle.queue
            return {
                "status": self._status,
                "device_features_sel": self._device_features_sel,
                "driver_features_sel": self._driver_features_sel,
                "driver_features": self._driver_features,
                "queue_sel": self._queue_sel,
                "generation": self._generation,
                "isr": handle.isr,
                "broken": bool(handle.broken),
                "queues": [saved_queue(queues[at]) for at in range(self.nr_queues)],
            } | self.own_state()

    def sample(self) -> dict[str, Value]:
        """See :meth:`Device.sample`. The device's thread works on: how far it is in a queue is not of one moment, and
        so told as if it had nothing in hand."""
        body = self.save()
        for queue in body["queues"]:
            queue["used_idx"] = queue["last_avail"]
        return body

    def load(self, body: Value) -> None:
        """Raises ``BadField`` for what no driver could have made of these registers."""
        fields = Fields(body, self.name)
        self.check_own_state(fields)
        saved = read_saved(fields, self.name, self.offered, self.nr_queues, self.queue_max)
        with self._lock:
            lib.kmig_virtio_pause(self.handle)
            saved.set_queues(self.handle, self.name)
            self._status, self._generation = saved.status, saved.generation
            self._device_features_sel = saved.device_features_sel
            self._driver_features_sel = saved.driver_features_sel
            self._driver_features, self._queue_sel = saved.driver_features, saved.queue_sel
            self._run_thread()

    def close(self) -> None:
        """End the thread and give the device back, before its memory. Idempotent."""
        if self.handle is None:
            return
        lib.kmig_virtio_quit(self.handle)
        if self._thread is not None:
            self._thread.join()
        lib.kmig_virtio_destroy(self.handle)
        self.handle = None
