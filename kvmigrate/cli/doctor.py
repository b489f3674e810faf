"""The verb doctor: what this host can do for kvmigrate, what it cannot, and how to mend it."""

from __future__ import annotations

import os
import platform
import resource
from collections.abc import Callable, Iterator
from pathlib import Path

from ..control import runtime
from ..errors import KvmigrateError
from ..memory import huge
from ..record import asdict, dataclass
from . import show

OK, WARN, FAIL = "ok", "warn", "fail"

THP = Path("/sys/kernel/mm/transparent_hugepage")

NEEDED = (
    "KVM_CAP_USER_MEMORY", "KVM_CAP_SYNC_MMU", "KVM_CAP_IRQCHIP", "KVM_CAP_PIT2", "KVM_CAP_PIT_STATE2",
    "KVM_CAP_SET_TSS_ADDR", "KVM_CAP_SET_IDENTITY_MAP_ADDR", "KVM_CAP_EXT_CPUID", "KVM_CAP_MP_STATE",
    "KVM_CAP_VCPU_EVENTS", "KVM_CAP_DEBUGREGS", "KVM_CAP_XSAVE", "KVM_CAP_XCRS", "KVM_CAP_ADJUST_CLOCK",
    "KVM_CAP_GET_MSR_FEATURES",
)  # fmt: skip
"""Without any one of these, guests cannot run here or cannot be moved whole."""

WANTED = {
    "KVM_CAP_IMMEDIATE_EXIT": "vCPUs are kicked by a signal mask instead",
    "KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2": "the dirty log is fetched and cleared at once: more pages are sent twice",
    "KVM_CAP_XSAVE2": "guests cannot have AMX state",
    "KVM_CAP_SREGS2": "the page-table pointers of PAE guests are read again from memory",
    "KVM_CAP_TSC_CONTROL": "a guest keeps this host's TSC rate: move only between hosts of the same rate",
    "KVM_CAP_SET_GUEST_DEBUG": "no single step and no breakpoints",
    "KVM_CAP_NESTED_STATE": "guests that run guests themselves cannot be moved",
}
"""These make it better; the text says what is missed without."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One row: ``status`` is ok, warn or fail, ``mend`` what to do about it."""

    check: str
    status: str
    text: str
    mend: str = ""


def doctor(*, as_json: bool) -> int:
    """Print all findings. Returns 1 when something needed is missing."""
    findings = list(examine())
    ok = all(finding.status != FAIL for finding in findings)
    if as_json:
        show.print_json({"ok": ok, "checks": [asdict(finding) for finding in findings], **_cpu()})
        return 0 if ok else 1
    rows = [[f.check, f.status, f.text + (f" – {f.mend}" if f.mend else "")] for f in findings]
    show.table("", ["check", "", "what was found"], rows)
    print("this host can run and move guests" if ok else "this host cannot run guests: see the rows marked fail")
    return 0 if ok else 1


def examine() -> Iterator[Finding]:
    """All checks, one after the other. A check that itself breaks is a row too, never an exception."""
    checks: tuple[Callable[[], Iterator[Finding]], ...] = (
        _host, _device, _capabilities, _runtime, _memory, _memlock,
    )  # fmt: skip
    for check in checks:
        try:
            yield from check()
        except (KvmigrateError, OSError) as error:
            yield Finding(check.__name__.strip("_"), FAIL, str(error))


def _cpu() -> dict[str, object]:
    """What ``kvmigrate cpu-baseline`` reads; nothing where KVM cannot be asked."""
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return {}
    from ..kvm.cpu_files import FORMAT
    from ..kvm.system import System

    with System.open() as system:
        return {"format": FORMAT, "kernel": platform.release(), "cpuid": system.supported_cpuid()}


def _host() -> Iterator[Finding]:
    machine = platform.machine()
    if machine != "x86_64" or os.uname().sysname != "Linux":
        yield Finding("host", FAIL, f"{os.uname().sysname} on {machine}", "kvmigrate needs Linux on x86-64")
        return
    yield Finding("host", OK, f"Linux {platform.release()}, {os.cpu_count()} CPUs, KVM by {_backend()}")


