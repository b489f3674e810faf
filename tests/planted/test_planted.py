"""Every planted fault is caught by an oracle, and the same run without a fault is caught by none."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from kvmigrate.config import MemoryBackend, parse_size
from kvmigrate.state.frame import FrameKind

from ..backends import SHARED, room_for
from ..oracle.world import World, open_world
from .examine import MEMORY, Findings, examine_hop, examine_snapshot, examine_stall
from .faults import FAULTS
from .table import write_table

pytestmark = pytest.mark.timeout(600)
ROOT = Path(__file__).parents[2]
HOP, HOP_TWO, HOP_BUSY = examine_hop, partial(examine_hop, cpus=2), partial(examine_hop, rate=0)
# The core clears the log in windows of 8192 pages. A quarter of this guest's pages are the 64 before the second one.
# What is lost is soon written again, so it takes a few hops until one page is lost for good.
HOP_BORDER = partial(examine_hop, hops=6, rate=30, pages=256, memory=str((8192 + 64) << 12))
# Pages are to come as what changed in them at least twice, and the agreement on it takes two rounds. A fast
# machine at this rate writes to all pages in each round; they go on until changes make up for the whole pages.
HOP_DELTA = partial(examine_hop, rate=200, compression="zstd", cap=4 << 20, downtime_limit_ms=800)
# Over the loopback, where nothing says otherwise: pages go through pipes.
HOP_THREE = partial(examine_hop, connections=3)
HOP_BY_COPY = partial(examine_hop, by_copy=True)
HOP_ZEROCOPY = partial(examine_hop, connections=3, zero_copy=True)
NO_COMMIT, NO_RUNNING = (partial(examine_stall, kind=kind) for kind in (FrameKind.COMMIT, FrameKind.RUNNING))


@dataclass(frozen=True)
class Fault:
    """``examine``: the run that must notice. ``in_c``: compiled in and chosen by name, else patched by the launcher."""

    name: str
    what: str
    examine: Callable[[World], Findings] = HOP
    in_c: bool = False


PLANTED = (
    Fault("drop-page-per-round", "one dirty page of each round is not sent", in_c=True),
    Fault("zero-when-not", "one page of each round is sent as zero", in_c=True),
    Fault("swap-two-pages", "two pages change places on their way", in_c=True),
    Fault("forget-host-bitmap", "pages that the VMM wrote are not sent again", in_c=True),
    Fault("copy-before-clear", "pages are copied before their dirty bits are cleared", HOP_BUSY, in_c=True),
    Fault("off-by-64-clear", "dirty bits are cleared from 64 pages too early", HOP_BORDER, in_c=True),
    Fault(
        "wrong-delta", "what changed in a page is taken from another page than was sent before", HOP_DELTA, in_c=True
    ),
    Fault("stale-delta-base", "a page that is sent again and again is kept as it was first sent", HOP_DELTA, in_c=True),
    Fault("drop-page-per-round", "one dirty page of each round and connection is not sent", HOP_THREE, in_c=True),
    Fault("swap-two-pages", "two pages change places on one of three connections", HOP_THREE, in_c=True),
    Fault(
        "drop-page-per-round",
        "one dirty page of each round is not sent, the others by copy",
        HOP_BY_COPY,
        in_c=True,
    ),
    Fault("swap-two-pages", "two pages change places that are sent by copy", HOP_BY_COPY, in_c=True),
    Fault("lose-piece", "pages that one of three connections took are sent by none", HOP_THREE, in_c=True),
    Fault(
        "drop-page-per-round",
        "one dirty page of each round is not sent, the others by reference",
        HOP_ZEROCOPY,
        in_c=True,
    ),
    Fault("swap-two-pages", "two pages change places that are sent by reference", HOP_ZEROCOPY, in_c=True),
    Fault(
        "lose-piece",
        "pages that one connection took are sent by none, the others by reference",
        HOP_ZEROCOPY,
        in_c=True,
    ),
    Fault("skip-last-round", "what was written since the last round is not sent"),
    Fault("skip-registers", "general registers are not loaded"),
    Fault("stale-registers", "a register is one update behind"),
    Fault("stale-xmm", "XMM and x87 registers are not loaded"),
    Fault("skip-xcr0", "XCR0 is not loaded"),
    Fault("skip-lapic", "the local APIC is not loaded"),
    Fault("skip-debug-registers", "debug registers are not loaded"),
    Fault("skip-mp-state", "MP states are not loaded: a second vCPU does not run", HOP_TWO),
    Fault("forget-msr", "one MSR (LSTAR) is not saved"),
    Fault("skip-msrs", "no MSR is loaded"),
    Fault("skip-pit", "the PIT is not loaded"),
    Fault("skip-pic", "the first PIC is not loaded"),
    Fault("skip-ioapic", "the IOAPIC is not loaded"),
    Fault("skip-uart", "the UART is not loaded"),
    Fault("skip-last-round", "the same, in a snapshot", examine_snapshot),
    Fault("resume-after-lost-answer", "the source resumes when the answer to COMMIT is lost", NO_RUNNING),
    Fault("run-before-commit", "the destination runs the guest without waiting for COMMIT", NO_COMMIT),
)
NOT_PLANTED = {
    "deadline-before-tsc": "it can only be seen on a host whose TSC can be set",
}
IN_OTHER_MEMORY = (
    ("drop-page-per-round", MemoryBackend.MEMFD),
    ("forget-host-bitmap", MemoryBackend.MEMFD),
    ("copy-before-clear", MemoryBackend.MEMFD),
    ("copy-before-clear", MemoryBackend.HUGETLBFS),
)
"""One for each way to know of a page: that it holds something, that the VMM wrote it, that the guest did."""
caught: dict[Fault, Findings] = {}


@pytest.fixture(scope="session")
def faulty_build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package with the C core's planted faults compiled in, each waiting for its name."""
    target = tmp_path_factory.mktemp("faulty")
    ignore = shutil.ignore_patterns("_core*.so", "csrc", "__pycache__")
    shutil.copytree(ROOT / "kvmigrate", target / "kvmigrate", ignore=ignore)
    subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "-b", str(target), "-t", str(target / "objects")],
        cwd=ROOT, env=os.environ | {"KVMIGRATE_CFLAGS": "-DKMIG_PLANTED_FAULTS"}, check=True, capture_output=True,
    )  # fmt: skip
    return target


