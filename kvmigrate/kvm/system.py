"""The /dev/kvm file descriptor: what this host can do, and new VMs."""

from __future__ import annotations

import os
from functools import cached_property
from typing import ClassVar

from .._core import ffi, lib
from ..errors import HostError, UnsupportedError, check
from ..state.section import Value
from .host import Host
from .lists import read_cpuid, read_indices, read_msrs
from .vm import Vm


def capability(name_or_number: str | int) -> int:
    """The number of a capability: ``"XSAVE2"``, ``"KVM_CAP_XSAVE2"`` or a number. Raises :class:`KeyError`."""
    if isinstance(name_or_number, int):
        return name_or_number
    name = f"KVM_CAP_{name_or_number.removeprefix('KVM_CAP_')}"
    try:
        return int(getattr(lib, name))
    except AttributeError:
        raise KeyError(f"{name} is not a capability that <linux/kvm.h> had when this was built") from None


class System:
    """An open /dev/kvm. Use as a context manager, or :meth:`close` it; its VMs live on without it."""

    _host: ClassVar[Host | None] = None

    def __init__(self, fd: int) -> None:
        self.fd = fd

    @classmethod
    def open(cls, path: str = "/dev/kvm") -> System:
        """Open ``path``. Raises :class:`HostError` when it cannot be opened, :class:`UnsupportedError` when it does not
        speak version 12 of the interface, the only one that was ever stable (KVM api.rst, KVM_GET_API_VERSION)."""
        try:
            system = cls(os.open(path, os.O_RDWR | os.O_CLOEXEC))
        except OSError as error:
            raise HostError(path, error.errno or 0, "`kvmigrate doctor` says how to mend it") from error
        version = system.api_version
        if version != lib.KVM_API_VERSION:
            system.close()
            raise UnsupportedError("KVM API version 12", f"{path} speaks version {version}")
        return system

    def close(self) -> None:
        """Close the file descriptor. Idempotent."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> System:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def api_version(self) -> int:
        """What KVM_GET_API_VERSION says."""
        return check(lib.kmig_ioctl_value(self.fd, lib.KVM_GET_API_VERSION, 0), "KVM_GET_API_VERSION")

    def check_extension(self, name_or_number: str | int) -> int:
        """What KVM_CHECK_EXTENSION says: 0 for no, else yes or a number whose meaning depends on the capability.
        Raises :class:`KeyError` for a name that is none."""
        number = capability(name_or_number)
        return check(lib.kmig_ioctl_value(self.fd, lib.KVM_CHECK_EXTENSION, number), "KVM_CHECK_EXTENSION")

    @cached_property
    def vcpu_mmap_bytes(self) -> int:
        """Size of the area to map of each vCPU's file descriptor."""
        return check(lib.kmig_ioctl_value(self.fd, lib.KVM_GET_VCPU_MMAP_SIZE, 0), "KVM_GET_VCPU_MMAP_SIZE")

    def msr_indices(self) -> list[int]:
        """What KVM_GET_MSR_INDEX_LIST names: MSRs that this host keeps for guests, though not all of them."""
        return read_indices(self.fd, lib.KVM_GET_MSR_INDEX_LIST, "KVM_GET_MSR_INDEX_LIST")

    def feature_msr_indices(self) -> list[int]:
        """The MSRs that say what the CPU can do (KVM_GET_MSR_FEATURE_INDEX_LIST); empty where that is missing."""
        if not self.check_extension("GET_MSR_FEATURES"):
            return []
        return read_indices(self.fd, lib.KVM_GET_MSR_FEATURE_INDEX_LIST, "KVM_GET_MSR_FEATURE_INDEX_LIST")

    def feature_msrs(self) -> dict[int, int]:
        """The values of the feature MSRs that can be read."""
        return read_msrs(self.fd, self.feature_msr_indices())

    def supported_cpuid(self) -> list[dict[str, Value]]:
        """The CPUID entries that this host can give a guest: function, index, flags, eax, ebx, ecx, edx."""
        return read_cpuid(self.fd, lib.KVM_GET_SUPPORTED_CPUID, "KVM_GET_SUPPORTED_CPUID")

    def emulated_cpuid(self) -> list[dict[str, Value]]:
        """The CPUID entries of what KVM emulates in software; empty where the capability is missing."""
        if not self.check_extension("EXT_EMUL_CPUID"):
            return []
        return read_cpuid(self.fd, lib.KVM_GET_EMULATED_CPUID, "KVM_GET_EMULATED_CPUID")

    def mce_capabilities(self) -> int:
        """What KVM_X86_GET_MCE_CAP_SUPPORTED says: what MCG_CAP may have here; 0 where it is missing."""
        if not self.check_extension("MCE"):
            return 0
        found = ffi.new("__u64 *")
        check(lib.kmig_ioctl(self.fd, lib.KVM_X86_GET_MCE_CAP_SUPPORTED, found), "KVM_X86_GET_MCE_CAP_SUPPORTED")
        return int(found[0])

    def create_vm(self) -> Vm:
        """A new, empty VM. Raises :class:`HostError`."""
        fd = check(lib.kmig_ioctl_value(self.fd, lib.KVM_CREATE_VM, 0), "KVM_CREATE_VM")
        return Vm(fd, self.host)

    @property
    def host(self) -> Host:
        """All of the above that matters to a VM's state, asked once per process: it takes as long as a new VM."""
        if System._host is None:
            System._host = Host(
                vcpu_mmap_bytes=self.vcpu_mmap_bytes,
                supported_cpuid=tuple(self.supported_cpuid()),
                msr_indices=tuple(self.msr_indices()),
                has_sregs2=bool(self.check_extension("SREGS2")),
                can_scale_tsc=bool(self.check_extension("TSC_CONTROL")),
                has_tsc_deadline=bool(self.check_extension("TSC_DEADLINE_TIMER")),
                nested_state_bytes=self.check_extension("NESTED_STATE"),
                mce_capabilities=self.mce_capabilities(),
            )
        return System._host
