"""The file descriptor of one vCPU, its shared run area, and the group that is paused and resumed together."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

from .._core import ffi, lib
from ..errors import check
from ..state.section import Value
from .breakpoints import debug_registers
from .host import CpuidEntry, Host
from .lists import CheckedCpuid, read_msrs, readable_msrs, write_cpuid, write_msrs
from .structs import layout

RUN_EXIT: int = lib.KMIG_RUN_EXIT
RUN_QUIT: int = lib.KMIG_RUN_QUIT
RUN_DEBUG: int = lib.KMIG_RUN_DEBUG

REQUESTS: Mapping[str, tuple[int, int]] = {
    "regs": (lib.KVM_GET_REGS, lib.KVM_SET_REGS),
    "sregs": (lib.KVM_GET_SREGS, lib.KVM_SET_SREGS),
    "sregs2": (lib.KVM_GET_SREGS2, lib.KVM_SET_SREGS2),
    "fpu": (lib.KVM_GET_FPU, lib.KVM_SET_FPU),
    "xcrs": (lib.KVM_GET_XCRS, lib.KVM_SET_XCRS),
    "debugregs": (lib.KVM_GET_DEBUGREGS, lib.KVM_SET_DEBUGREGS),
    "lapic_state": (lib.KVM_GET_LAPIC, lib.KVM_SET_LAPIC),
    "xsave": (lib.KVM_GET_XSAVE, lib.KVM_SET_XSAVE),
    "nested_state": (lib.KVM_GET_NESTED_STATE, lib.KVM_SET_NESTED_STATE),
    "mp_state": (lib.KVM_GET_MP_STATE, lib.KVM_SET_MP_STATE),
    "vcpu_events": (lib.KVM_GET_VCPU_EVENTS, lib.KVM_SET_VCPU_EVENTS),
}


class VcpuGroup:
    """All vCPUs of one VM: what is paused and resumed together. Starts paused."""

    def __init__(self) -> None:
        ret = ffi.new("struct kmig_vcpus **")
        check(lib.kmig_vcpus_create(ret), "a vCPU group")
        self.handle: Any = ret[0]

    def pause(self, timeout_ms: int = 5000) -> None:
        """Make every vCPU complete its half-done I/O and park, and wait until all have. Idempotent.

        Raises :class:`HostError` with ETIMEDOUT after ``timeout_ms``, and with EDEADLK when a vCPU's own thread calls;
        the pause stays requested then."""
        check(lib.kmig_vcpus_pause(self.handle, timeout_ms), "pausing the vCPUs")

    def request_pause(self) -> None:
        """The same without waiting, for a vCPU's own thread."""
        lib.kmig_vcpus_request_pause(self.handle)

    def resume(self) -> None:
        """Let parked vCPUs run."""
        lib.kmig_vcpus_resume(self.handle)

    def quit(self) -> None:
        """Make every :meth:`Vcpu.run` return RUN_QUIT, now and for ever. Nothing to do once the group is closed."""
        if self.handle != ffi.NULL:
            lib.kmig_vcpus_quit(self.handle)

    def answer_virtio(self, gpa: int, device: Any) -> None:
        """Have the core itself answer the interrupt registers of ``device``, a ``struct kmig_virtio``, whose window is
        at ``gpa``: no :meth:`Vcpu.run` comes back for them. Before any vCPU has a thread; ``device`` outlives those."""
        check(lib.kmig_vcpus_answer_virtio(self.handle, gpa, device), f"answering the registers at {gpa:#x}")

    def answer_uart(self, port: int, uart: Any) -> None:
        """The same for ``uart``, a ``struct kmig_uart`` whose first port is ``port``: an access comes back only when
        the UART's back-end must hear of it."""
        check(lib.kmig_vcpus_answer_uart(self.handle, port, uart), f"answering the ports at {port:#x}")

    def close(self) -> None:
        """Free the group. No thread may be in one of its vCPUs any more. Idempotent."""
        if self.handle != ffi.NULL:
            lib.kmig_vcpus_destroy(self.handle)
            self.handle = ffi.NULL


