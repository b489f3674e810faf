"""The virtio entropy device (virtio 1.2, 5.4): the host's random bytes."""

from __future__ import annotations

from ..._core import lib
from ...memory.region import GuestMemory
from .transport import VirtioDevice

DEVICE_ID = 4


class VirtioRng(VirtioDevice):
    """Fills the driver's buffers by getrandom(2)."""

    device_id = DEVICE_ID

    def __init__(self, memory: GuestMemory, name: str = "rng0") -> None:
        super().__init__(name, memory)

    @property
    def features(self) -> int:
        return 0

    def config(self) -> bytes:
        return b""

    def serve(self) -> None:
        lib.kmig_virtio_rng_serve(self.handle)
