"""What a user can ask for, validated once: frozen values, and the parsers of sizes, times and addresses."""

from __future__ import annotations

import os
import re
from enum import StrEnum
from pathlib import Path

from .errors import ConfigError
from .record import dataclass

PAGE_BYTES = 4096
# Not compiled here: that takes as long as all the rest of this module, and re remembers what it has compiled.
_NAME = "[A-Za-z0-9][A-Za-z0-9._-]{0,62}"
_SIZE = r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:iB|B)?"
_DURATION = r"(\d+(?:\.\d+)?)\s*(us|ms|s|min|m)?"
# At most 15 characters, as the kernel takes them (dev_valid_name), and none that an option would be cut at.
_INTERFACE = r"(?!\.{1,2}$)[A-Za-z0-9._-]{1,15}"
_MAC = "[0-9a-fA-F]{2}(?::[0-9a-fA-F]{2}){5}"
_UNIT_BYTES = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_UNIT_MS = {None: 1.0, "us": 0.001, "ms": 1.0, "s": 1000.0, "m": 60000.0, "min": 60000.0}
MAX_CPUS = 64
MIN_MEMORY_BYTES = 1 << 20
MAX_MEMORY_BYTES = 1 << 40


def is_name(text: str) -> bool:
    """Whether a VM, a disk or a network may be called that: it is safe in a file's name, a command line and a log."""
    return re.fullmatch(_NAME, text) is not None


def parse_size(text: str) -> int:
    """``1G``, ``512MiB``, ``1.5g`` or ``4096`` as bytes; units are powers of 1024."""
    match = re.fullmatch(_SIZE, text.strip(), re.IGNORECASE)
    if match is None:
        raise ConfigError(f"{text!r} is not a size: write it like 512M, 1G or 1.5GiB")
    return round(float(match[1]) * _UNIT_BYTES[match[2].upper()])


def parse_rate(text: str) -> int:
    """``1GiB/s`` or ``100M`` as bytes per second."""
    return parse_size(text.strip().removesuffix("/s"))


def parse_duration_ms(text: str) -> float:
    """``300ms``, ``1.5s`` or ``2min`` as milliseconds; a bare number is milliseconds."""
    match = re.fullmatch(_DURATION, text.strip())
    if match is None:
        raise ConfigError(f"{text!r} is not a duration: write it like 300ms, 1.5s or 2min")
    return float(match[1]) * _UNIT_MS[match[2]]


class ClockPolicy(StrEnum):
    """What a restored guest's clocks make of the time since the save: it did not pass, or as much of it as the host's
    real-time clock says."""

    CONTINUE = "continue"
    HOST = "host"


class MemoryBackend(StrEnum):
    """What a guest's RAM is made of on this host: memory of this process alone, a memory file, or a file of huge pages
    that the host has set aside."""

    ANONYMOUS = "anonymous"
    MEMFD = "memfd"
    HUGETLBFS = "hugetlbfs"