class Vcpu:
    """One vCPU. ``run_area`` is its struct kvm_run; getters and setters speak dicts under the kernel's field names.

    Every getter and setter is one ioctl and raises :class:`HostError` when the kernel refuses, a setter
    :class:`BadField` when the value does not fit the struct. They are for a vCPU that is parked or has never run: the
    kernel holds a lock while KVM_RUN is in progress, so that on a halted guest any other call would wait for ever.
    """

    def __init__(self, group: VcpuGroup, fd: int, vcpu_id: int, kick: int, xsave_bytes: int, host: Host) -> None:
        ret = ffi.new("struct kmig_vcpu **")
        run_bytes = host.vcpu_mmap_bytes
        check(lib.kmig_vcpu_create(group.handle, fd, run_bytes, kick, ret), f"mapping vCPU {vcpu_id}")
        self.host = host
        self.image: Any = None
        """Made by vcpu_image.py, for itself."""
        self.cpuid: list[CpuidEntry] = []
        self.offered_cpuid: list[CpuidEntry] = []
        self.fd = fd
        self.id = vcpu_id
        self.handle: Any = ret[0]
        self.run_area: Any = lib.kmig_vcpu_run_area(self.handle)
        self.run_bytes = run_bytes
        self.xsave_bytes = xsave_bytes
        self._buffers: dict[str, Any] = {}
        self._number: Any = ffi.new("uint64_t *")
        self.native_tsc_khz = self.get_tsc_khz()

    def close(self) -> None:
        """Unmap the run area and close the file descriptor; before the group is closed. Idempotent."""
        if self.fd >= 0:
            lib.kmig_vcpu_destroy(self.handle)
            os.close(self.fd)
            self.fd = -1

    def run(self) -> int:
        """The body of the vCPU's thread, see csrc/api/vcpu.h: RUN_EXIT, RUN_QUIT or RUN_DEBUG. The calling thread
        becomes the vCPU's and takes no signals any more. Raises :class:`HostError` when KVM_RUN fails."""
        return check(lib.kmig_vcpu_run(self.handle), "KVM_RUN")

    def leave(self) -> None:
        """The vCPU's thread will not call :meth:`run` again: a pause no longer waits for it."""
        lib.kmig_vcpu_leave(self.handle)

    @property
    def nr_entries(self) -> int:
        """How often KVM_RUN was entered: 0 proves that this vCPU has never run."""
        return int(lib.kmig_vcpu_nr_entries(self.handle))

    def get_packed(self, name: str) -> bytes:
        """The bytes of ``struct kvm_<name>`` as the kernel has it now."""
        buffer = self._buffers.get(name)
        if buffer is None:
            buffer = self._buffers[name] = ffi.new(f"struct kvm_{name} *")
        check(lib.kmig_ioctl(self.fd, REQUESTS[name][0], buffer), f"KVM_GET of {name}")
        return bytes(ffi.buffer(buffer))

    def set_packed(self, name: str, packed: bytes) -> None:
        """Set ``struct kvm_<name>`` from bytes that its layout made."""
        check(lib.kmig_ioctl(self.fd, REQUESTS[name][1], ffi.from_buffer(packed)), f"KVM_SET of {name}")

    def _get(self, name: str) -> dict[str, Value]:
        return layout(name).unpack(self.get_packed(name))

    def _set(self, name: str, value: Value) -> None:
        self.set_packed(name, layout(name).pack(value, f"vcpu{self.id}.{name}"))

    def get_regs(self) -> dict[str, Value]:
        """General registers, ``rip`` and ``rflags``."""
        return self._get("regs")

    def set_regs(self, value: Value) -> None:
        """Set the general registers. Clears a pending exception (so before set_vcpu_events)."""
        self._set("regs", value)

    def get_sregs(self) -> dict[str, Value]:
        """Segments, tables, control registers, EFER, the APIC base and the pending interrupt."""
        return self._get("sregs")

    def set_sregs(self, value: Value) -> None:
        """Set what get_sregs gives; before the local APIC, whose mode is the APIC base's."""
        self._set("sregs", value)

    def get_sregs2(self) -> dict[str, Value]:
        """As get_sregs, with the PDPTRs instead of the pending interrupt (KVM_CAP_SREGS2)."""
        return self._get("sregs2")

    def set_sregs2(self, value: Value) -> None:
        """Set what get_sregs2 gives."""
        self._set("sregs2", value)

    def get_fpu(self) -> dict[str, Value]:
        """The x87 and SSE registers; a part of the XSAVE area."""
        return self._get("fpu")

    def set_fpu(self, value: Value) -> None:
        """Set the x87 and SSE registers. Does not mark them in XSTATE_BV, so that KVM_GET_XSAVE may not show them until
        the guest has run: state is set by set_xsave."""
        self._set("fpu", value)

    def get_xcrs(self) -> dict[str, Value]:
        """The extended control registers: ``nr_xcrs`` of them in ``xcrs``."""
        return self._get("xcrs")

    def set_xcrs(self, value: Value) -> None:
        """Set what get_xcrs gives."""
        self._set("xcrs", value)

    def get_nr_xcrs(self) -> int:
        """How many there are."""
        found = ffi.new("struct kvm_xcrs *")
        check(lib.kmig_ioctl(self.fd, lib.KVM_GET_XCRS, found), "KVM_GET of xcrs")
        return int(found.nr_xcrs)

    def get_debugregs(self) -> dict[str, Value]:
        """The guest's own debug registers."""
        return self._get("debugregs")

    def set_debugregs(self, value: Value) -> None:
        """Set the guest's own debug registers."""
        self._set("debugregs", value)

    def get_lapic(self) -> dict[str, Value]:
        """The local APIC's register page as ``regs``, 1024 bytes; needs an in-kernel irqchip."""
        return self._get("lapic_state")

    def set_lapic(self, value: Value) -> None:
        """Set the local APIC; its timer starts from the current count."""
        self._set("lapic_state", value)

    def get_mp_state(self) -> dict[str, Value]:
        """Whether the vCPU runs, halts or waits for INIT or SIPI. May itself take a pending INIT or SIPI."""
        return self._get("mp_state")

    def set_mp_state(self, value: Value) -> None:
        """Set what get_mp_state gives."""
        self._set("mp_state", value)

    def get_vcpu_events(self) -> dict[str, Value]:
        """Exceptions, interrupts, NMIs and SMIs that are pending or injected, and the interrupt shadow."""
        return self._get("vcpu_events")

    def set_vcpu_events(self, value: Value) -> None:
        """Set what get_vcpu_events gives; after the registers."""
        self._set("vcpu_events", value)

    def get_xsave(self) -> bytes:
        """The XSAVE area, ``xsave_bytes`` long."""
        buffer = self._buffers.get("xsave")
        if buffer is None:
            buffer = self._buffers["xsave"] = ffi.new("char[]", self.xsave_bytes)
        request = lib.KVM_GET_XSAVE2 if self.xsave_bytes > ffi.sizeof("struct kvm_xsave") else lib.KVM_GET_XSAVE
        check(lib.kmig_ioctl(self.fd, request, buffer), "KVM_GET_XSAVE")
        return bytes(ffi.buffer(buffer))

    def set_xsave(self, data: bytes) -> None:
        """Set the XSAVE area; ``data`` is padded with zeros to the size of this host's. Raises :class:`ValueError` when
        it is longer."""
        if len(data) > self.xsave_bytes:
            raise ValueError(f"an XSAVE area of {len(data)} bytes, this host's has {self.xsave_bytes}")
        whole = ffi.from_buffer(data.ljust(self.xsave_bytes, b"\0"))
        check(lib.kmig_ioctl(self.fd, lib.KVM_SET_XSAVE, whole), "KVM_SET_XSAVE")

    def get_msrs(self, indices: Iterable[int]) -> dict[int, int]:
        """Those MSRs of ``indices`` that can be read."""
        return read_msrs(self.fd, indices)

    def readable_msrs(self, indices: Iterable[int]) -> tuple[int, ...]:
        """Which of ``indices`` can be read."""
        return readable_msrs(self.fd, indices)

    def set_msrs(self, values: Mapping[int, int]) -> list[int]:
        """Write MSRs in that order; returns those that the kernel refused."""
        return write_msrs(self.fd, values)

    def get_msr(self, index: int) -> int | None:
        """One MSR, None where it cannot be read."""
        rc = check(lib.kmig_msr_get(self.fd, index, self._number), "KVM_GET_MSRS")
        return int(self._number[0]) if rc else None

    def set_msr(self, index: int, value: int) -> bool:
        """Write one MSR; False when the kernel refused it."""
        return check(lib.kmig_msr_set(self.fd, index, value), "KVM_SET_MSRS") == 1

    def set_cpuid2(self, entries: Sequence[Value]) -> None:
        """Set what CPUID tells the guest; only before the vCPU first runs (the kernel refuses later changes)."""
        checked = entries if isinstance(entries, CheckedCpuid) else CheckedCpuid(entries, f"vcpu{self.id}.cpuid")
        self.set_cpuid2_packed(checked.packed)

    def set_cpuid2_packed(self, packed: bytes) -> None:
        """Set CPUID from what :func:`pack_cpuid` made, and keep in ``cpuid`` what the kernel made of it: that does
        not change any more but for bits that follow the guest's own control registers. Which MSRs there are does."""
        self.cpuid = write_cpuid(self.fd, packed)
        self.image = None

    def offer_cpuid(self) -> None:
        """Remember in ``offered_cpuid`` what the kernel makes of all that the host supports: a backend that runs the
        guest's CPUID instruction natively shows it more than it says that it supports.

        As what it supports, that is asked once per process: setting CPUID takes a quarter as long as making a VM."""
        if not self.host.offered_cpuid:
            self.set_cpuid2_packed(self.host.packed_cpuid)
            # Two machines may be made at once: whoever comes second writes the same.
            self.host.offered_cpuid[:] = self.cpuid
        self.offered_cpuid = self.host.offered_cpuid

    def setup_mce(self, mcg_cap: int) -> None:
        """Give the vCPU machine check banks as ``mcg_cap`` says; resets them."""
        check(lib.kmig_ioctl(self.fd, lib.KVM_X86_SETUP_MCE, ffi.new("__u64 *", mcg_cap)), "KVM_X86_SETUP_MCE")

    def get_tsc_khz(self) -> int:
        """How fast the guest's time stamp counter counts."""
        return check(lib.kmig_ioctl_value(self.fd, lib.KVM_GET_TSC_KHZ, 0), "KVM_GET_TSC_KHZ")

    def set_tsc_khz(self, khz: int) -> None:
        """Make the guest's TSC count at ``khz``; needs KVM_CAP_TSC_CONTROL when that is not the host's."""
        check(lib.kmig_ioctl_value(self.fd, lib.KVM_SET_TSC_KHZ, khz), "KVM_SET_TSC_KHZ")

    @cached_property
    def has_tsc_offset(self) -> bool:
        """Whether the kernel has the attribute KVM_VCPU_TSC_OFFSET (Linux 5.16)."""
        return bool(lib.kmig_tsc_offset(self.fd, lib.KVM_HAS_DEVICE_ATTR, self._number) == 0)

    def get_tsc_offset(self) -> int:
        """Guest TSC minus host TSC, modulo 2**64."""
        check(
            lib.kmig_tsc_offset(self.fd, lib.KVM_GET_DEVICE_ATTR, self._number), "KVM_GET_DEVICE_ATTR of the TSC offset"
        )
        return int(self._number[0])

    def set_tsc_offset(self, offset: int) -> None:
        """Set what get_tsc_offset gives. A backend may take it and change nothing: read the TSC back."""
        self._number[0] = offset
        check(
            lib.kmig_tsc_offset(self.fd, lib.KVM_SET_DEVICE_ATTR, self._number), "KVM_SET_DEVICE_ATTR of the TSC offset"
        )

    def get_nested_state(self, size_bytes: int) -> bytes:
        """The state of nested virtualisation; ``size_bytes`` is what KVM_CAP_NESTED_STATE says."""
        buffer = ffi.new("char[]", size_bytes)
        state = ffi.cast("struct kvm_nested_state *", buffer)
        state.size = size_bytes
        check(lib.kmig_ioctl(self.fd, lib.KVM_GET_NESTED_STATE, buffer), "KVM_GET_NESTED_STATE")
        return bytes(ffi.buffer(buffer, min(size_bytes, state.size)))

    def set_nested_state(self, data: bytes) -> None:
        """Set what get_nested_state gives; between SREGS and the registers."""
        check(lib.kmig_ioctl(self.fd, lib.KVM_SET_NESTED_STATE, ffi.from_buffer(data)), "KVM_SET_NESTED_STATE")

    def interrupt(self, vector: int) -> None:
        """Inject an external interrupt; only without an in-kernel irqchip, when the run area says that it is ready."""
        check(
            lib.kmig_ioctl(self.fd, lib.KVM_INTERRUPT, ffi.new("struct kvm_interrupt *", {"irq": vector})),
            "KVM_INTERRUPT",
        )

    def nmi(self) -> None:
        """Queue a non-maskable interrupt."""
        check(lib.kmig_ioctl_value(self.fd, lib.KVM_NMI, 0), "KVM_NMI")

    def kvmclock_ctrl(self) -> bool:
        """Tell the guest that it was paused, so that its soft-lockup watchdog keeps quiet; just before it runs again.
        False when the guest has no kvmclock (EINVAL)."""
        rc = lib.kmig_ioctl_value(self.fd, lib.KVM_KVMCLOCK_CTRL, 0)
        if rc == -errno.EINVAL:
            return False
        check(rc, "KVM_KVMCLOCK_CTRL")
        return True

    def translate(self, linear_address: int) -> dict[str, Value]:
        """Where the guest's page tables lead: ``physical_address``, ``valid``, ``writeable``, ``usermode``."""
        found = ffi.new("struct kvm_translation *", {"linear_address": linear_address})
        check(lib.kmig_ioctl(self.fd, lib.KVM_TRANSLATE, found), "KVM_TRANSLATE")
        return layout("translation").unpack(ffi.buffer(found))

    def set_guest_debug(self, *, single_step: bool = False, breakpoints: Sequence[tuple[int, str, int]] = ()) -> None:
        """Make the vCPU come back with RUN_DEBUG after every instruction, and at up to four hardware breakpoints.

        A breakpoint is (linear address, kind, length in bytes): kind ``x`` stops before the instruction there
        (length 1), ``w`` after a write, ``rw`` after a read or write; length 1, 2, 4 or 8, and the address a multiple
        of it. Without arguments debugging ends. Raises :class:`ConfigError`. The backend kvm_pvm does this only for
        code that it interprets: what runs natively there (64-bit ring 3) gets the debug exceptions itself, or none."""
        debug = ffi.new("struct kvm_guest_debug *")
        if single_step:
            debug.control |= lib.KVM_GUESTDBG_ENABLE | lib.KVM_GUESTDBG_SINGLESTEP
        if breakpoints:
            debug.control |= lib.KVM_GUESTDBG_ENABLE | lib.KVM_GUESTDBG_USE_HW_BP
            debug.arch.debugreg = debug_registers(breakpoints)
        check(lib.kmig_ioctl(self.fd, lib.KVM_SET_GUEST_DEBUG, debug), "KVM_SET_GUEST_DEBUG")
