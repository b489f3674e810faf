"""A console (virtio 1.2, 5.3) of one port, which Linux calls ``hvc0``, before a back-end as the serial port has one.

Two bounded buffers lie between the guest and the back-end (csrc/virtio_console.c): the device's thread in C is at one
end of both, the back-end's at the other. What is in them moves with the guest, so that no byte is lost or comes twice;
input for which there is no room waits in the back-end. Output waits too, as long as the back-end takes some of it: one
that takes nothing for a second, while its buffer is full, loses output until it goes on, since a driver may stand still
until it has got rid of its bytes (Linux spins with a lock held).
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any

from ..._core import ffi, lib
from ...errors import check
from ...memory.region import GuestMemory
from ...state.section import Fields, Value
from ..backends import Backend
from .transport import VirtioDevice

RX: int = lib.KMIG_CONSOLE_RX
TX: int = lib.KMIG_CONSOLE_TX
CHUNK_BYTES = 4096
CLOSE_WAIT_S = 1.0
STALL_MS = 1000
_CAPACITY: dict[int, int] = {RX: lib.KMIG_CONSOLE_RX_BYTES, TX: lib.KMIG_CONSOLE_TX_BYTES}


class Console(VirtioDevice):
    """Implements :class:`~kvmigrate.devices.backends.Uart` for ``backend``, which becomes its own. ``stall_ms`` is how
    long it may take nothing before output is dropped."""

    device_id = 3
    nr_queues: int = lib.KMIG_CONSOLE_NR_QUEUES

    def __init__(self, name: str, memory: GuestMemory, backend: Backend, stall_ms: int = STALL_MS) -> None:
        self._backend = backend
        # Guards what passes between the buffers and the back-end: with it held and _stopped set, nothing does.
        self._line = threading.Condition(threading.Lock())
        self._stopped = True
        self._wake_fd = -1
        self._console: Any = None
        try:
            self._wake_fd = -1 if backend.wake_fd is None else os.dup(backend.wake_fd)
            created = ffi.new("struct kmig_virtio_console **")
            check(lib.kmig_virtio_console_create(self._wake_fd, stall_ms, created), f"making the device {name}")
            self._console = created[0]
            super().__init__(name, memory)
        except BaseException:
            backend.close()
            self._release()
            raise
        backend.attach(self)

    @property
    def features(self) -> int:
        return 0

    def config(self) -> bytes:
        """Nothing of it is there without the features that nobody is offered (5.3.4)."""
        return b""

    def serve(self) -> None:
        lib.kmig_virtio_console_serve(self.handle, self._console)

    def statistics(self) -> dict[str, int]:
        """Bytes of output since the device was made that a back-end which took nothing made us drop."""
        return {"dropped": int(self._console.nr_dropped)}

    # The backend's side, called by its thread

    def rx_wanted(self) -> bool:
        """Whether input could be taken now."""
        with self._line:
            return not self._stopped and self._room() > 0

    def tx_waiting(self) -> bool:
        """Whether output waits until the backend can take it."""
        with self._line:
            return not self._stopped and self._held(TX) > 0

    def fill(self, read: Callable[[int], bytes]) -> None:
        """Take what ``read(most)`` returns without blocking; called only while there is room for ``most`` bytes."""
        with self._line:
            room = 0 if self._stopped else self._room()
            data = read(room) if room else b""
            if data:
                lib.kmig_virtio_console_add(self._console, RX, data, len(data))
                lib.kmig_virtio_kick(self.handle, RX)

    def drain(self) -> None:
        """Send what waits, as far as the backend takes it at once."""
        with self._line:
            data = b"" if self._stopped else self._copy(TX, CHUNK_BYTES)
            taken = self._backend.write(data) if data else 0
            if taken:
                lib.kmig_virtio_console_forget(self._console, TX, taken)
                lib.kmig_virtio_kick(self.handle, TX)
                self._line.notify_all()

    def finish(self) -> None:
        """Wait until what waits is sent, for a bounded time, and stop for good.

        One that is paused sends nothing: the machine that took its state over may have done so.
        """
        with self._line:
            # In this order: what waited for room is in the buffer when it no longer waits.
            self._line.wait_for(lambda: self._stopped or not (self._console.waiting or self._held(TX)), CLOSE_WAIT_S)
            self._stopped = True

    def _room(self) -> int:
        return lib.kmig_virtio_console_room(self._console, RX)

    def _held(self, at: int) -> int:
        return lib.kmig_virtio_console_held(self._console, at)

    def _copy(self, at: int, most: int) -> bytes:
        data = ffi.new("uint8_t[]", most)
        return bytes(ffi.buffer(data, lib.kmig_virtio_console_copy(self._console, at, data, most)))

    # State

    def pause(self) -> None:
        """See :meth:`Device.pause`. The back-end never blocks, so this waits for no more than what is under way."""
        with self._line:
            self._stopped = True
        super().pause()

    def resume(self) -> None:
        """See :meth:`Device.resume`; what waits for the back-end is sent from now on."""
        super().resume()
        with self._line:
            self._stopped = False
        if self._wake_fd < 0:
            # Nobody else would: it was to go where the guest has come from.
            lib.kmig_virtio_console_forget(self._console, TX, _CAPACITY[TX])
        self._backend.wake()

    def reset(self) -> None:
        """What the driver sent is sent, and what nobody has read yet is there to read, as with any line."""
        with self._lock:
            super().reset()
            self._console.nr_passed = 0

    def own_state(self) -> dict[str, Value]:
        """Input that no driver has and output that no back-end has; ``passed`` is how many bytes of the request at the
        head of the transmit queue are among the latter, or sent, already."""
        return {
            "rx": self._copy(RX, _CAPACITY[RX]),
            "tx": self._copy(TX, _CAPACITY[TX]),
            "passed": int(self._console.nr_passed),
        }

    def check_own_state(self, fields: Fields) -> None:
        """Raises ``BadField``."""
        fields.blob("rx", _CAPACITY[RX])
        fields.blob("tx", _CAPACITY[TX])
        # A request has at most 4 GiB - 1.
        fields.integer("passed", 0, 0xFFFFFFFF)

    def load(self, body: Value) -> None:
        """See :meth:`Device.load`."""
        with self._line, self._lock:
            super().load(body)
            for at, data in ((RX, body["rx"]), (TX, body["tx"])):
                lib.kmig_virtio_console_forget(self._console, at, _CAPACITY[at])
                lib.kmig_virtio_console_add(self._console, at, data, len(data))
            self._console.nr_passed = body["passed"]

    def close(self) -> None:
        """See :meth:`VirtioDevice.close`; the back-end first, which still gets what the guest's last words were."""
        self._backend.close()
        super().close()
        self._release()

    def _release(self) -> None:
        console, self._console = self._console, None
        wake_fd, self._wake_fd = self._wake_fd, -1
        if console is not None:
            lib.kmig_virtio_console_destroy(console)
        if wake_fd >= 0:
            os.close(wake_fd)