@dataclass(frozen=True, slots=True)
class Address:
    """Where a stream goes to or comes from: TCP (``host``, ``port``) or a UNIX socket (``path``)."""

    host: str = ""
    port: int = 0
    path: str = ""

    @classmethod
    def parse(cls, text: str) -> Address:
        """``tcp://HOST:PORT``, ``tcp:HOST:PORT`` (as QEMU writes it), ``unix:///PATH`` or ``unix:PATH``.

        An IPv6 host stands in brackets. Raises :class:`ConfigError`.
        """
        scheme, colon, rest = text.partition(":")
        rest = rest.removeprefix("//")
        if scheme == "unix" and rest:
            return cls(path=rest)
        host, _, port = rest.rpartition(":")
        if scheme != "tcp" or not colon or not port.isascii() or not port.isdigit() or int(port) > 0xFFFF:
            raise ConfigError(f"{text!r} is not an address: write tcp://HOST:PORT or unix:///PATH")
        return cls(host=host.removeprefix("[").removesuffix("]") or "localhost", port=int(port))

    def __str__(self) -> str:
        if self.path:
            return f"unix://{self.path}"
        return f"tcp://[{self.host}]:{self.port}" if ":" in self.host else f"tcp://{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Compression:
    """How pages are compressed: not at all (``level`` None), by zstd at ``level``, or as suits the link (``auto``)."""

    level: int | None = None
    auto: bool = False

    @classmethod
    def parse(cls, text: str) -> Compression:
        """``auto``, ``none``, ``zstd`` or ``zstd:LEVEL``, levels from -7 to 19. Raises :class:`ConfigError`."""
        name, _, level = text.partition(":")
        if text == "auto":
            return cls(auto=True)
        if name == "none" and not level:
            return cls(None)
        if name != "zstd" or (level and not re.fullmatch(r"-?\d{1,2}", level)):
            raise ConfigError(f"{text!r} is not a compression: write auto, none, zstd or zstd:LEVEL")
        if level and not -7 <= int(level) <= 19:
            raise ConfigError(f"zstd level {level} is out of range: take -7 (fastest) to 19 (smallest)")
        return cls(int(level) if level else 1)

    @property
    def may_pack(self) -> bool:
        """Whether any page may be compressed."""
        return self.auto or self.level is not None

    def __str__(self) -> str:
        if self.auto:
            return "auto"
        return "none" if self.level is None else f"zstd:{self.level}"


BOOT_METHODS = ("auto", "flat", "multiboot", "pvh", "linux")
MAX_CMDLINE_BYTES = 16 << 10


@dataclass(frozen=True, slots=True)
class BootConfig:
    """What the guest starts with. ``method`` is one of :data:`BOOT_METHODS`; ``load_addr`` is for flat."""

    image: Path
    method: str = "auto"
    load_addr: int = 0x7C00
    initrd: Path | None = None
    cmdline: str = ""


def parse_boot(text: str) -> tuple[str, int]:
    """The value of ``--boot``: ``auto``, ``multiboot``, ``pvh``, ``linux``, ``flat`` or ``flat@ADDR``."""
    method, _, addr = text.partition("@")
    if method not in BOOT_METHODS or (addr and method != "flat"):
        raise ConfigError(f"{text!r} is not a boot method: take auto, flat@ADDR, multiboot, pvh or linux")
    try:
        return method, int(addr, 0) if addr else 0x7C00
    except ValueError:
        raise ConfigError(f"{addr!r} is not an address: write flat@0x7c00") from None


@dataclass(frozen=True, slots=True)
class NetConfig:
    """A network device, ``name`` to the user, before the tap ``interface`` of this host. Without a ``mac`` the guest
    gets one of its own when it is made, or keeps the one that it has."""

    name: str
    interface: str
    mac: bytes | None = None

    def __post_init__(self) -> None:
        if not is_name(self.name) or len(self.name) > 20:
            what = f"{self.name!r:.80} is not a network's name"
            raise ConfigError(f"{what}: use letters, digits, dot, dash and underscore, at most 20")
        if not re.fullmatch(_INTERFACE, self.interface):
            raise ConfigError(f"{self.interface!r:.80} is not an interface's name: it has at most 15 characters")
        if self.mac is not None and not is_station(self.mac):
            what = f"{self.mac.hex(':')} is not the address of one station"
            raise ConfigError(f"{what}: take one whose first byte is even, not all zeros")

    @classmethod
    def parse(cls, text: str) -> NetConfig:
        """``NAME=tap:IF[,mac=XX:XX:XX:XX:XX:XX]``. Raises :class:`ConfigError`."""
        head, *options = text.split(",")
        name, _, place = head.partition("=")
        kind, _, interface = place.partition(":")
        if kind != "tap" or not interface:
            raise ConfigError(f"{text!r} is not a network: write NAME=tap:INTERFACE or NAME=tap:INTERFACE,mac=MAC")
        mac = None
        for option in options:
            key, _, value = option.partition("=")
            if key != "mac" or mac is not None:
                raise ConfigError(f"{option!r} is no option of a network: there is only mac=MAC")
            if not re.fullmatch(_MAC, value):
                raise ConfigError(f"{value!r} is not a MAC address: write it like 52:54:00:12:34:56")
            mac = bytes.fromhex(value.replace(":", ""))
        return cls(name, interface, mac)


