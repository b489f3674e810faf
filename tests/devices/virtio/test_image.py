"""An image is opened only when it can be a disk, and belongs to one writer at a time."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from kvmigrate.devices.virtio.image import open_disk
from kvmigrate.errors import ConfigError, HostError


def test_a_locked_disk_is_refused_until_it_is_unlocked(image_path: Path) -> None:
    first, second = open_disk("a", image_path), open_disk("b", image_path)
    first.lock()
    first.lock()
    with pytest.raises(ConfigError, match=r"disk b: .*root\.img is in use by another VM"):
        second.lock()
    first.unlock()
    second.lock()
    with pytest.raises(ConfigError, match="disk a"):
        first.lock()
    second.close()
    first.lock()
    first.close()


def test_readers_share_a_disk_and_keep_writers_out(image_path: Path) -> None:
    readers = [open_disk("a", image_path, read_only=True), open_disk("b", image_path, read_only=True)]
    writer = open_disk("c", image_path)
    for reader in readers:
        reader.lock()
    with pytest.raises(ConfigError, match="in use by another VM"):
        writer.lock()
    for image in (*readers, writer):
        image.close()


def test_what_cannot_be_a_disk_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(HostError, match=r"disk root: .*missing"):
        open_disk("root", tmp_path / "missing")
    with pytest.raises((ConfigError, HostError), match="disk root"):
        open_disk("root", tmp_path)
    for size in (0, 513):
        (tmp_path / "odd").write_bytes(bytes(size))
        with pytest.raises(ConfigError, match=f"has {size} bytes"):
            open_disk("root", tmp_path / "odd")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConfigError, match="neither a file nor a block device"):
        open_disk("root", tmp_path / "pipe")


def test_the_lock_goes_only_after_all_that_was_written_is_on_the_storage(
    image_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image, other = open_disk("a", image_path), open_disk("b", image_path)
    image.lock()

    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(os, "fdatasync", full)
    with pytest.raises(HostError, match="disk a: writing"):
        image.unlock()
    with pytest.raises(ConfigError, match="in use"):
        other.lock()
    monkeypatch.undo()
    image.unlock()
    other.lock()
    for one in (image, other):
        one.close()
