"""A network card (virtio 1.2, 5.1) before a tap. Its packets and commands go by a thread in C (csrc/virtio_net.c).

What moves with it: whether its driver still has to announce itself. The packets that it had in hand are the network's
to lose; those that its driver had queued lie in guest memory and are sent by the other side.
"""

from __future__ import annotations

import os
import struct
from typing import Any

from ..._core import ffi, lib
from ...config import is_station
from ...errors import ConfigError, check
from ...memory.region import GuestMemory
from ...state.section import Fields, Value
from . import registers as reg
from .transport import VirtioDevice

# 5.1.3
F_CSUM, F_GUEST_CSUM, F_MAC = 1 << 0, 1 << 1, 1 << 5
F_GUEST_TSO4, F_GUEST_TSO6, F_HOST_TSO4, F_HOST_TSO6 = 1 << 7, 1 << 8, 1 << 11, 1 << 12
F_MRG_RXBUF, F_STATUS, F_CTRL_VQ, F_GUEST_ANNOUNCE = 1 << 15, 1 << 16, 1 << 17, 1 << 21
FEATURES = (
    F_CSUM
    | F_GUEST_CSUM
    | F_MAC
    | F_GUEST_TSO4
    | F_GUEST_TSO6
    | F_HOST_TSO4
    | F_HOST_TSO6
    | F_MRG_RXBUF
    | F_STATUS
    | F_CTRL_VQ
    | F_GUEST_ANNOUNCE
)
_CONFIG = struct.Struct("<6sH")


class Net(VirtioDevice):
    """The card ``mac`` of the guest; ``fd`` is its tap, as :func:`kvmigrate.devices.tap.open_tap` gives it, and becomes
    the card's own. Raises :class:`ConfigError` for an address that no card can have, :class:`HostError`."""

    device_id = 1
    nr_queues: int = lib.KMIG_NET_NR_QUEUES

    def __init__(self, name: str, memory: GuestMemory, fd: int, mac: bytes) -> None:
        self._fd = fd
        self._moved = False
        self._net: Any = None
        try:
            if not is_station(mac):
                raise ConfigError(f"{name}: {mac.hex(':')} is not the address of one station")
            created = ffi.new("struct kmig_virtio_net **")
            check(lib.kmig_virtio_net_create(fd, mac, created), f"making the device {name}")
            self._net = created[0]
            super().__init__(name, memory)
        except BaseException:
            self._release()
            raise

    @property
    def features(self) -> int:
        return FEATURES

    @property
    def mac(self) -> bytes:
        return bytes(ffi.buffer(self._net.mac))

    def config(self) -> bytes:
        return _CONFIG.pack(self.mac, self._net.status)

    def serve(self) -> None:
        lib.kmig_virtio_net_serve(self.handle, self._net)

    def statistics(self) -> dict[str, int]:
        """Packets since the device was made: ``received`` by the guest, ``sent`` by it, and ``dropped`` either way."""
        return {
            "received": int(self._net.nr_received),
            "sent": int(self._net.nr_sent),
            "dropped": int(self._net.nr_dropped),
        }

    def announce(self) -> None:
        """Tell the network where this card is now: through its driver when it knows how (5.1.6.5.4), and by a few RARP
        requests that the device's thread sends within half a second. Nothing happens while no driver uses the card."""
        with self._lock:
            if self._status & reg.DRIVER_OK:
                check(lib.kmig_virtio_net_announce(self.handle, self._net), f"announcing {self.name}")

    def resume(self) -> None:
        """See :meth:`Device.resume`. The first time after :meth:`load` the guest is in another place: announce it."""
        super().resume()
        if self._moved:
            self._moved = False
            self.announce()

    def reset(self) -> None:
        super().reset()
        with self._lock:
            self._net.status &= ~lib.KMIG_NET_S_ANNOUNCE
            self._net.nr_announce = 0

    def own_state(self) -> dict[str, Value]:
        """``announce`` is the bit of the status that the driver has not acknowledged yet; the link is the host's."""
        return {"announce": bool(self._net.status & lib.KMIG_NET_S_ANNOUNCE)}

    def check_own_state(self, fields: Fields) -> None:
        """Raises ``BadField``."""
        fields.boolean("announce")

    def load(self, body: Value) -> None:
        """Raises ``BadField`` for what no driver could have made of this card, and changes nothing then."""
        super().load(body)
        announce: int = lib.KMIG_NET_S_ANNOUNCE if body["announce"] else 0
        with self._lock:
            self._net.status = self._net.status & ~lib.KMIG_NET_S_ANNOUNCE | announce
            self._moved = True

    def close(self) -> None:
        super().close()
        self._release()

    def _release(self) -> None:
        net, self._net = self._net, None
        fd, self._fd = self._fd, -1
        if net is not None:
            lib.kmig_virtio_net_destroy(net)
        if fd >= 0:
            os.close(fd)