def is_station(mac: bytes) -> bool:
    """Whether ``mac`` can belong to one network card: not to a group, and not zero."""
    return len(mac) == 6 and not mac[0] & 1 and any(mac)


def random_mac() -> bytes:
    """A locally administered MAC address (IEEE 802, 8.4) that nobody else is likely to have."""
    drawn = os.urandom(6)
    return bytes((drawn[0] & 0xFC | 0x02,)) + drawn[1:]


@dataclass(frozen=True, slots=True)
class DiskConfig:
    """A disk: what the guest knows it by, and the raw image or block device behind it."""

    name: str
    path: Path
    read_only: bool = False

    def __post_init__(self) -> None:
        # As long as GET_ID can say (virtio 1.2, 5.2.6), so that a guest finds it under /dev/disk/by-id.
        if not is_name(self.name) or len(self.name) > 20:
            what = f"{self.name!r:.80} is not a disk's name"
            raise ConfigError(f"{what}: use letters, digits, dot, dash and underscore, at most 20")

    @classmethod
    def parse(cls, text: str) -> DiskConfig:
        """``NAME=PATH`` or ``NAME=PATH,ro``. Raises :class:`ConfigError`."""
        name, _, path = text.partition("=")
        bare = path.removesuffix(",ro")
        if not bare:
            raise ConfigError(f"{text!r} is not a disk: write NAME=PATH, or NAME=PATH,ro for a read-only one")
        return cls(name, Path(bare), bare != path)


def _require_own_terminal(serial: str, console: str | None) -> None:
    if serial == console == "stdio":
        raise ConfigError("--serial and --console cannot both be stdio: add --serial null, or give one another place")


@dataclass(frozen=True, slots=True)
class HostSide:
    """What a guest that is defined elsewhere, by a stream or a snapshot, is called and has on this host. Raises
    :class:`ConfigError` when built wrong."""

    name: str = ""
    """Empty: the name that it comes with."""
    serial: str = "null"
    """Where COM1 leads: ``stdio``, ``pty``, ``null``, ``file:PATH`` or ``unix:PATH``."""
    disks: tuple[DiskConfig, ...] = ()
    """The images of those of its disks that are elsewhere here; the others are at the paths that it comes with."""
    nets: tuple[NetConfig, ...] = ()
    """The taps, or addresses, of those of its networks that have others here."""
    console: str | None = None
    """Where its virtio console leads, as ``serial``; None: nowhere, or it has none."""
    reboot: bool = True
    """As of :class:`MachineConfig`."""
    memory_backend: MemoryBackend = MemoryBackend.ANONYMOUS

    def __post_init__(self) -> None:
        _require_own_terminal(self.serial, self.console)


