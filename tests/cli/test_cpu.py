"""Two hosts tell what their CPUs can do, and a guest is run with what both have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from .command import Host
from .sectors import POWER_OFF, sector

AVX2_BIT = 1 << 5
ENQCMD_BIT = 1 << 29
"""KVM offers it to no guest."""


def doctor(host: Host) -> Any:
    return host("doctor", "--json").json


def leaf(value: Any, function: int) -> dict[str, int]:
    found: dict[str, int] = next(e for e in value["cpuid"] if e["function"] == function and e["index"] == 0)
    return found


@pytest.fixture
def files(host: Host, tmp_path: Path) -> tuple[Path, Path]:
    """What this host says, and what one says that lacks a feature of it."""
    here = doctor(host)
    poorer = json.loads(json.dumps(here))
    leaf(here, 7)["ebx"] |= AVX2_BIT
    leaf(poorer, 7)["ebx"] &= ~AVX2_BIT
    paths = tmp_path / "here.json", tmp_path / "poorer.json"
    for path, value in zip(paths, (here, poorer), strict=True):
        path.write_text(json.dumps(value))
    return paths


def test_a_guest_runs_with_the_cpu_that_two_hosts_share(host: Host, files: tuple[Path, Path], tmp_path: Path) -> None:
    fleet = tmp_path / "fleet.json"
    done = host("cpu-baseline", *files, "-o", fleet)
    assert done.status == 0, done.err
    assert "avx2" in done.out
    found = json.loads(fleet.read_text())
    assert found["lost"] == {str(files[0]): ["avx2"], str(files[1]): []}
    assert not leaf(found, 7)["ebx"] & AVX2_BIT
    ran = host("run", sector(tmp_path, POWER_OFF), "--cpu", fleet, "--memory", "16M", "--serial", "null")
    assert ran.status == 0, ran.err


def test_one_json_object_has_all_of_it(host: Host, files: tuple[Path, Path]) -> None:
    value = host("cpu-baseline", *files, "--json").json
    assert value["hosts"] == [str(path) for path in files]
    assert value["lost"][str(files[0])] == ["avx2"] and value["cpuid"]


def test_a_file_that_is_missing_is_one_line(host: Host, tmp_path: Path) -> None:
    done = host("cpu-baseline", tmp_path / "none.json")
    assert done.status == 2 and len(done.err.splitlines()) == 1
    assert "none.json" in done.err


def test_a_cpu_that_this_host_lacks_is_refused_before_the_guest_starts(
    host: Host, files: tuple[Path, Path], tmp_path: Path
) -> None:
    more = json.loads(files[0].read_text())
    lacking = next(entry for entry in more["cpuid"] if entry["function"] == 7 and entry["index"] == 0)
    lacking["ecx"] |= ENQCMD_BIT
    files[0].write_text(json.dumps(more))
    done = host("run", sector(tmp_path, POWER_OFF), "--cpu", files[0], "--serial", "null")
    assert done.status == 2 and "this host lacks" in done.err and "enqcmd" in done.err
