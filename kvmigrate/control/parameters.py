"""QEMU's migration parameters and capabilities, as far as they mean something here, and their form in QMP."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from typing import Any

from ..config import MAX_CONNECTIONS, Address, Compression, MigrationParameters
from ..record import replace
from .qmp import QmpError
from .schema import Argument, Kind

PARAMETERS = (
    Argument("downtime-limit", Kind.INTEGER, "longest downtime to aim for, in ms", low=1, high=2_000_000),
    Argument("max-bandwidth", Kind.INTEGER, "bytes per second; 0 is no cap"),
    Argument("multifd-compression", Kind.STRING, "none or zstd"),
    Argument("multifd-zstd-level", Kind.INTEGER, "1 to 19", low=1, high=19),
    Argument("multifd-channels", Kind.INTEGER, "connections for pages; 0: as suits", low=0, high=MAX_CONNECTIONS),
    Argument("x-kvmigrate-max-rounds", Kind.INTEGER, "give up after so many rounds", low=1, high=10_000),
    Argument("x-kvmigrate-compression", Kind.STRING, "auto, none, zstd or zstd:LEVEL, levels from -7 to 19"),
    Argument("x-kvmigrate-delta-cache", Kind.INTEGER, "bytes for pages as last sent; 0 is none", low=0, high=1 << 40),
    Argument("x-kvmigrate-timeout", Kind.INTEGER, "how long the peer may be silent, in ms", low=1, high=3_600_000),
)

ALWAYS_ON = frozenset({"return-path", "validate-uuid", "multifd"})
"""Capabilities of QEMU that kvmigrate's own protocol always has."""
SWITCHABLE = frozenset({"events", "zero-copy-send"})
ABSENT = (
    "xbzrle", "rdma-pin-all", "auto-converge", "zero-blocks", "compress", "postcopy-ram", "x-colo", "release-ram",
    "block", "pause-before-switchover", "dirty-bitmaps", "postcopy-blocktime", "late-block-activate",
    "x-ignore-shared", "background-snapshot", "postcopy-preempt",
)  # fmt: skip
"""QEMU 7.2's capabilities that kvmigrate has not: they can be named and switched off, as they are."""


def changed(parameters: MigrationParameters, wanted: Mapping[str, Any]) -> MigrationParameters:
    """``parameters`` with what ``migrate-set-parameters`` asked for. Raises :class:`ConfigError`, :class:`QmpError`."""
    fields: dict[str, Any] = {}
    if "downtime-limit" in wanted:
        fields["downtime_limit_ms"] = float(wanted["downtime-limit"])
    if "max-bandwidth" in wanted:
        fields["bandwidth_bytes_s"] = wanted["max-bandwidth"]
    if "multifd-channels" in wanted:
        fields["connections"] = wanted["multifd-channels"]
    if "x-kvmigrate-max-rounds" in wanted:
        fields["max_rounds"] = wanted["x-kvmigrate-max-rounds"]
    if "x-kvmigrate-delta-cache" in wanted:
        fields["delta_cache_bytes"] = wanted["x-kvmigrate-delta-cache"]
    if "x-kvmigrate-timeout" in wanted:
        fields["timeout_ms"] = float(wanted["x-kvmigrate-timeout"])
    return replace(parameters, compression=_compression(parameters.compression, wanted), **fields)


def _compression(now: Compression, wanted: Mapping[str, Any]) -> Compression:
    if "x-kvmigrate-compression" in wanted:
        return Compression.parse(wanted["x-kvmigrate-compression"])
    method = wanted.get("multifd-compression")
    if method not in (None, "none", "zstd"):
        raise QmpError(f"Parameter 'multifd-compression' does not accept value '{method}'")
    if method == "none":
        return Compression(None)
    on = method == "zstd" or now.level is not None
    return Compression(wanted.get("multifd-zstd-level", now.level or 1)) if on else now


def to_qmp(parameters: MigrationParameters) -> dict[str, object]:
    """The answer to ``query-migrate-parameters``."""
    level = parameters.compression.level
    return {
        "downtime-limit": round(parameters.downtime_limit_ms),
        "max-bandwidth": parameters.bandwidth_bytes_s,
        "multifd-compression": "none" if level is None else "zstd",
        "multifd-zstd-level": max(level or 1, 1),
        "multifd-channels": parameters.connections,
        "x-kvmigrate-max-rounds": parameters.max_rounds,
        "x-kvmigrate-compression": str(parameters.compression),
        "x-kvmigrate-delta-cache": parameters.delta_cache_bytes,
        "x-kvmigrate-timeout": round(parameters.timeout_ms),
    }


def capabilities_to_qmp(switched_on: Set[str]) -> list[dict[str, object]]:
    """The answer to ``query-migrate-capabilities``, with those of :data:`SWITCHABLE` that are on."""
    on = ALWAYS_ON | switched_on
    return [{"capability": name, "state": name in on} for name in sorted(ALWAYS_ON | SWITCHABLE | set(ABSENT))]


def switched(now: Set[str], wanted: Sequence[Any]) -> Set[str]:
    """Which of :data:`SWITCHABLE` are on after ``migrate-set-capabilities``. Raises :class:`QmpError`."""
    for item in wanted:
        name, state = _capability(item)
        if name in ABSENT and state:
            raise QmpError(f"kvmigrate has no migration capability '{name}'")
        if name not in ALWAYS_ON | SWITCHABLE | set(ABSENT):
            raise QmpError(f"Parameter 'capability' does not accept value '{name}'")
        if name in SWITCHABLE:
            now = now | {name} if state else now - {name}
    return now


def _capability(item: object) -> tuple[str, bool]:
    if not isinstance(item, dict) or item.keys() != {"capability", "state"}:
        raise QmpError("Parameter 'capabilities' must hold objects with the members 'capability' and 'state'")
    if not isinstance(item["capability"], str) or not isinstance(item["state"], bool):
        raise QmpError("Parameter 'capabilities' must hold a string 'capability' and a boolean 'state'")
    return item["capability"], item["state"]


def destination(arguments: Mapping[str, Any]) -> Address:
    """Where ``migrate`` is to go: ``uri``, or the one channel. Raises :class:`ConfigError`, :class:`QmpError`."""
    uri, channels = arguments.get("uri"), arguments.get("channels")
    if (uri is None) == (channels is None):
        raise QmpError("need either 'uri' or 'channels' argument, and not both")
    if uri is not None:
        return Address.parse(uri)
    assert isinstance(channels, list)
    if len(channels) != 1 or not isinstance(channels[0], dict) or not isinstance(channels[0].get("addr"), dict):
        raise QmpError("Parameter 'channels' expects one channel with an 'addr'")
    return _socket_address(channels[0]["addr"])


def _socket_address(addr: Mapping[str, Any]) -> Address:
    if addr.get("transport") != "socket":
        raise QmpError("Parameter 'transport' expects 'socket'")
    if addr.get("type") == "unix" and isinstance(addr.get("path"), str):
        return Address.parse(f"unix:{addr['path']}")
    host, port = addr.get("host"), addr.get("port")
    if addr.get("type") != "inet" or not isinstance(host, str) or not isinstance(port, str):
        raise QmpError("Parameter 'addr' expects type 'inet' with host and port, or type 'unix' with path")
    return Address.parse(f"tcp:[{host}]:{port}" if ":" in host else f"tcp:{host}:{port}")
