"""What a peer or a file says of a machine is hostile."""

from __future__ import annotations

import functools
import operator
import uuid
from typing import Any

import pytest

from kvmigrate.config import DiskConfig, HostSide, MachineConfig
from kvmigrate.errors import BadField, ConfigError, KvmigrateError, RestoreRefused
from kvmigrate.machine.description import Description

LEAF = {"function": 1, "index": 0, "flags": 0, "eax": 1, "ebx": 2, "ecx": 3, "edx": 4}


def good() -> dict[str, Any]:
    made = Description.new(MachineConfig("guest", 8 << 20), ([LEAF],))
    return made.completed({"serial0": 1}, 2_000_000, ([LEAF],)).to_value()


def test_a_description_survives_the_wire() -> None:
    value = good()
    assert Description.from_value(value).to_value() == value


def test_every_machine_has_a_random_uuid_of_its_own() -> None:
    made = [uuid.UUID(good()["uuid"]) for _ in range(64)]
    assert len({*made}) == 64
    assert {(one.version, one.variant) for one in made} == {(4, uuid.RFC_4122)}
    ones = functools.reduce(operator.or_, (one.int for one in made))
    zeros = functools.reduce(operator.or_, (~one.int for one in made))
    # That one of 122 random bits is the same in 64 of them is less likely than one in 10**17.
    assert (ones & zeros).bit_count() == 122


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("name", "../../etc/passwd"),
        ("name", ""),
        ("name", "a" * 64),
        ("name", 7),
        ("uuid", "not-a-uuid"),
        ("uuid", "{12345678-1234-5678-1234-567812345678}"),
        ("memory_bytes", 0),
        ("memory_bytes", -4096),
        ("memory_bytes", (8 << 20) + 1),
        ("memory_bytes", 1 << 63),
        ("memory_bytes", 16 << 20),
        ("slots", [[0, 0, 1]]),
        ("slots", []),
        ("cpuid", []),
        ("cpuid", [[]] * 65),
        ("cpuid", [[LEAF] * 257]),
        ("cpuid", [[LEAF | {"eax": -1}]]),
        ("cpuid", [[LEAF | {"extra": 1}]]),
        ("cpuid", [7]),
        ("tsc_khz", -1),
        ("devices", {"serial0": 0}),
        ("devices", {"serial0": "1"}),
        ("devices", {"x" * 65: 1}),
        ("autostart", 1),
    ],
)
def test_a_wrong_field_is_refused_by_name(key: str, value: Any) -> None:
    with pytest.raises(KvmigrateError) as caught:
        Description.from_value(good() | {key: value})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", sorted(good().keys() - {"virtio"}))
def test_a_missing_field_is_refused_by_name(key: str) -> None:
    value = good()
    del value[key]
    with pytest.raises(BadField, match=key):
        Description.from_value(value)


BOOT = {
    "image": b"/vmlinuz", "image_hash": 1, "method": "linux", "load_addr": 0x7C00,
    "initrd": b"/initrd\xff", "initrd_hash": 2, "cmdline": b"root=/dev/vda \xff",
}  # fmt: skip


def test_what_it_was_booted_from_survives_the_wire_whatever_its_bytes() -> None:
    value = good() | {"boot": BOOT}
    assert Description.from_value(value).to_value() == value


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("image", b""),
        ("image", b"vmlinuz"),
        ("image", b"/vmlinuz\0"),
        ("image", "/vmlinuz"),
        ("image", b"/" * 4096),
        ("image_hash", -1),
        ("image_hash", 1 << 64),
        ("initrd", b"../initrd"),
        ("method", "bios"),
        ("method", 7),
        ("load_addr", -1),
        ("cmdline", bytes((16 << 10) + 1)),
        ("surprise", 1),
    ],
)
def test_a_hostile_word_of_what_it_was_booted_from_is_refused(key: str, value: Any) -> None:
    with pytest.raises(BadField, match="boot"):
        Description.from_value(good() | {"boot": BOOT | {key: value}})


def test_an_unknown_field_is_refused_by_name() -> None:
    with pytest.raises(BadField, match="surprise"):
        Description.from_value(good() | {"surprise": 1})


def test_more_memory_than_the_host_has_is_refused_before_any_is_taken() -> None:
    value = Description.new(MachineConfig("guest", 1 << 40), ([LEAF],)).to_value()
    with pytest.raises(ConfigError, match="this host only"):
        Description.from_value(value)


def test_a_device_of_a_later_version_is_refused_by_name() -> None:
    description = Description.from_value(good())
    description.require_devices({"serial0": 2})
    for mine in ({"serial0": 0}, {}, {"serial0": 1, "rtc": 1}):
        with pytest.raises(RestoreRefused, match=r"device (serial0|rtc)"):
            description.require_devices(mine)


def test_the_tsc_may_differ_by_250_parts_per_million() -> None:
    description = Description.from_value(good())
    description.require_tsc(2_000_400, can_scale=False)
    description.require_tsc(2_100_000, can_scale=True)
    with pytest.raises(RestoreRefused, match="tsc_khz"):
        description.require_tsc(2_001_000, can_scale=False)


DISK = {"kind": "disk", "name": "root", "path": "/images/root.img", "read_only": False}


def test_a_description_of_before_virtio_has_no_such_devices() -> None:
    value = good()
    del value["virtio"]
    assert Description.from_value(value).virtio == ()


@pytest.mark.parametrize(
    "virtio",
    [
        [DISK | {"path": "relative"}],
        [DISK | {"path": "/nul\0"}],
        [DISK | {"name": "a" * 21}],
        [DISK | {"name": "../x"}],
        [DISK | {"read_only": 0}],
        [DISK | {"more": 1}],
        [DISK, DISK],
        [{"kind": "rng", "name": "vm"}],
        [{"kind": "gpu", "name": "gpu0"}],
        [7],
        [{"kind": "rng", "name": "rng0"}] * 15,
    ],
)
def test_devices_that_cannot_be_are_refused(virtio: list[Any]) -> None:
    with pytest.raises((BadField, ConfigError)):
        Description.from_value(good() | {"virtio": virtio})


def test_another_image_takes_the_place_of_the_described_one() -> None:
    described = Description.from_value(good() | {"virtio": [DISK]})
    moved = described.on(HostSide(disks=(DiskConfig.parse("root=/other.img"),)))
    assert moved.to_value()["virtio"] == [DISK | {"path": "/other.img"}]
    with pytest.raises(ConfigError, match="the guest has no disk of this name, it has: root"):
        described.on(HostSide(disks=(DiskConfig.parse("data=/other.img"),)))
    with pytest.raises(ConfigError, match="leave out ,ro"):
        described.on(HostSide(disks=(DiskConfig.parse("root=/other.img,ro"),)))