def _backend() -> str:
    modules = [name for name in ("kvm_intel", "kvm_amd", "kvm_pvm") if Path("/sys/module", name).exists()]
    nested = "hypervisor" in _cpu_flags()
    return (", ".join(modules) or "an unknown module") + (", inside a virtual machine" if nested else "")


def _cpu_flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return next((set(line.partition(":")[2].split()) for line in lines if line.startswith("flags")), set())


def _device() -> Iterator[Finding]:
    path = Path("/dev/kvm")
    if not path.exists():
        yield Finding("/dev/kvm", FAIL, "is not there", _how_to_get_kvm())
    elif not os.access(path, os.R_OK | os.W_OK):
        mend = f"join its group: sudo usermod -aG {path.group()} $USER, then log in again"
        yield Finding("/dev/kvm", FAIL, "you may not open it", mend)
    else:
        yield Finding("/dev/kvm", OK, "is there and may be opened")


def _how_to_get_kvm() -> str:
    flags = _cpu_flags()
    if "vmx" in flags or "svm" in flags:
        return f"load the module: sudo modprobe {'kvm_intel' if 'vmx' in flags else 'kvm_amd'}"
    if "hypervisor" in flags:
        return "this is a virtual machine: switch on nested virtualisation for it on its host"
    return "switch on virtualisation (VT-x or SVM) in the firmware's setup"


def _capabilities() -> Iterator[Finding]:
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return
    from ..kvm.system import System

    system = System.open()
    try:
        version = system.api_version
        mend = "" if version == 12 else "kvmigrate needs version 12"
        yield Finding("KVM API", FAIL if mend else OK, f"version {version}", mend)
        missing = [name for name in NEEDED if not system.check_extension(name)]
        for name in missing:
            yield Finding(name, FAIL, "is missing", "use a newer kernel, or another host")
        yield Finding("capabilities", FAIL if missing else OK, f"{len(NEEDED) - len(missing)} of {len(NEEDED)} needed")
        for name, without in WANTED.items():
            if not system.check_extension(name):
                yield Finding(name, WARN, f"is missing: {without}")
        clear = system.check_extension("KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2")
        yield Finding("dirty log", OK, "get and clear apart (manual protection)" if clear else "get, which clears too")
    finally:
        system.close()


def _runtime() -> Iterator[Finding]:
    yield Finding("runtime directory", OK, str(runtime.open_runtime_dir()))


def _memory() -> Iterator[Finding]:
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    available = int(fields["MemAvailable"].split()[0]) << 10
    yield Finding("memory", OK, f"{show.size(available)} available for guests")
    mode = _chosen(THP / "enabled")
    if mode == "never":
        mend = f"echo madvise | sudo tee {THP / 'enabled'}"
        yield Finding("huge pages", WARN, "are off: guests and their moves are slower", mend)
    else:
        yield Finding("huge pages", OK, f"transparent, {mode}")
    yield from _other_memory()


def _other_memory() -> Iterator[Finding]:
    """What a guest could have by ``--memory-backend``."""
    mode = _chosen(THP / "shmem_enabled")
    if mode in ("never", "deny"):
        mend = f"for faster ones: echo advise | sudo tee {THP / 'shmem_enabled'}"
        yield Finding("memfd guests", OK, "have pages of 4 KiB", mend)
    else:
        yield Finding("memfd guests", OK, f"have transparent huge pages, {mode}")
    yield Finding("hugetlbfs guests", OK, f"can have {show.size(huge.free_bytes())}")


def _chosen(path: Path) -> str:
    """Which of the kernel's words in ``path`` stands in brackets."""
    return path.read_text().partition("[")[2].partition("]")[0] if path.exists() else "never"


def _memlock() -> Iterator[Finding]:
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = files != resource.RLIM_INFINITY and files < 256
    yield Finding("open files", WARN if few else OK, f"at most {files}", "ulimit -n 1024" if few else "")
    space, _ = resource.getrlimit(resource.RLIMIT_AS)
    if space != resource.RLIM_INFINITY:
        yield Finding("address space", WARN, f"is limited to {show.size(space)}", "ulimit -v unlimited")
