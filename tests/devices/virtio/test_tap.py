"""What a user may write about a network, and what opening its tap says when it fails."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

import pytest

from kvmigrate.config import NetConfig, is_station, random_mac
from kvmigrate.devices.tap import TUNSETIFF, open_tap
from kvmigrate.errors import ConfigError, HostError

MAC = bytes.fromhex("525400123456")


def test_a_network_is_a_name_an_interface_and_perhaps_an_address() -> None:
    assert NetConfig.parse("lan=tap:tap0") == NetConfig("lan", "tap0", None)
    assert NetConfig.parse("lan=tap:tap0,mac=52:54:00:12:34:56") == NetConfig("lan", "tap0", MAC)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "lan",
        "lan=tap0",
        "lan=tap:",
        "=tap:tap0",
        "lan=bridge:br0",
        "lan=tap:sixteen-letters0",
        "lan=tap:..",
        "lan=tap:a/b",
        "lan=tap:tap0,",
        "lan=tap:tap0,mac",
        "lan=tap:tap0,mtu=9000",
        "lan=tap:tap0,mac=52:54:00:12:34:56,mac=52:54:00:12:34:57",
        "lan=tap:tap0,mac=52:54:00:12:34",
        "lan=tap:tap0,mac=52-54-00-12-34-56",
        "lan=tap:tap0,mac=53:54:00:12:34:56",
        "lan=tap:tap0,mac=ff:ff:ff:ff:ff:ff",
        "lan=tap:tap0,mac=00:00:00:00:00:00",
    ],
)
def test_what_is_no_network_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        NetConfig.parse(text)


def test_a_drawn_address_belongs_to_one_station_and_is_locally_administered() -> None:
    drawn = [random_mac() for _ in range(64)]
    assert all(is_station(mac) and mac[0] & 2 for mac in drawn)
    assert len(set(drawn)) == len(drawn)


def test_a_tap_of_another_user_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the refusal itself is made up: root is never refused."""
    real = fcntl.ioctl

    def refuse(fd: int, request: int, argument: bytes) -> bytes:
        if request == TUNSETIFF:
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))
        return real(fd, request, argument)

    monkeypatch.setattr("kvmigrate.devices.tap.DEVICE", "/dev/null")
    monkeypatch.setattr(fcntl, "ioctl", refuse)
    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(HostError, match="another user's: make one for this user with ip tuntap add dev lo mode tap"):
        open_tap("lo")
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_a_host_without_taps_is_told_how_to_get_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvmigrate.devices.tap.DEVICE", "/nonexistent/tun")
    with pytest.raises(HostError, match="modprobe tun"):
        open_tap("tap7")
