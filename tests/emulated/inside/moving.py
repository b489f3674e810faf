"""The ledger guest is moved and saved by kvm_amd, under the eyes of the same witnesses as everywhere."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.oracle import world as worlds
from tests.oracle.digest import compare_pages, is_clock, load_pairs, state_differences
from tests.oracle.heartbeat import judge, judge_restored, require_progress
from tests.oracle.test_migration import watch
from tests.oracle.world import World, open_world

LEDGER = "beat=300 pages=300 fill=1 rate=2 irq=1"
MEMORY = "16M"


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    # A Python that starts in an emulated processor takes seconds.
    monkeypatch.setattr(worlds, "POLL_S", 0.1)
    monkeypatch.setattr(worlds, "READY_S", 150.0)
    with open_world() as opened:
        yield opened


def require_equal(digests: Path) -> None:
    """What stopped at one place and what started at the other is the same guest."""
    [(out, into)] = load_pairs(digests)
    assert sum(compare_pages(out, into)) == 16 << 8
    assert [text for text in state_differences(out, into) if not is_clock(text)] == []


def test_the_host_has_kvm_amd() -> None:
    assert Path("/sys/module/kvm_amd").is_dir()


def test_a_live_migration_by_kvm_amd_loses_nothing(world: World) -> None:
    digests = watch(world)
    guest = world.run("ledger", LEDGER, memory=MEMORY)
    require_progress(guest.log, 3, timeout_s=150)
    moved = world.hop(guest, world.tcp())
    require_progress(moved.log, 6, timeout_s=150)
    assert len(judge(world.logs).blackouts_ms) == 1
    require_equal(digests)


def test_a_snapshot_of_a_running_guest_restores_on_kvm_amd(world: World) -> None:
    digests = watch(world)
    guest = world.run("ledger", LEDGER, memory=MEMORY)
    require_progress(guest.log, 3, timeout_s=150)
    directory = world.directory / "saved"
    world.snapshot(guest, directory)
    assert world.command("verify", str(directory)).returncode == 0
    restored = world.restore(directory)
    require_progress(restored.log, 6, timeout_s=150)
    judge_restored(guest.log, restored.log)
    require_equal(digests)
