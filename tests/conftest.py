"""The one gate for tests that need /dev/kvm: ``pytestmark = pytest.mark.kvm``.

Where /dev/kvm cannot be opened they fail, unless KVMIGRATE_NO_KVM=1 says that this is meant: then they are reported as
skipped for that reason.
"""

from __future__ import annotations

import os

import pytest

NO_KVM = os.environ.get("KVMIGRATE_NO_KVM") == "1"


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "kvm: needs a usable /dev/kvm; fails without, unless KVMIGRATE_NO_KVM=1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if NO_KVM and item.get_closest_marker("kvm"):
            item.add_marker(pytest.mark.skip(reason="KVMIGRATE_NO_KVM=1: tests that need /dev/kvm are left out"))


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("kvm") and not NO_KVM:
        try:
            os.close(os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC))
        except OSError as error:
            pytest.fail(f"/dev/kvm: {error.strerror}; set KVMIGRATE_NO_KVM=1 to leave out what needs it", pytrace=False)
