"""The networks of a machine: their addresses are part of the guest, their taps are the host's."""

from __future__ import annotations

from typing import Any

import pytest

from kvmigrate.config import HostSide, MachineConfig, NetConfig, is_station
from kvmigrate.errors import ConfigError, KvmigrateError
from kvmigrate.machine.description import Description
from kvmigrate.machine.specs import specs_for, with_nets, with_new_macs
from kvmigrate.state.section import pack, unpack

from .test_description import good

MAC, OTHER_MAC = bytes.fromhex("525400123456"), bytes.fromhex("525400654321")
LAN = {"kind": "net", "name": "lan", "interface": "tap0", "mac": MAC}


def described(*virtio: dict[str, Any]) -> Description:
    return Description.from_value(unpack(pack(good() | {"virtio": list(virtio)}), "a description"))


def test_a_network_survives_the_wire() -> None:
    description = described(LAN)
    assert description.virtio[0].net == NetConfig("lan", "tap0", MAC)
    assert description.virtio[0].name == "net-lan"
    assert description.to_value()["virtio"] == [LAN]


def test_a_network_without_an_address_gets_one_that_it_keeps() -> None:
    config = MachineConfig("vm", nets=(NetConfig("lan", "tap0"), NetConfig("wan", "tap1", MAC)))
    description = Description.new(config, ())
    lan, wan = (spec.net for spec in description.virtio if spec.net is not None)
    assert lan.mac is not None and is_station(lan.mac)
    assert wan.mac == MAC
    assert description.to_value()["virtio"][1]["mac"] == lan.mac


def test_another_tap_takes_the_place_of_the_described_one_and_the_address_stays() -> None:
    moved = described(LAN).on(HostSide(nets=(NetConfig("lan", "tap9"),)))
    assert moved.to_value()["virtio"] == [LAN | {"interface": "tap9"}]
    readdressed = described(LAN).on(HostSide(nets=(NetConfig("lan", "tap9", OTHER_MAC),)))
    assert readdressed.to_value()["virtio"] == [LAN | {"interface": "tap9", "mac": OTHER_MAC}]


def test_a_network_that_the_guest_does_not_have_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="network wan: the guest has no network of this name, it has: lan"):
        described(LAN).on(HostSide(nets=(NetConfig("wan", "tap9"),)))


def test_a_clone_has_addresses_of_its_own() -> None:
    specs = specs_for((), (NetConfig("lan", "tap0", MAC),))
    cloned = with_new_macs(specs)
    assert [spec.name for spec in cloned] == [spec.name for spec in specs]
    (net,) = (spec.net for spec in cloned if spec.net is not None)
    assert net.mac not in (None, MAC) and net.interface == "tap0"
    assert with_nets(cloned, ()) == cloned


@pytest.mark.parametrize(
    "virtio",
    [
        [LAN, LAN],
        [LAN | {"interface": "a/b"}],
        [LAN | {"interface": "x" * 16}],
        [LAN | {"interface": ".."}],
        [LAN | {"mac": MAC[:5]}],
        [LAN | {"mac": b"\xff" * 6}],
        [LAN | {"mac": "52:54:00:12:34:56"}],
        [LAN | {"name": "../lan"}],
        [LAN | {"name": "n" * 21}],
        [LAN | {"path": "/"}],
        [{"kind": "net", "name": "lan"}],
        [{"kind": "balloon", "name": "other"}],
    ],
)
def test_networks_that_cannot_be_are_refused(virtio: list[dict[str, Any]]) -> None:
    with pytest.raises(KvmigrateError):
        described(*virtio)


def test_two_networks_of_one_name_are_refused() -> None:
    with pytest.raises(ConfigError, match="two networks have one name"):
        MachineConfig("vm", nets=(NetConfig("lan", "tap0"), NetConfig("lan", "tap1")))
