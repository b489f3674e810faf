"""What each exit of a vCPU leads to: a device on a bus, or the end of the guest by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..devices.bus import MmioBus, PioBus
from ..devices.end import GuestEnd
from ..kvm import exits
from ..kvm.vcpu import Vcpu


class ExitHandler:
    """Answers exits from the vCPUs' threads, several at once; ``end`` is told when one of them ends the guest."""

    def __init__(self, pio: PioBus, mmio: MmioBus, end: Callable[[GuestEnd], None]) -> None:
        self._pio = pio
        self._mmio = mmio
        self._end = end
        self._handlers: dict[int, Callable[[Vcpu, Any], None]] = {
            exits.EXIT_IO: self._io,
            exits.EXIT_MMIO: self._memory,
            exits.EXIT_SHUTDOWN: self._shutdown,
            exits.EXIT_SYSTEM_EVENT: self._system_event,
        }

    def handle(self, vcpu: Vcpu) -> None:
        """Deal with the exit in the vCPU's run area. An exit that nothing here answers ends the guest with its name:
        going on would let it run with state that it does not have."""
        run = vcpu.run_area
        self._handlers.get(run.exit_reason, self._refuse)(vcpu, run)

    def _io(self, vcpu: Vcpu, run: Any) -> None:
        io = exits.io_exit(run, vcpu.run_bytes)
        for at in range(0, io.size * io.count, io.size):
            if io.is_write:
                self._pio.write(io.port, io.size, int.from_bytes(io.data[at : at + io.size], "little"))
            else:
                io.data[at : at + io.size] = self._pio.read(io.port, io.size).to_bytes(io.size, "little")

    def _memory(self, vcpu: Vcpu, run: Any) -> None:
        access = exits.mmio_exit(run)
        size = len(access.data)
        if access.is_write:
            self._mmio.write(access.gpa, size, int.from_bytes(access.data, "little"))
        else:
            access.data[:] = self._mmio.read(access.gpa, size).to_bytes(size, "little")

    def _shutdown(self, vcpu: Vcpu, run: Any) -> None:
        self._end(GuestEnd.crashed(f"vCPU {vcpu.id} stopped: {exits.describe_exit(run)}"))

    def _system_event(self, vcpu: Vcpu, run: Any) -> None:
        event = run.system_event.type
        if event == exits.SYSTEM_EVENT_SHUTDOWN:
            self._end(GuestEnd.powered_off())
        elif event == exits.SYSTEM_EVENT_RESET:
            self._end(GuestEnd.reset("system event"))
        else:
            self._refuse(vcpu, run)

    def _refuse(self, vcpu: Vcpu, run: Any) -> None:
        regs = vcpu.get_regs()
        self._end(GuestEnd.crashed(f"vCPU {vcpu.id} stopped at {regs['rip']:#x}: {exits.describe_exit(run)}"))
