"""The same tests on another KVM: Linux's kvm_amd, in a host that QEMU emulates. See the package's docstring."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

import pytest

from .bed import run

TIMEOUT_S = 900
# The kvm layer's state, real mode, clocks, a live migration and a snapshot: what differs from one back-end to another.
SELECTED = (
    "tests/kvm/test_state.py::test_save_load_save_is_equal_but_for_the_clocks",
    "tests/kvm/test_state.py::test_every_register_arrives_under_its_name",
    "tests/kvm/test_state.py::test_a_loaded_guest_goes_on_where_it_stopped",
    "tests/kvm/test_state.py::test_a_stale_xmm_register_is_noticed",
    "tests/kvm/test_run.py::test_string_io_comes_with_its_count",
    "tests/machine/test_machine.py::test_power_off_ends_with_status_0_after_the_serial_output",
    "tests/machine/test_machine.py::test_a_triple_fault_is_a_crash_that_is_named",
    "tests/kvm/test_clock_policy.py::test_vcpus_with_one_tsc_offset_get_one_again",
    "tests/emulated/inside/moving.py",
    "tests/emulated/inside/clocks.py",
    "tests/emulated/inside/linux.py",
    "tests/emulated/inside/storage.py",
    "tests/emulated/inside/console.py",
    "tests/emulated/inside/rebooting.py",
    "tests/emulated/inside/example.py",
)
# Guests with several processors, in a host with one: where QEMU emulates two, such a guest locks both up now and then,
# with the host's kernel in a soft lockup in each vCPU's thread.
SELECTED_FOR_ONE = ("tests/emulated/inside/kernels.py",)
# Each takes a minute or more: only when KVMIGRATE_LONG is set.
LONG = bool(os.environ.get("KVMIGRATE_LONG"))
SELECTED_FOR_ONE += ("tests/emulated/inside/stages.py",) * LONG
LONG_ONLY = (
    "tests/emulated/inside/kernels.py::test_the_kernel_for_real_machines_boots_and_drives_every_device",
    "tests/emulated/inside/kernels.py::test_a_vmlinux_boots_by_its_pvh_note_on_4_cpus",
    "tests/emulated/inside/kernels.py::test_linux_uses_the_memory_over_the_hole",
    "tests/emulated/inside/kernels.py::test_the_kernel_for_clouds_finds_all_of_8_cpus",
)

pytestmark = pytest.mark.timeout(TIMEOUT_S + 120)


@pytest.mark.parametrize(
    ("cpus", "selected", "least"),
    [
        pytest.param(2, SELECTED, 21, id="two-processors"),
        pytest.param(1, SELECTED_FOR_ONE, 4 + (len(LONG_ONLY) + 3) * LONG, id="one-processor"),
    ],
)
def test_every_selected_test_passes_on_kvm_amd(tmp_path: Path, cpus: int, selected: Sequence[str], least: int) -> None:
    pytest_options = f"-p no:cacheprovider --color=no --timeout={TIMEOUT_S} --junitxml=/tmp/result.xml -rA"
    left_out = [] if LONG else [f"--deselect={test}" for test in LONG_ONLY]
    command = f"python3 -m pytest {pytest_options} {' '.join([*left_out, *selected])}"
    long_one = LONG and cpus == 1
    # The last -m counts: one of the guests has more memory than a host has otherwise.
    outcome = run(command, tmp_path, TIMEOUT_S, *(["-m", "7G"] if long_one else []), cpus=cpus, full=long_one)
    assert outcome.status == 0, outcome.console[-12000:]  # None: the host never came to its end
    suite = ElementTree.fromstring(outcome.sent).find("testsuite")
    assert suite is not None
    cases = [f"{case.get('classname')}::{case.get('name')}" for case in suite.iter("testcase")]
    assert len(cases) >= least, cases
    assert [suite.get(kind) for kind in ("errors", "failures", "skipped")] == ["0", "0", "0"]
