"""The virtio devices of a machine: where each is, how it is wired to KVM, and the images behind the disks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..config import DiskConfig
from ..devices.backends import open_backend
from ..devices.bus import MmioBus
from ..devices.tap import open_tap
from ..devices.virtio import registers as reg
from ..devices.virtio.balloon import VirtioBalloon
from ..devices.virtio.block import VirtioBlock
from ..devices.virtio.console import Console
from ..devices.virtio.image import DiskImage, open_disk
from ..devices.virtio.net import Net
from ..devices.virtio.rng import VirtioRng
from ..devices.virtio.transport import WINDOW_BYTES, VirtioDevice
from ..errors import ConfigError
from ..kvm.vm import Vm
from ..memory.region import GuestMemory
from ..record import dataclass
from .specs import BALLOON, CONSOLE, MAX_DEVICES, VirtioSpec

FIRST_GPA = 0xD000_0000
STRIDE = 0x1000
_GSIS = (*range(16, 24), *range(10, 16))
"""The lines of device 0, 1, …: first those of the IOAPIC that no ISA device has."""


@dataclass(frozen=True, slots=True)
class Backings:
    """How the host's side of a device is opened: a disk's image; a tap's file descriptor, by its interface."""

    disk: Callable[[DiskConfig], DiskImage]
    tap: Callable[[str], int]


HOST = Backings(lambda disk: open_disk(disk.name, disk.path, disk.read_only), open_tap)


class VirtioBus:
    """Builds, wires and closes the devices that ``specs`` name, in this order; the order is part of what a guest sees.

    Raises :class:`ConfigError` or :class:`HostError` when an image cannot be opened, with nothing left open.
    """

    def __init__(
        self, specs: Sequence[VirtioSpec], vm: Vm, memory: GuestMemory, mmio: MmioBus, backings: Backings = HOST
    ) -> None:
        self._backings = backings
        self.devices: list[VirtioDevice] = []
        self.images: list[DiskImage] = []
        self._closers: list[Callable[[], None]] = []
        try:
            if len(specs) > MAX_DEVICES:
                raise ConfigError(f"{len(specs)} virtio devices cannot be had: take at most {MAX_DEVICES}")
            for spec in specs:
                self._wire(self._make(spec, memory), vm, mmio)
        except BaseException:
            self.close()
            raise

    def _make(self, spec: VirtioSpec, memory: GuestMemory) -> VirtioDevice:
        if spec.net is not None:
            return Net(spec.name, memory, self._backings.tap(spec.net.interface), spec.net.mac or bytes(6))
        if spec.name == BALLOON:
            return VirtioBalloon(memory)
        if spec.name == CONSOLE:
            return Console(spec.name, memory, open_backend(spec.backend, "console"))
        if spec.disk is None:
            return VirtioRng(memory, spec.name)
        image = self._backings.disk(spec.disk)
        self.images.append(image)
        self._closers.append(image.close)
        return VirtioBlock(memory, image)

    def _wire(self, device: VirtioDevice, vm: Vm, mmio: MmioBus) -> None:
        self._closers.append(device.close)
        gpa, gsi = slot_of(len(self.devices))
        mmio.add(device, gpa, WINDOW_BYTES)
        vm.group.answer_virtio(gpa, device.handle)
        vm.irqfd(device.handle.irq_fd, gsi)
        for queue in range(device.nr_queues):
            vm.ioeventfd(device.handle.kick_fd[queue], gpa + reg.QUEUE_NOTIFY, 4, queue)
        self.devices.append(device)

    @property
    def balloon(self) -> VirtioBalloon | None:
        """The balloon, where there is one."""
        return next((device for device in self.devices if isinstance(device, VirtioBalloon)), None)

    def lock(self) -> None:
        """Take every image for this VM. Idempotent. Raises :class:`ConfigError` when another VM has one, and then holds
        none."""
        try:
            for image in self.images:
                image.lock()
        except BaseException:
            self.unlock()
            raise

    def flush(self) -> None:
        """Bring all that was written to the storage, so that little is left for :meth:`unlock`. Raises
        :class:`HostError`."""
        for image in self.images:
            image.flush()

    def unlock(self) -> None:
        """Let another VM take the images: every device is parked, and stays so until :meth:`lock`. Idempotent."""
        for image in self.images:
            image.unlock()

    def close(self) -> None:
        """End the devices' threads and close the images. Idempotent."""
        while self._closers:
            self._closers.pop()()


def slot_of(number: int) -> tuple[int, int]:
    """The address and the interrupt line of the virtio device of that number."""
    return FIRST_GPA + number * STRIDE, _GSIS[number]
