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
    """What one host runs: ``tests``, which are at least so many. ``large``: it has more memory and more kernels."""

    name: str
    tests: tuple[str, ...]
    least: int
    large: bool = False


LOTS = (
    # The longest first: the third one starts where one of the others is done.
    Lot("devices", tuple(f"tests/emulated/inside/{name}.py" for name in ("storage", "rebooting", "example")), 4),
    Lot(
        "state",
        # The kvm layer's state, real mode, clocks, a live migration and a snapshot: what differs between back-ends.
        (
            "tests/kvm/test_state.py::test_save_load_save_is_equal_but_for_the_clocks",
            "tests/kvm/test_state.py::test_every_register_arrives_under_its_name",
            "tests/kvm/test_state.py::test_a_loaded_guest_goes_on_where_it_stopped",
            "tests/kvm/test_state.py::test_a_stale_xmm_register_is_noticed",
            "tests/kvm/test_state.py::test_a_feature_that_this_host_lacks_is_refused_by_its_name",
            "tests/kvm/test_run.py::test_string_io_comes_with_its_count",
            "tests/machine/test_machine.py::test_power_off_ends_with_status_0_after_the_serial_output",
            "tests/machine/test_machine.py::test_a_triple_fault_is_a_crash_that_is_named",
            "tests/kvm/test_clock_policy.py::test_vcpus_with_one_tsc_offset_get_one_again",
            *(f"tests/emulated/inside/{name}.py" for name in ("moving", "clocks", "linux", "console")),
        ),
        18,
    ),
    Lot(
        "kernels",
        ("tests/emulated/inside/kernels.py", *["tests/emulated/inside/stages.py"] * LONG),
        4 + (len(LONG_ONLY) + 3) * LONG,
        large=LONG,
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
    # The last -m counts: one of the guests has more memory than a host has otherwise.
    return run(command, directory, TIMEOUT_S, *(["-m", "7G"] if lot.large else []), cpus=1, full=lot.large)


@pytest.fixture(scope="module")
def outcomes(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Mapping[Lot, Future[Outcome]]]:
    """What the hosts of the chosen lots leave, two of them at work at once."""
    items = [item for item in request.session.items if isinstance(item, pytest.Function) and hasattr(item, "callspec")]
    chosen = [item.callspec.params["lot"] for item in items if "lot" in item.callspec.params]
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
    assert [suite.get(kind) for kind in ("errors", "failures", "skipped")] == ["0", "0", "0"]
