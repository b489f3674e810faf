"""The parts of a machine and how they are wired: kernel objects, memory, buses, devices and interrupt lines."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..devices import cmos, debug_exit, i8042, port92, power, poweroff, pvpanic, serial
from ..devices.backends import open_backend
from ..devices.bus import Device, MmioBus, PioBus
from ..devices.end import GuestEnd
from ..devices.tee import Tee
from ..kvm.cpuid import compare_cpuid
from ..kvm.system import capability
from ..memory.dirty import LogMode
from ..state.fidelity import Fidelity
from . import spare_vm
from .description import CpuidTable
from .spare_vm import Base
from .specs import VirtioSpec
from .virtio import HOST, Backings, VirtioBus

MCG_CTL_P = 1 << 8
NR_MCE_BANKS = 10
"""As many as QEMU gives. KVM's own default is 32, which makes 88 MSRs more to save and to check in the blackout, and no
guest has ever been told of an error in them."""


class Platform:
    """All parts of one machine, wired and empty: no vCPU has run, no image is loaded.

    ``end`` is told how the guest ends, from a vCPU's thread. Raises :class:`HostError` or :class:`UnsupportedError`
    when the host cannot give a part, with nothing left open.
    """

    def __init__(
        self,
        memory_bytes: int,
        cpuid: Sequence[CpuidTable],
        serial_spec: str,
        end: Callable[[GuestEnd], None],
        virtio: Sequence[VirtioSpec] = (),
        backings: Backings = HOST,
        make_base: Callable[[int], Base] = spare_vm.create,
    ) -> None:
        base = make_base(memory_bytes)
        self.memory, self.vm = base.memory, base.vm
        # Closed after the serial port, which drives a line of the VM to the end.
        self._closers: list[Callable[[], None]] = [self.memory.close, self.vm.close]
        try:
            self.backend, self.serial = self._open_serial(serial_spec)
            self._furnish(base, cpuid)
            # The very same tables where the kernel made no others of them: nobody has to compare them while a guest
            # waits.
            pairs = zip((vcpu.cpuid for vcpu in self.vm.vcpus), cpuid, strict=True)
            self.cpuid: Sequence[CpuidTable] = [held if held == table else table for held, table in pairs]
            self.pio, self.mmio = PioBus(), MmioBus()
            self.devices = self._wire(memory_bytes, end)
            self.virtio = VirtioBus(virtio, self.vm, self.memory, self.mmio, backings)
            self._closers.append(self.virtio.close)
            self.devices.update({device.name: device for device in self.virtio.devices})
        except BaseException:
            self.close()
            raise

    def _open_serial(self, spec: str) -> tuple[Tee, serial.Serial]:
        """Before the VM is furnished, which takes the kernel so long that the port's threads have started when it is:
        they are in the interpreter's way while they do."""
        backend = Tee(open_backend(spec))
        self._closers.append(backend.close)
        port = serial.Serial(lambda level: None, backend)
        self._closers.append(port.close)
        port.start()
        return backend, port

    def _furnish(self, base: Base, cpuid: Sequence[CpuidTable]) -> None:
        vm = base.vm
        # Memory before the interrupt chips, unless those have been there for long, see RESTS_FOR_S.
        if not base.is_attached:
            base.memory.attach(vm.fd)
        if not vm.vcpus:
            spare_vm.furnish(vm)
        mcg_cap = NR_MCE_BANKS | vm.host.mce_capabilities & MCG_CTL_P
        for vcpu_id, table in enumerate(cpuid):
            vcpu = vm.vcpus[vcpu_id] if vcpu_id < len(vm.vcpus) else vm.add_vcpu(vcpu_id)
            # CPUID comes before any access to an MSR: since Linux 6.13 MSRs that CPUID does not announce read as 0.
            vcpu.set_cpuid2(table)
            vcpu.setup_mce(mcg_cap)

    def _wire(self, memory_bytes: int, end: Callable[[GuestEnd], None]) -> dict[str, Device]:
        self.serial.connect(self.vm.fd)
        self.vm.group.answer_uart(serial.PORT, self.serial.handle)
        self.power = power.Power(end, lambda level: self.vm.irq_line(power.IRQ, level))
        parts: list[tuple[Device, int, int]] = [
            (self.serial, serial.PORT, serial.NR_PORTS),
            (cmos.Cmos(memory_bytes, len(self.vm.vcpus)), cmos.PORT, cmos.NR_PORTS),
            # Port 0x61 lies between the controller's two; the kernel's own PIT answers it before it gets here.
            (i8042.I8042(end), i8042.DATA_PORT, i8042.COMMAND_OFFSET + 1),
            (port92.Port92(end), port92.PORT, port92.NR_PORTS),
            (debug_exit.DebugExit(end), debug_exit.PORT, debug_exit.NR_PORTS),
            (poweroff.PowerOff(end), poweroff.PORT, poweroff.NR_PORTS),
            (self.power, power.PORT, power.NR_PORTS),
            (pvpanic.PvPanic(end), pvpanic.PORT, pvpanic.NR_PORTS),
        ]
        for device, port, nr_ports in parts:
            self.pio.add(device, port, nr_ports)
        return {device.name: device for device, _, _ in parts}

    def park(self, timeout_ms: int) -> None:
        """Stop the vCPUs, and what devices do of their own accord. Raises :class:`HostError`."""
        self.vm.group.pause(timeout_ms)
        for device in self.devices.values():
            device.pause()

    def let_go(self) -> None:
        """Let the devices and then the vCPUs run (again)."""
        for device in self.devices.values():
            device.resume()
        for vcpu in self.vm.vcpus:
            # Just before it runs, not at the pause: a guest that was restored would miss it (Firecracker #5494).
            vcpu.kvmclock_ctrl()
        self.vm.group.resume()

    def device_versions(self) -> dict[str, int]:
        """The newest section version that each device reads."""
        return {name: device.version for name, device in self.devices.items()}

    def held_cpuid(self) -> tuple[CpuidTable, ...]:
        """What the kernel made of the CPUID that each vCPU was given."""
        return tuple(vcpu.cpuid for vcpu in self.vm.vcpus)

    def compare_cpuid(self) -> Fidelity:
        """Whether this host has every CPU feature that the vCPUs were given, by name."""
        fidelity = Fidelity()
        for vcpu, table in zip(self.vm.vcpus, self.cpuid, strict=True):
            fidelity.merge(compare_cpuid(table, vcpu.offered_cpuid, f"vcpu{vcpu.id}.cpuid"))
        return fidelity

    @property
    def tsc_khz(self) -> int:
        """How fast the guest's TSC counts here."""
        return self.vm.vcpus[0].get_tsc_khz()

    @property
    def can_scale_tsc(self) -> bool:
        return bool(self.vm.check_extension(capability("TSC_CONTROL")))

    def best_log_mode(self) -> LogMode:
        """CLEAR where the kernel has manual protection, else GET."""
        can = self.vm.check_extension(capability("MANUAL_DIRTY_LOG_PROTECT2"))
        return LogMode.CLEAR if can else LogMode.GET

    def close(self) -> None:
        """Give everything back, memory last: no vCPU may run any more. Idempotent."""
        while self._closers:
            self._closers.pop()()
