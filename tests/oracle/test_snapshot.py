"""A guest that is saved and restored goes on from exactly where it was, and the saved one runs on unharmed."""

from __future__ import annotations

import pytest

from .digest import load_pairs, require_equal
from .heartbeat import judge_restored, require_progress
from .test_migration import LEDGER, finish, travel, watch
from .world import STOPPED, World


@pytest.mark.parametrize("options", [(), ("--compress", "zstd"), ("--paused",)], ids=["raw", "zstd", "paused"])
def test_snapshot_of_a_running_guest_restores_to_the_same_guest(world: World, options: tuple[str, ...]) -> None:
    digests = watch(world)
    guest = world.run("ledger", LEDGER, cpus=2)
    directory = world.directory / "saved"
    world.snapshot(guest, directory, *options)
    require_progress(guest.log, 20)
    assert world.command("verify", str(directory)).returncode == 0
    restored = world.restore(directory)
    require_progress(restored.log, 20)
    require_progress(guest.log, 5)
    judge_restored(guest.log, restored.log)
    [(out, into)] = load_pairs(digests)
    require_equal(out, into)


def test_a_restored_guest_migrates_and_is_saved_again(world: World) -> None:
    first, second = world.directory / "first", world.directory / "second"
    guest = world.run("ledger", LEDGER)
    guest.execute("stop")
    world.snapshot(guest, first)
    assert world.command("stop", guest.name).returncode == 0
    assert guest.wait_end() == STOPPED
    guest = world.restore(first)
    if guest.status() == "paused":
        guest.execute("cont")
    require_progress(guest.log, 5)
    guest = travel(world, guest, 2)
    world.snapshot(guest, second)
    require_progress(guest.log, 5)
    finish(world, guest, 3)
    assert world.command("verify", str(second)).returncode == 0
