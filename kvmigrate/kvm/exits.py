"""Why a vCPU came back: I/O for a device, or something that stops the guest and is told by its name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .._core import ffi, lib
from ..record import dataclass

EXIT_IO: int = lib.KVM_EXIT_IO
EXIT_MMIO: int = lib.KVM_EXIT_MMIO
EXIT_HLT: int = lib.KVM_EXIT_HLT
EXIT_SHUTDOWN: int = lib.KVM_EXIT_SHUTDOWN
EXIT_SYSTEM_EVENT: int = lib.KVM_EXIT_SYSTEM_EVENT
EXIT_DEBUG: int = lib.KVM_EXIT_DEBUG
EXIT_IRQ_WINDOW_OPEN: int = lib.KVM_EXIT_IRQ_WINDOW_OPEN

SYSTEM_EVENT_SHUTDOWN: int = lib.KVM_SYSTEM_EVENT_SHUTDOWN
SYSTEM_EVENT_RESET: int = lib.KVM_SYSTEM_EVENT_RESET

_SYSTEM_EVENTS = {
    lib.KVM_SYSTEM_EVENT_SHUTDOWN: "SHUTDOWN",
    lib.KVM_SYSTEM_EVENT_RESET: "RESET",
    lib.KVM_SYSTEM_EVENT_CRASH: "CRASH",
    lib.KVM_SYSTEM_EVENT_WAKEUP: "WAKEUP",
    lib.KVM_SYSTEM_EVENT_SUSPEND: "SUSPEND",
    lib.KVM_SYSTEM_EVENT_SEV_TERM: "SEV_TERM",
}
_SUB_ERRORS = {
    lib.KVM_INTERNAL_ERROR_EMULATION: "EMULATION: KVM met an instruction that it cannot emulate",
    lib.KVM_INTERNAL_ERROR_SIMUL_EX: "SIMUL_EX: an exception while another was being delivered",
    lib.KVM_INTERNAL_ERROR_DELIVERY_EV: "DELIVERY_EV: an exit while an event was being delivered",
    lib.KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON: "UNEXPECTED_EXIT_REASON: the CPU gave a reason unknown to KVM",
}
_MSR_REASONS = {
    lib.KVM_MSR_EXIT_REASON_INVAL: "invalid",
    lib.KVM_MSR_EXIT_REASON_UNKNOWN: "unknown to KVM",
    lib.KVM_MSR_EXIT_REASON_FILTER: "filtered",
}


@dataclass(frozen=True, slots=True)
class IoExit:
    """KVM_EXIT_IO: ``count`` accesses of ``size`` bytes to ``port``, one after another (more than one in string I/O).

    ``data`` is the kernel's own buffer of ``size`` × ``count`` bytes: read it for an OUT (``is_write``), fill it for an
    IN. It is valid until the vCPU runs again, which is also what completes the access.
    """

    port: int
    size: int
    is_write: bool
    count: int
    data: memoryview


@dataclass(frozen=True, slots=True)
class MmioExit:
    """KVM_EXIT_MMIO: one access of ``len(data)`` bytes at guest physical address ``gpa``; ``data`` as in IoExit."""

    gpa: int
    is_write: bool
    data: memoryview


def io_exit(run_area: Any, run_bytes: int) -> IoExit:
    """Decode a KVM_EXIT_IO. ``run_bytes`` is the size of the mapped run area, which ``data`` lies in."""
    io = run_area.io
    start = int(io.data_offset)
    nr_bytes = io.size * io.count
    data = memoryview(ffi.buffer(run_area, run_bytes))[start : start + nr_bytes]
    return IoExit(io.port, io.size, io.direction == lib.KVM_EXIT_IO_OUT, io.count, data)


def mmio_exit(run_area: Any) -> MmioExit:
    """Decode a KVM_EXIT_MMIO."""
    mmio = run_area.mmio
    data = memoryview(ffi.buffer(mmio.data))[: mmio.len]
    return MmioExit(mmio.phys_addr, bool(mmio.is_write), data)


def exit_name(exit_reason: int) -> str:
    """The name of an exit reason without KVM_EXIT_, or its number when the headers did not know it."""
    name = lib.kmig_exit_name(exit_reason)
    return f"exit {exit_reason}" if name == ffi.NULL else ffi.string(name).decode()


def describe_exit(run_area: Any) -> str:
    """One line for a person about the exit that the run area holds, with all that the kernel says of it."""
    name = exit_name(run_area.exit_reason)
    describe = _DETAILS.get(run_area.exit_reason)
    return f"{name}: {describe(run_area)}" if describe else name


describe_failure = describe_exit


def _unknown(run: Any) -> str:
    return f"KVM does not know hardware exit reason {run.hw.hardware_exit_reason:#x}"


def _fail_entry(run: Any) -> str:
    entry = run.fail_entry
    reason = int(entry.hardware_entry_failure_reason)
    return f"the CPU refused the guest's state with hardware reason {reason:#x} on host CPU {entry.cpu}"


def _internal_error(run: Any) -> str:
    error = run.internal
    text = _SUB_ERRORS.get(error.suberror, f"sub-error {error.suberror}")
    if error.suberror == lib.KVM_INTERNAL_ERROR_EMULATION:
        return text + _instruction_bytes(run)
    data = " ".join(f"{word:#x}" for word in list(error.data)[: min(error.ndata, 16)])
    return f"{text} ({data})" if data else text


def _instruction_bytes(run: Any) -> str:
    failure = run.emulation_failure
    known = failure.ndata >= 1 and failure.flags & lib.KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES
    if not known:
        return ""
    size = min(failure.insn_size, 15)
    return f" (instruction bytes {bytes(ffi.buffer(failure.insn_bytes))[:size].hex(' ')})"


def _system_event(run: Any) -> str:
    event = run.system_event
    return _SYSTEM_EVENTS.get(event.type, f"type {event.type}")


def _msr(run: Any) -> str:
    reason = ", ".join(text for bit, text in _MSR_REASONS.items() if run.msr.reason & bit)
    what = "reads" if run.exit_reason == lib.KVM_EXIT_X86_RDMSR else f"writes {int(run.msr.data):#x} to"
    return f"the guest {what} MSR {run.msr.index:#x} ({reason or 'no reason given'})"


def _io(run: Any) -> str:
    io = run.io
    what = "OUT to" if io.direction == lib.KVM_EXIT_IO_OUT else "IN from"
    return f"{what} port {io.port:#x}, {io.count} × {io.size} bytes"


def _mmio(run: Any) -> str:
    mmio = run.mmio
    return f"{'write to' if mmio.is_write else 'read of'} {int(mmio.phys_addr):#x}, {mmio.len} bytes"


def _exception(run: Any) -> str:
    return f"exception {run.ex.exception} with error code {run.ex.error_code:#x}"


def _hypercall(run: Any) -> str:
    args = " ".join(f"{int(arg):#x}" for arg in run.hypercall.args)
    return f"number {int(run.hypercall.nr)} ({args})"


def _debug(run: Any) -> str:
    arch = run.debug.arch
    return f"exception {arch.exception} at {int(arch.pc):#x}, DR6 {int(arch.dr6):#x}"


_DETAILS: dict[int, Callable[[Any], str]] = {
    lib.KVM_EXIT_UNKNOWN: _unknown,
    lib.KVM_EXIT_EXCEPTION: _exception,
    lib.KVM_EXIT_IO: _io,
    lib.KVM_EXIT_HYPERCALL: _hypercall,
    lib.KVM_EXIT_DEBUG: _debug,
    lib.KVM_EXIT_MMIO: _mmio,
    lib.KVM_EXIT_SHUTDOWN: lambda run: "triple fault: the guest could not handle a fault and has no way on",
    lib.KVM_EXIT_FAIL_ENTRY: _fail_entry,
    lib.KVM_EXIT_TPR_ACCESS: lambda run: f"at {int(run.tpr_access.rip):#x}",
    lib.KVM_EXIT_INTERNAL_ERROR: _internal_error,
    lib.KVM_EXIT_SYSTEM_EVENT: _system_event,
    lib.KVM_EXIT_IOAPIC_EOI: lambda run: f"vector {run.eoi.vector}",
    lib.KVM_EXIT_X86_RDMSR: _msr,
    lib.KVM_EXIT_X86_WRMSR: _msr,
    lib.KVM_EXIT_NOTIFY: lambda run: f"the guest held the CPU too long, flags {run.notify.flags:#x}",
}