@pytest.fixture
def memory_options(request: pytest.FixtureRequest) -> Iterator[tuple[str, ...]]:
    """Of ``backend``, with room for a guest and where it goes."""
    backend = request.node.callspec.params.get("backend", MemoryBackend.ANONYMOUS)
    with room_for(backend, 2 * parse_size(MEMORY)):
        yield () if backend is MemoryBackend.ANONYMOUS else ("--memory-backend", backend)


@pytest.fixture
def world(request: pytest.FixtureRequest, memory_options: tuple[str, ...]) -> Iterator[World]:
    fault = request.node.callspec.params.get("fault")
    with open_world() as opened:
        opened.options = memory_options
        if fault is not None and fault.in_c:
            opened.environment["PYTHONPATH"] = str(request.getfixturevalue("faulty_build"))
            opened.environment["KVMIGRATE_PLANT"] = fault.name
        elif fault is not None:
            opened.environment["KVMIGRATE_TEST_FAULT"] = fault.name
        yield opened


@pytest.mark.parametrize("fault", PLANTED, ids=lambda fault: f"{fault.name}-{'c' if fault.in_c else 'py'}")
def test_planted_fault_is_caught(world: World, fault: Fault) -> None:
    found = fault.examine(world)
    caught[fault] = found
    print(found.objections)
    assert found.objections, f"nobody noticed: {fault.what}"


@pytest.mark.parametrize(
    "examine",
    [
        HOP,
        HOP_TWO,
        HOP_THREE,
        HOP_BY_COPY,
        HOP_ZEROCOPY,
        HOP_BUSY,
        HOP_BORDER,
        examine_snapshot,
        HOP_DELTA,
        NO_COMMIT,
        NO_RUNNING,
    ],
    ids=[
        "hop",
        "two vcpus",
        "three connections",
        "by copy",
        "zero-copy",
        "busy",
        "border",
        "snapshot",
        "delta",
        "no COMMIT",
        "no RUNNING",
    ],
)
def test_the_same_run_without_a_fault_passes(world: World, examine: Callable[[World], Findings]) -> None:
    assert not examine(world).objections


@pytest.mark.parametrize(
    ("fault", "backend"),
    [(next(fault for fault in PLANTED if fault.name == name), backend) for name, backend in IN_OTHER_MEMORY],
    ids=[f"{name}-{backend}" for name, backend in IN_OTHER_MEMORY],
)
def test_planted_fault_is_caught_in_other_memory(world: World, fault: Fault, backend: MemoryBackend) -> None:
    assert fault.examine(world).objections, f"nobody noticed in {backend} memory: {fault.what}"


@pytest.mark.parametrize("backend", SHARED)
@pytest.mark.parametrize("examine", [HOP_BUSY, examine_snapshot], ids=["hop", "snapshot"])
def test_without_a_fault_other_memory_passes(
    world: World, examine: Callable[[World], Findings], backend: MemoryBackend
) -> None:
    assert not examine(world).objections


def test_every_python_fault_is_planted() -> None:
    assert FAULTS.keys() == {fault.name for fault in PLANTED if not fault.in_c}


def test_all_were_caught() -> None:
    """The last one: the table for docs/evidence.md, when all of the above ran."""
    if len(caught) < len(PLANTED):
        pytest.skip(f"only {len(caught)} of {len(PLANTED)} faults were planted in this run")
    noticed = [fault for fault in PLANTED if caught[fault].objections]
    print(f"caught {len(noticed)} of {len(PLANTED)}")
    rows = [(fault.name, fault.what, list(caught[fault].objections)) for fault in PLANTED]
    if path := os.environ.get("KVMIGRATE_EVIDENCE"):
        write_table(Path(path), rows, NOT_PLANTED)
    assert noticed == list(PLANTED)
