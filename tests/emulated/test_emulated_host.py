"""The same tests on another KVM: Linux's kvm_amd, in hosts that QEMU emulates. See the package's docstring."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import pytest

from .bed import run
from .host import Outcome

# Each takes a minute or more: only when KVMIGRATE_LONG is set.
LONG = bool(os.environ.get("KVMIGRATE_LONG"))
TIMEOUT_S = 2400 if LONG else 700
TEST_TIMEOUT_S = 900 if LONG else 240
AT_ONCE = min(2, os.cpu_count() or 1)
LONG_ONLY = (
    "tests/emulated/inside/kernels.py::test_the_kernel_for_real_machines_boots_and_drives_every_device",
    "tests/emulated/inside/kernels.py::test_a_vmlinux_boots_by_its_pvh_note_on_4_cpus",
    "tests/emulated/inside/kernels.py::test_linux_uses_the_memory_over_the_hole",
    "tests/emulated/inside/kernels.py::test_the_kernel_for_clouds_finds_all_of_8_cpus",
)


@dataclass(frozen=True)
class Lot:
    """What one host runs: ``tests``, which are at least so many, with so much ``memory`` if not as much as all hosts
    have. A ``full`` one has more kernels."""

    name: str
    tests: tuple[str, ...]
    least: int
    memory: str = ""
    full: bool = False


LOTS = (
    # The longest first: the others start where one of them is done. A test looks for room for 8 GiB, and uses none.
    Lot("suite", ("-m kvm tests/kvm tests/machine",), 220, memory="9G"),
    Lot("guests", tuple(f"tests/emulated/inside/{name}.py" for name in ("moving", "clocks", "linux", "console")), 9),
    Lot("devices", tuple(f"tests/emulated/inside/{name}.py" for name in ("storage", "rebooting", "example")), 5),
    Lot(
        "kernels",
        ("tests/emulated/inside/kernels.py", *["tests/emulated/inside/stages.py"] * LONG),
        4 + (len(LONG_ONLY) + 3) * LONG,
        memory="7G" * LONG,
        full=LONG,
    ),
)

# The last one to be looked at may have waited for another.
pytestmark = pytest.mark.timeout(2 * TIMEOUT_S + 120)


def start(lot: Lot, directory: Path) -> Outcome:
    """Run ``lot`` in a host of its own. It has one processor: two of them that QEMU emulates lock each other up now and
    then, and so does a guest with several."""
    options = f"-p no:cacheprovider --color=no --timeout={TEST_TIMEOUT_S} --junitxml=/tmp/result.xml -rA -v"
    left_out = [] if LONG else [f"--deselect={test}" for test in LONG_ONLY]
    command = f"python3 -m pytest {options} {' '.join([*left_out, *lot.tests])}"
    # The last -m counts.
    return run(command, directory, TIMEOUT_S, *(["-m", lot.memory] if lot.memory else []), cpus=1, full=lot.full)


@pytest.fixture(scope="module")
def outcomes(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Mapping[Lot, Future[Outcome]]]:
    """What the hosts of the chosen lots leave, two of them at work at once."""
    items = [item for item in request.session.items if isinstance(item, pytest.Function) and hasattr(item, "callspec")]
    lots = [item.callspec.params.get("lot") for item in items]
    chosen = [lot for lot in lots if isinstance(lot, Lot)]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        yield {lot: pool.submit(start, lot, tmp_path_factory.mktemp(lot.name)) for lot in chosen}


@pytest.mark.parametrize("lot", LOTS, ids=lambda lot: lot.name)
def test_every_selected_test_passes_on_kvm_amd(outcomes: Mapping[Lot, Future[Outcome]], lot: Lot) -> None:
    outcome = outcomes[lot].result()
    assert outcome.status == 0, outcome.console[-12000:]  # None: the host never came to its end
    suite = ElementTree.fromstring(outcome.sent).find("testsuite")
    assert suite is not None
    cases = [f"{case.get('classname')}::{case.get('name')}" for case in suite.iter("testcase")]
    assert len(cases) >= lot.least, cases
    assert [suite.get(kind) for kind in ("errors", "failures")] == ["0", "0"]
    # What is expected to fail here says why where it stands.
    skipped = [case.find("skipped") for case in suite.iter("testcase")]
    assert [one.get("message") for one in skipped if one is not None and one.get("type") != "pytest.xfail"] == []