@dataclass(frozen=True, slots=True)
class MachineConfig:
    """A machine: its name, its size, where its serial port goes, and its console if it is to have one. Raises
    :class:`ConfigError` when built wrong."""

    name: str
    memory_bytes: int = 1 << 30
    nr_cpus: int = 1
    serial: str = "stdio"
    boot: BootConfig | None = None
    disks: tuple[DiskConfig, ...] = ()
    nets: tuple[NetConfig, ...] = ()
    console: str | None = None
    cpu: str = "host"
    """``host``, ``baseline`` or the path of a file: see :func:`kvmigrate.kvm.cpu_files.choose_cpu`."""
    reboot: bool = True
    """Whether a guest that asks for a reset starts anew; else it ends with exit status 10."""
    memory_backend: MemoryBackend = MemoryBackend.ANONYMOUS

    def __post_init__(self) -> None:
        _require_own_terminal(self.serial, self.console)
        for kind, parts in (("disks", self.disks), ("networks", self.nets)):
            names = [part.name for part in parts]
            if len(set(names)) != len(names):
                raise ConfigError(f"two {kind} have one name among {', '.join(names)}: give each its own")
        if not is_name(self.name):
            raise ConfigError(f"{self.name!r} is not a name: use letters, digits, dot, dash and underscore, at most 63")
        if self.memory_bytes % PAGE_BYTES or not MIN_MEMORY_BYTES <= self.memory_bytes <= MAX_MEMORY_BYTES:
            raise ConfigError(
                f"{self.memory_bytes} bytes of memory cannot be had: take a multiple of 4096 from 1M to 1T"
            )
        if not 1 <= self.nr_cpus <= MAX_CPUS:
            raise ConfigError(f"{self.nr_cpus} vCPUs cannot be had: take 1 to {MAX_CPUS}")


MIN_DELTA_BYTES = 1 << 20
MAX_CONNECTIONS = 16


FEW_PAGES = 8192
"""Fewer pages than these, 32 MiB, are sent before further connections are worth their opening."""


def default_connections(nr_pages: int) -> int:
    """For a guest with ``nr_pages`` in use: one for every processor that this process may use, up to four."""
    return min(len(os.sched_getaffinity(0)), 4) if nr_pages >= FEW_PAGES else 1


@dataclass(frozen=True, slots=True)
class MigrationParameters:
    """What bounds a migration. ``bandwidth_bytes_s`` 0 means no cap; times are in milliseconds."""

    downtime_limit_ms: float = 300.0
    bandwidth_bytes_s: int = 0
    max_rounds: int = 30
    compression: Compression = Compression()
    timeout_ms: float = 10_000.0
    """How long the other side may say nothing before it counts as dead."""
    delta_cache_bytes: int = 32 << 20
    """Room for pages as they were last sent, to send what changed in them; 0 for none. Only with compression."""
    connections: int = 0
    """Over how many the pages of a round are spread; 0 for :func:`default_connections`."""
    zero_copy: bool = False
    """Whether uncompressed pages are to leave from where they lie, without a copy in between."""

    def __post_init__(self) -> None:
        if not 0 < self.downtime_limit_ms <= 2_000_000:
            raise ConfigError(f"a downtime limit of {self.downtime_limit_ms:g} ms cannot be meant: take 1 to 2000000")
        if self.bandwidth_bytes_s < 0 or self.max_rounds < 1 or self.timeout_ms <= 0:
            raise ConfigError("bandwidth must not be negative, and max-rounds and the timeout must be positive")
        if self.delta_cache_bytes and not MIN_DELTA_BYTES <= self.delta_cache_bytes <= MAX_MEMORY_BYTES:
            raise ConfigError(f"a delta cache of {self.delta_cache_bytes} bytes cannot be had: take 0 or 1M and more")
        if not 0 <= self.connections <= MAX_CONNECTIONS:
            what = f"{self.connections} connections cannot be had"
            raise ConfigError(f"{what}: take 1 to {MAX_CONNECTIONS}, or 0 for as many as suit the guest and this host")

    def connections_for(self, nr_pages: int) -> int:
        """How many connections a guest with ``nr_pages`` in use is sent over."""
        return self.connections or default_connections(nr_pages)


@dataclass(frozen=True, slots=True)
class SnapshotParameters:
    """How a snapshot is taken: ``paused`` stops the guest for all of it, else only for the last round."""

    paused: bool = False
    compression: Compression = Compression()
    downtime_limit_ms: float = 300.0
    max_rounds: int = 30

    def __post_init__(self) -> None:
        if self.compression.auto:
            raise ConfigError("a snapshot's compression cannot be auto, which goes by a link: take none or zstd")
