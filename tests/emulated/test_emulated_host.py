"""The same tests on another KVM: Linux's kvm_amd, in a host that QEMU emulates. See the package's docstring."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

from .bed import run
from .host import Outcome

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
)
LEAST_TESTS = 20

pytestmark = pytest.mark.timeout(TIMEOUT_S + 120)


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    pytest_options = f"-p no:cacheprovider --color=no --timeout={TIMEOUT_S} --junitxml=/tmp/result.xml -rA"
    command = f"python3 -m pytest {pytest_options} {' '.join(SELECTED)}"
    return run(command, tmp_path_factory.mktemp("host"), TIMEOUT_S)


def test_every_selected_test_passes_on_kvm_amd(outcome: Outcome) -> None:
    assert outcome.status == 0, outcome.console[-12000:]  # None: the host never came to its end
    suite = ElementTree.fromstring(outcome.sent).find("testsuite")
    assert suite is not None
    cases = [f"{case.get('classname')}::{case.get('name')}" for case in suite.iter("testcase")]
    assert len(cases) >= LEAST_TESTS, cases
    assert [suite.get(kind) for kind in ("errors", "failures", "skipped")] == ["0", "0", "0"]
