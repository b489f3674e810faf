"""What of a saved state tells of time passing by itself: two saves of a guest that stands still differ only here."""

from __future__ import annotations

from collections.abc import Mapping

from ..state.section import Value

_CURRENT_COUNT = slice(0x390, 0x394)
VM_CLOCKS = ("clock", "host_tsc", "pit2.channels[].count_load_time")
VCPU_CLOCKS = (
    "msrs.MSR_IA32_TSC",
    "msrs.MSR_IA32_TSC_DEADLINE (but for whether it is armed)",
    "tsc_offset",
    "lapic.regs[0x390:0x394] (the timer's current count)",
)


def without_vm_clocks(body: Mapping[str, Value]) -> dict[str, Value]:
    """A VM's body without VM_CLOCKS."""
    rest = {name: value for name, value in body.items() if name not in ("clock", "host_tsc")}
    channels = [dict(channel) | {"count_load_time": 0} for channel in body["pit2"]["channels"]]
    return rest | {"pit2": body["pit2"] | {"channels": channels}}


def without_vcpu_clocks(body: Mapping[str, Value]) -> dict[str, Value]:
    """A vCPU's body without VCPU_CLOCKS."""
    rest = {name: value for name, value in body.items() if name != "tsc_offset"}
    msrs = {name: value for name, value in body["msrs"].items() if name != "MSR_IA32_TSC"}
    if "MSR_IA32_TSC_DEADLINE" in msrs:
        msrs["MSR_IA32_TSC_DEADLINE"] = int(bool(msrs["MSR_IA32_TSC_DEADLINE"]))
    rest["msrs"] = msrs
    regs = bytearray(body["lapic"]["regs"])
    regs[_CURRENT_COUNT] = bytes(4)
    return rest | {"lapic": {"regs": bytes(regs)}}
