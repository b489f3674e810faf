"""The two buses: which device answers a port or an address, and how an access of several bytes reaches it."""

from __future__ import annotations

import bisect
from abc import ABC, abstractmethod
from collections.abc import Collection

from ..errors import ConfigError
from ..state.section import Section, Value, pack, require_version


class Device(ABC):
    """One emulated device. ``name`` is its section's name, ``version`` the newest layout of that section it reads.

    :meth:`read` and :meth:`write` are called by vCPU threads, several at once, with offsets and sizes that the guest
    chose; they never raise and never wait longer than a bounded moment.
    """

    name: str
    version: int = 1
    samples_alone: bool = False
    """Whether :meth:`sample` may come while vCPUs run."""
    max_access_bytes: int = 1
    """Wider accesses are split into byte accesses, as the bus controller does for an 8-bit ISA device."""
    item_names: Collection[str] = ()
    """The keys of :meth:`save`, in order, when they are always the same and none is a map's; or none at all."""

    @abstractmethod
    def read(self, offset: int, size: int) -> int:
        """The value of ``size`` bytes at ``offset`` from the device's base."""

    @abstractmethod
    def write(self, offset: int, size: int, value: int) -> None:
        """Take ``size`` bytes of ``value`` at ``offset`` from the device's base."""

    @abstractmethod
    def save(self) -> dict[str, Value]:
        """The body of the device's section. The device must be paused."""

    def packed(self) -> bytes:
        """The same in msgpack, byte for byte as :func:`pack` makes it."""
        return pack(self.save())

    def sample(self) -> dict[str, Value]:
        """As :meth:`save` of a device that is not paused: good enough for a trial to load. No vCPU may run, unless
        ``samples_alone``."""
        return self.save()

    @abstractmethod
    def load(self, body: Value) -> None:
        """Become what :meth:`save` saved. ``body`` is hostile: raises ``BadField``, and changes nothing then."""

    @abstractmethod
    def reset(self) -> None:
        """Return to the state after power-on."""

    def pause(self) -> None:  # noqa: B027  (most devices do nothing of their own accord)
        """Stop what the device does of its own accord, so that its state holds still. Idempotent."""

    def resume(self) -> None:  # noqa: B027
        """Go on after :meth:`pause` or :meth:`load`, and drive the interrupt line to its level again. Idempotent."""

    def section(self) -> Section:
        """The saved state as a section."""
        return Section(self.name, self.version, self.packed())

    def load_section(self, section: Section) -> None:
        """Load a section of this device. Raises ``BadVersion`` or ``BadField``."""
        require_version(section, self.version)
        self.load(section.body)


def all_ones(size: int) -> int:
    """What a bus reads where no device answers."""
    return (1 << 8 * size) - 1


class PioBus:
    """The port I/O space: 65536 ports. Reads of an absent port are all ones, writes vanish."""

    def __init__(self) -> None:
        self._ports: dict[int, tuple[Device, int]] = {}
        self._bases: dict[Device, int] = {}

    def add(self, device: Device, port: int, count: int) -> None:
        """Let ``device`` answer ``count`` ports from ``port``. Its offsets count from the first port it was added at.

        Raises :class:`ConfigError` when a port is taken or does not exist.
        """
        ports = range(port, port + count)
        if count < 1 or port < 0 or ports[-1] > 0xFFFF:
            raise ConfigError(f"{device.name}: ports {port:#x} to {port + count - 1:#x} do not exist")
        for taken in ports:
            if taken in self._ports:
                raise ConfigError(f"{device.name}: port {taken:#x} belongs to {self._ports[taken][0].name} already")
        base = self._bases.setdefault(device, port)
        self._ports.update(dict.fromkeys(ports, (device, base)))

    def read(self, port: int, size: int) -> int:
        """``in``: ``size`` (1, 2 or 4) bytes from ``port``."""
        found = self._ports.get(port)
        if found is None and size == 1:
            return 0xFF
        if found is not None and size <= found[0].max_access_bytes:
            return found[0].read(port - found[1], size)
        return sum(self.read(port + at & 0xFFFF, 1) << 8 * at for at in range(size))

    def write(self, port: int, size: int, value: int) -> None:
        """``out``: ``size`` (1, 2 or 4) bytes to ``port``."""
        found = self._ports.get(port)
        if found is None and size == 1:
            return
        if found is not None and size <= found[0].max_access_bytes:
            found[0].write(port - found[1], size, value)
            return
        for at in range(size):
            self.write(port + at & 0xFFFF, 1, value >> 8 * at & 0xFF)


class MmioBus:
    """Guest-physical addresses that are not RAM. Reads where no device is are all ones, writes vanish."""

    def __init__(self) -> None:
        self._bases: list[int] = []
        self._devices: list[tuple[Device, int]] = []

    def add(self, device: Device, gpa: int, size_bytes: int) -> None:
        """Let ``device`` answer ``size_bytes`` from ``gpa``. Raises :class:`ConfigError` on an overlap."""
        at = bisect.bisect_right(self._bases, gpa)
        before_end = self._bases[at - 1] + self._devices[at - 1][1] if at else 0
        after = self._bases[at] if at < len(self._bases) else 1 << 64
        if size_bytes < 1 or not before_end <= gpa or gpa + size_bytes > after:
            raise ConfigError(f"{device.name}: {size_bytes} bytes at {gpa:#x} overlap another device")
        self._bases.insert(at, gpa)
        self._devices.insert(at, (device, size_bytes))

    def _find(self, gpa: int, size: int) -> tuple[Device, int] | None:
        at = bisect.bisect_right(self._bases, gpa) - 1
        if at < 0 or gpa + size > self._bases[at] + self._devices[at][1]:
            return None
        return self._devices[at][0], gpa - self._bases[at]

    def read(self, gpa: int, size: int) -> int:
        """A load of ``size`` (1 to 8) bytes at ``gpa``; one that crosses a device's end reads all ones."""
        found = self._find(gpa, size)
        if found is None:
            return all_ones(size)
        device, offset = found
        if size <= device.max_access_bytes:
            return device.read(offset, size)
        return sum(device.read(offset + at, 1) << 8 * at for at in range(size))

    def write(self, gpa: int, size: int, value: int) -> None:
        """A store of ``size`` (1 to 8) bytes at ``gpa``; one that crosses a device's end vanishes."""
        found = self._find(gpa, size)
        if found is None:
            return
        device, offset = found
        if size <= device.max_access_bytes:
            device.write(offset, size, value)
            return
        for at in range(size):
            device.write(offset + at, 1, value >> 8 * at & 0xFF)
