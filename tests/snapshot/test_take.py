"""A snapshot is taken while the guest runs, holds exactly what the guest was at the pause, and restores to it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from kvmigrate.config import PAGE_BYTES, SnapshotParameters
from kvmigrate.contract import RunState
from kvmigrate.precopy.converge import Decision
from kvmigrate.precopy.ledger import RoundRecord
from kvmigrate.snapshot import staging
from kvmigrate.snapshot.save import take
from kvmigrate.snapshot.verify import verify
from tests.fake_machine import MIB
from tests.snapshot.tools import PAUSED, PAUSED_ZSTD, RAW, ZSTD, Watcher, guest, page, restored

ALL = pytest.mark.parametrize(
    "parameters", [RAW, ZSTD, PAUSED, PAUSED_ZSTD], ids=["raw", "zstd", "paused", "paused-zstd"]
)


@ALL
def test_restored_memory_and_state_are_those_of_the_pause(tmp_path: Path, parameters: SnapshotParameters) -> None:
    with guest() as machine:
        machine.fill(700)
        machine.fill(65, seed=2, first=1500)
        machine.state["cpu0"]["rip"] = 0x1234
        machine.start_writer(40, 20_000)
        take(machine, tmp_path / "s", parameters)
        with restored(tmp_path / "s") as copy:
            assert copy.machine.digest() == machine.saved  # type: ignore[attr-defined]
            assert copy.fidelity.counts() == {"exact": 3, "adjusted": 0, "dropped": 0, "refused": 0}
            assert not copy.machine.ever_ran  # type: ignore[attr-defined]
        assert machine.runstate is RunState.RUNNING
    assert verify(tmp_path / "s").findings == ()


@ALL
@pytest.mark.parametrize("nr_pages", [1, 63, 64, 65, 256, 1027])
def test_sizes_that_are_no_multiple_of_64_pages(tmp_path: Path, parameters: SnapshotParameters, nr_pages: int) -> None:
    with guest(nr_pages * PAGE_BYTES) as machine:
        machine.fill(1, seed=1, first=0)
        machine.fill(1, seed=2, first=nr_pages - 1)
        take(machine, tmp_path / "s", parameters)
        with restored(tmp_path / "s") as copy:
            assert copy.machine.memory.hash_all() == machine.memory.hash_all()
    assert verify(tmp_path / "s").findings == ()


@ALL
def test_sparse_guest_over_the_hole_is_neither_read_nor_written_whole(
    tmp_path: Path, parameters: SnapshotParameters
) -> None:
    memory_bytes = 3584 * MIB + 3 * PAGE_BYTES
    with guest(memory_bytes) as machine:
        for gpa in (0, 0xC000_0000 - PAGE_BYTES, 1 << 32, (1 << 32) + 512 * MIB + 2 * PAGE_BYTES):
            machine.write(gpa, gpa.to_bytes(8, "little") + b"x")
        touched = machine.memory.resident_pages()
        result = take(machine, tmp_path / "s", parameters)
        assert machine.memory.resident_pages() == touched
        assert result.totals.normal == 4
        on_disk = sum(path.stat().st_blocks * 512 for path in (tmp_path / "s").iterdir())
        assert on_disk < MIB
        with restored(tmp_path / "s") as copy:
            assert copy.machine.memory.hash_all() == machine.memory.hash_all()
    report = verify(tmp_path / "s")
    assert report.findings == () and report.nr_pages == 4


def test_guest_runs_during_every_round_but_the_last_and_while_files_are_flushed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[RunState] = []
    publish = staging.Staging.publish

    def publish_watched(self: staging.Staging) -> None:
        flushed.append(machine.runstate)
        publish(self)

    monkeypatch.setattr(staging.Staging, "publish", publish_watched)
    with guest() as machine:
        machine.fill(1000)
        watcher = Watcher(machine)
        result = take(machine, tmp_path / "s", RAW, watcher)
        assert {state for state, _ in watcher.seen} == {RunState.RUNNING}
        assert watcher.seen[-1][1] is None and len(watcher.seen) == len(result.rounds)
        assert flushed == [RunState.RUNNING]
        assert machine.nr_pauses == 1
        assert 0 < result.pause_ms < result.total_ms
        assert [record.last for record in result.rounds] == [False] * (len(result.rounds) - 1) + [True]
        assert watcher.progress is not None and watcher.progress.view().fraction == 1.0


def test_paused_mode_stops_the_guest_until_the_files_are_flushed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[RunState] = []
    publish = staging.Staging.publish

    def publish_watched(self: staging.Staging) -> None:
        flushed.append(machine.runstate)
        publish(self)

    monkeypatch.setattr(staging.Staging, "publish", publish_watched)
    with guest() as machine:
        machine.fill(100)
        result = take(machine, tmp_path / "s", PAUSED)
        assert flushed == [RunState.SAVE_VM]
        assert machine.runstate is RunState.RUNNING
        assert len(result.rounds) == 1 and result.rounds[0].pages_sent == 100
        assert result.pause.send > 0


@pytest.mark.parametrize("state", [RunState.PAUSED, RunState.PRELAUNCH])
@pytest.mark.parametrize("parameters", [RAW, PAUSED], ids=["live", "paused"])
def test_guest_that_did_not_run_does_not_run_afterwards(
    tmp_path: Path, parameters: SnapshotParameters, state: RunState
) -> None:
    with guest(running=False) as machine:
        machine.pause(state)
        machine.fill(10)
        result = take(machine, tmp_path / "s", parameters)
        assert machine.runstate is RunState.PAUSED and not machine.ever_ran
        assert result.pause_ms == 0
        with restored(tmp_path / "s") as copy:
            assert copy.description["autostart"] is False


def test_description_says_that_the_guest_ran(tmp_path: Path) -> None:
    with guest() as machine:
        take(machine, tmp_path / "s", RAW)
        with restored(tmp_path / "s") as copy:
            assert copy.description["autostart"] is True
            assert copy.description["uuid"] == machine.uuid


@ALL
def test_what_saving_writes_into_memory_is_in_the_snapshot(tmp_path: Path, parameters: SnapshotParameters) -> None:
    with guest() as machine:
        machine.fill(20)
        machine.save_writes = {page(3): b"written by save", page(900): b"and here"}
        take(machine, tmp_path / "s", parameters)
        with restored(tmp_path / "s") as copy:
            assert copy.machine.memory.read(page(3), 15) == b"written by save"
            assert copy.machine.memory.read(page(900), 8) == b"and here"
    assert verify(tmp_path / "s").ok


@pytest.mark.parametrize("parameters", [RAW, ZSTD], ids=["raw", "zstd"])
def test_page_that_turns_zero_between_rounds_is_zero_in_the_snapshot(
    tmp_path: Path, parameters: SnapshotParameters
) -> None:
    with guest() as machine:
        machine.fill(300)

        def clear(record: RoundRecord, decision: Decision | None) -> None:
            if record.round == 0:
                machine.write(page(64), bytes(64 * PAGE_BYTES))

        result = take(machine, tmp_path / "s", parameters, Watcher(machine, clear))
        assert sum(record.pages_cleared for record in result.rounds) == 64
        with restored(tmp_path / "s") as copy:
            assert copy.machine.digest() == machine.saved  # type: ignore[attr-defined]
    assert verify(tmp_path / "s").ok
    if parameters is RAW:
        with (tmp_path / "s" / "memory.raw").open("rb") as file:
            assert os.lseek(file.fileno(), page(64), os.SEEK_DATA) == page(128)


def test_result_as_json_adds_up(tmp_path: Path) -> None:
    with guest() as machine:
        machine.fill(256)
        machine.write(page(1000), bytes(PAGE_BYTES))
        result = take(machine, tmp_path / "s", RAW)
    value = json.loads(json.dumps(result.to_value()))
    # The kernel may have backed more than was touched, by huge pages.
    assert value["pages"] == 256 and value["zero"] >= 1
    assert value["pages"] + value["zero"] == sum(record["pages-dirty"] for record in value["rounds"])
    assert value["bytes"] == 256 * PAGE_BYTES + (tmp_path / "s" / "state").stat().st_size
    assert value["pause-time"] <= value["total-time"] and value["why"]
    assert set(value["pause"]) == {"stop", "state", "last-pages", "send", "resume"}
    assert sum(value["pause"].values()) == pytest.approx(value["pause-time"], abs=0.01)
    assert value["pause"]["send"] == 0 < value["pause"]["last-pages"]
    assert [record["round"] for record in value["rounds"]] == list(range(len(value["rounds"])))


@ALL
def test_guest_of_zeros_is_a_good_snapshot(tmp_path: Path, parameters: SnapshotParameters) -> None:
    with guest() as machine:
        take(machine, tmp_path / "s", parameters)
    assert verify(tmp_path / "s").findings == ()
    with restored(tmp_path / "s") as copy:
        assert copy.machine.memory.resident_pages() == 0


def test_files_are_for_their_owner_alone(tmp_path: Path) -> None:
    with guest() as machine:
        take(machine, tmp_path / "s", RAW)
    assert (tmp_path / "s").stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "s").iterdir()} == {0o600}


def test_incompressible_and_compressible_pages_share_a_compressed_file(tmp_path: Path) -> None:
    with guest() as machine:
        machine.fill(512)
        machine.write(page(1024), b"pattern!" * 512 * 512)
        take(machine, tmp_path / "s", ZSTD)
        size = (tmp_path / "s" / "memory.frames").stat().st_size
        assert 512 * PAGE_BYTES < size < 600 * PAGE_BYTES
        with restored(tmp_path / "s") as copy:
            assert copy.machine.memory.hash_all() == machine.memory.hash_all()
