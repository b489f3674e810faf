"""/dev/kvm: versions, capabilities, and errors that say what is wrong."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from kvmigrate._core import lib
from kvmigrate.errors import BadField, HostError, UnsupportedError
from kvmigrate.kvm import msr_names
from kvmigrate.kvm.system import System, capability


def test_a_missing_device_is_an_error_with_a_hint(tmp_path: Path) -> None:
    with pytest.raises(HostError, match="doctor") as caught:
        System.open(str(tmp_path / "kvm"))
    assert caught.value.errno == errno.ENOENT


def test_a_device_that_is_not_kvm_is_refused() -> None:
    with pytest.raises(HostError, match="KVM_GET_API_VERSION") as caught:
        System.open("/dev/null")
    assert caught.value.errno == errno.ENOTTY


def test_capabilities_have_the_headers_numbers() -> None:
    assert capability("XSAVE2") == capability("KVM_CAP_XSAVE2") == capability(lib.KVM_CAP_XSAVE2) == 208
    with pytest.raises(KeyError, match="NONSENSE"):
        capability("NONSENSE")


@pytest.mark.kvm
def test_another_api_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(System, "api_version", property(lambda self: 11))
    with pytest.raises(UnsupportedError, match="version 11"):
        System.open()


@pytest.mark.kvm
def test_what_the_host_lists_is_there() -> None:
    with System.open() as system:
        assert system.check_extension("IMMEDIATE_EXIT") and system.check_extension(4711) == 0
        assert 0x174 in system.msr_indices() and len(system.supported_cpuid()) > 10
        assert set(system.feature_msrs()) <= set(system.feature_msr_indices())
        assert system.vcpu_mmap_bytes >= 4096


@pytest.mark.kvm
def test_a_second_vcpu_with_the_same_id_is_an_error_and_leaks_nothing() -> None:
    with System.open() as system, system.create_vm() as vm:
        vm.create_vcpu(0)
        nr_fds = len(list(Path("/proc/self/fd").iterdir()))
        with pytest.raises(HostError, match="KVM_CREATE_VCPU"):
            vm.create_vcpu(0)
        assert len(list(Path("/proc/self/fd").iterdir())) == nr_fds


@pytest.mark.kvm
def test_closing_gives_every_descriptor_and_mapping_back() -> None:
    def resources() -> tuple[int, int]:
        mappings = Path("/proc/self/maps").read_text().count("kvm-vcpu")
        return len(list(Path("/proc/self/fd").iterdir())), mappings

    before = resources()
    for _ in range(3):
        with System.open() as system:
            vm = system.create_vm()
            vm.create_irqchip()
            vm.create_vcpu(0)
            vm.create_vcpu(1)
            assert resources()[1] == before[1] + 2
            vm.close()
            vm.close()
    assert resources() == before


def test_names_of_msrs_go_both_ways() -> None:
    for index in (0x10, 0xC0000082, 0x200, 0x21F, 0x400, 0x47F, 0x4B564D01, 0x12345):
        assert msr_names.msr_index(msr_names.msr_name(index), "msrs") == index
    assert msr_names.msr_name(0x268) == "MSR_MTRRfix4K_C0000" and msr_names.msr_name(0x405) == "MSR_IA32_MC1_STATUS"
    for hostile in ("0xG", "0x123456789", "0X10", "TSC", "", "0x"):
        with pytest.raises(BadField):
            msr_names.msr_index(hostile, "msrs")
