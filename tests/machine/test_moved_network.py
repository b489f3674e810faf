"""A whole machine with a network, moved from one real tap to another on the real /dev/kvm."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvmigrate.config import HostSide, NetConfig
from kvmigrate.contract import RunState
from kvmigrate.devices.virtio.net import FEATURES, Net
from kvmigrate.errors import HostError
from kvmigrate.machine.machine import Machine
from tests.devices.virtio.queues import QueuesDriver
from tests.devices.virtio.test_real_tap import Namespace

from .boot_sector import HANG, protected_mode_machine

pytestmark = pytest.mark.kvm

MAC = bytes.fromhex("525400123456")
ETH_P_RARP = 0x8035


@pytest.fixture
def namespace() -> Iterator[Namespace]:
    namespace = Namespace()
    try:
        for tap in ("tap0", "tap1"):
            namespace.ip("tuntap", "add", tap, "mode", "tap")
            namespace.ip("link", "set", tap, "up")
        yield namespace
    finally:
        namespace.close()


def card(machine: Machine) -> Net:
    (net,) = (device for device in machine.platform.virtio.devices if isinstance(device, Net))
    return net


def test_a_card_keeps_its_address_on_another_tap_and_is_announced_there(namespace: Namespace, tmp_path: Path) -> None:
    nets = (NetConfig("lan", "tap0", MAC),)
    source = namespace.run(lambda: protected_mode_machine(tmp_path, HANG, nets=nets))
    QueuesDriver(source.memory, card(source), FEATURES).set_up()
    source.start()
    source.resume()
    description = source.describe()
    with pytest.raises(HostError, match=r"tap tap0: .*in use by another VM"):
        namespace.run(lambda: Machine.build(description, HostSide("other")))
    target = namespace.run(lambda: Machine.build(description, HostSide("other", nets=(NetConfig("lan", "tap1"),))))
    with namespace.run(lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_RARP))) as watch:
        watch.bind(("tap1", ETH_P_RARP))
        watch.settimeout(10)
        source.pause(RunState.FINISH_MIGRATE)
        target.load(source.save())
        assert card(target).mac == MAC
        target.resume()
        frame = watch.recv(1 << 16)
    assert frame[6:14] == MAC + b"\x80\x35"
    source.close()
    target.close()
