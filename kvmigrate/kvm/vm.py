"""The file descriptor of one VM: interrupt chips, timers, clock, vCPUs."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from typing import Any

from .._core import ffi, lib
from ..errors import HostError, check
from ..state.section import Value
from .host import Host
from .structs import Layout, layout
from .vcpu import Vcpu, VcpuGroup

PIC_MASTER: int = lib.KVM_IRQCHIP_PIC_MASTER
PIC_SLAVE: int = lib.KVM_IRQCHIP_PIC_SLAVE
IOAPIC: int = lib.KVM_IRQCHIP_IOAPIC
CHIPS = {"pic_master": PIC_MASTER, "pic_slave": PIC_SLAVE, "ioapic": IOAPIC}
"""The chips by the names that they have in the state of a VM."""
_CHIP_LAYOUT = {PIC_MASTER: "pic_state", PIC_SLAVE: "pic_state", IOAPIC: "ioapic_state"}

TSS_ADDR = 0xFFFBD000
"""Three pages for KVM_SET_TSS_ADDR, under the firmware's place, where no RAM of ours lies (KVM api.rst)."""
IDENTITY_MAP_ADDR = 0xFFFBC000
"""One page for KVM_SET_IDENTITY_MAP_ADDR, right below."""


def chip_layout(chip_id: int) -> Layout:
    """How the struct of one of the in-kernel chips lies in memory."""
    return layout(_CHIP_LAYOUT[chip_id])


class Vm:
    """One VM. Every method is one ioctl and raises :class:`HostError` when the kernel refuses it."""

    def __init__(self, fd: int, host: Host) -> None:
        self.fd = fd
        self.host = host
        self.vcpus: list[Vcpu] = []
        self.group = VcpuGroup()
        self.image: Any = None
        """Made by vm_image.py, for itself."""
        self.images_in_use = threading.Lock()
        """Held while the images of the VM and its vCPUs hold somebody's state."""
        self._enable_full_state()

    def _enable_full_state(self) -> None:
        """Without these two, KVM_GET_VCPU_EVENTS hides the payload of a pending exception (the CR2 of a page fault) and
        a pending triple fault (KVM api.rst, KVM_CAP_EXCEPTION_PAYLOAD, KVM_CAP_X86_TRIPLE_FAULT_EVENT)."""
        for number in (lib.KVM_CAP_EXCEPTION_PAYLOAD, lib.KVM_CAP_X86_TRIPLE_FAULT_EVENT):
            if self.check_extension(number):
                self.enable_cap(number, 1)

    def close(self) -> None:
        """Close the vCPUs and the VM; no thread may be in one of them any more. Idempotent."""
        for vcpu in self.vcpus:
            vcpu.close()
        self.group.close()
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> Vm:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def check_extension(self, number: int) -> int:
        """KVM_CHECK_EXTENSION on the VM, whose answer may differ from the system's; ``number`` is a KVM_CAP_…"""
        return check(lib.kmig_ioctl_value(self.fd, lib.KVM_CHECK_EXTENSION, number), "KVM_CHECK_EXTENSION")

    def enable_cap(self, number: int, *args: int) -> None:
        """KVM_ENABLE_CAP on the VM with up to four arguments."""
        cap = ffi.new("struct kvm_enable_cap *", {"cap": number, "args": list(args)})
        check(lib.kmig_ioctl(self.fd, lib.KVM_ENABLE_CAP, cap), f"KVM_ENABLE_CAP {number}")

    def set_tss_addr(self, gpa: int = TSS_ADDR) -> None:
        """Where KVM keeps its three pages for real mode on Intel CPUs."""
        check(lib.kmig_ioctl_value(self.fd, lib.KVM_SET_TSS_ADDR, gpa), "KVM_SET_TSS_ADDR")

    def set_identity_map_addr(self, gpa: int = IDENTITY_MAP_ADDR) -> None:
        """Where KVM keeps its page of identity-mapped page table; before the first vCPU is created."""
        check(
            lib.kmig_ioctl(self.fd, lib.KVM_SET_IDENTITY_MAP_ADDR, ffi.new("__u64 *", gpa)),
            "KVM_SET_IDENTITY_MAP_ADDR",
        )

    def create_irqchip(self) -> None:
        """The in-kernel PICs and IOAPIC, and a local APIC in every vCPU created from now on."""
        check(lib.kmig_ioctl_value(self.fd, lib.KVM_CREATE_IRQCHIP, 0), "KVM_CREATE_IRQCHIP")

    def create_pit(self) -> None:
        """The in-kernel timer, with port 0x61 answered by the kernel too."""
        config = ffi.new("struct kvm_pit_config *", {"flags": lib.KVM_PIT_SPEAKER_DUMMY})
        check(lib.kmig_ioctl(self.fd, lib.KVM_CREATE_PIT2, config), "KVM_CREATE_PIT2")

    def irq_line(self, gsi: int, level: int | bool) -> None:
        """Set the level of an interrupt line of the in-kernel chips."""
        line = ffi.new("struct kvm_irq_level *")
        line.irq = gsi
        line.level = int(level)
        check(lib.kmig_ioctl(self.fd, lib.KVM_IRQ_LINE, line), "KVM_IRQ_LINE")

    def irqfd(self, fd: int, gsi: int) -> None:
        """Let each signal of the eventfd ``fd`` be an edge on the line ``gsi``, until the eventfd is closed."""
        assigned = ffi.new("struct kvm_irqfd *", {"fd": fd, "gsi": gsi})
        check(lib.kmig_ioctl(self.fd, lib.KVM_IRQFD, assigned), f"KVM_IRQFD {gsi}")

    def ioeventfd(self, fd: int, gpa: int, size: int, value: int) -> None:
        """Let each store of ``value``, ``size`` bytes wide, to ``gpa`` signal the eventfd ``fd`` and be no exit."""
        flags = lib.KVM_IOEVENTFD_FLAG_DATAMATCH
        assigned = ffi.new(
            "struct kvm_ioeventfd *", {"datamatch": value, "addr": gpa, "len": size, "fd": fd, "flags": flags}
        )
        check(lib.kmig_ioctl(self.fd, lib.KVM_IOEVENTFD, assigned), f"KVM_IOEVENTFD {gpa:#x}")

    def signal_msi(self, address: int, data: int) -> bool:
        """Deliver a message-signalled interrupt; False when the guest masks it."""
        msi = ffi.new("struct kvm_msi *")
        msi.address_lo, msi.address_hi, msi.data = address & 0xFFFFFFFF, address >> 32, data
        return check(lib.kmig_ioctl(self.fd, lib.KVM_SIGNAL_MSI, msi), "KVM_SIGNAL_MSI") > 0

    def add_vcpu(self, vcpu_id: int, *, kick: int | None = None) -> Vcpu:
        """A new vCPU in this VM's group, which has no CPUID that it could run with: set it before anything else.

        ``kick`` is a KMIG_KICK_…; by default what the kernel can do."""
        fd = check(lib.kmig_ioctl_value(self.fd, lib.KVM_CREATE_VCPU, vcpu_id), "KVM_CREATE_VCPU")
        if kick is None:
            can = self.check_extension(lib.KVM_CAP_IMMEDIATE_EXIT)
            kick = lib.KMIG_KICK_IMMEDIATE_EXIT if can else lib.KMIG_KICK_SIGNAL_MASK
        try:
            vcpu = Vcpu(self.group, fd, vcpu_id, kick, self.xsave_bytes, self.host)
        except HostError:
            os.close(fd)
            raise
        self.vcpus.append(vcpu)
        vcpu.offer_cpuid()
        return vcpu

    def create_vcpu(self, vcpu_id: int, *, cpuid: Sequence[Value] | None = None, kick: int | None = None) -> Vcpu:
        """The same with ``cpuid``, or all that the host supports, as its CPUID."""
        vcpu = self.add_vcpu(vcpu_id, kick=kick)
        if cpuid is None:
            vcpu.set_cpuid2_packed(self.host.packed_cpuid)
        else:
            vcpu.set_cpuid2(cpuid)
        return vcpu

    @property
    def xsave_bytes(self) -> int:
        """Size of a vCPU's XSAVE area. Asked of the VM, since it depends on what the VM's process may use (api.rst)."""
        return self.check_extension(lib.KVM_CAP_XSAVE2) or ffi.sizeof("struct kvm_xsave")

    def get_clock(self) -> dict[str, Value]:
        """kvmclock as KVM_GET_CLOCK gives it: ``clock`` in ns, ``flags``, ``realtime`` in ns, ``host_tsc``."""
        return layout("clock_data").unpack(self._get(lib.KVM_GET_CLOCK, "clock_data"))

    def get_pit2(self) -> dict[str, Value]:
        """The three channels and flags of the in-kernel timer."""
        return layout("pit_state2").unpack(self._get(lib.KVM_GET_PIT2, "pit_state2"))

    def set_pit2(self, value: Value) -> None:
        """Set what :meth:`get_pit2` gives; the channels start to count again from their initial count."""
        self._set(lib.KVM_SET_PIT2, "pit_state2", value, "pit2")

    def get_irqchip(self, chip_id: int) -> dict[str, Value]:
        """One of the in-kernel chips: PIC_MASTER, PIC_SLAVE or IOAPIC."""
        chip = ffi.new("struct kvm_irqchip *", {"chip_id": chip_id})
        check(lib.kmig_ioctl(self.fd, lib.KVM_GET_IRQCHIP, chip), f"KVM_GET_IRQCHIP {chip_id}")
        return chip_layout(chip_id).unpack(ffi.buffer(ffi.addressof(chip.chip)))

    def set_irqchip(self, chip_id: int, value: Value) -> None:
        """Set one of the in-kernel chips."""
        packed = chip_layout(chip_id).pack(value, f"irqchip{chip_id}")
        chip = ffi.new("struct kvm_irqchip *", {"chip_id": chip_id})
        ffi.memmove(ffi.addressof(chip.chip), packed, len(packed))
        check(lib.kmig_ioctl(self.fd, lib.KVM_SET_IRQCHIP, chip), f"KVM_SET_IRQCHIP {chip_id}")

    def _get(self, request: int, name: str) -> Any:
        found = ffi.new(f"struct kvm_{name} *")
        check(lib.kmig_ioctl(self.fd, request, found), f"KVM_GET of {name}")
        return ffi.buffer(found)

    def _set(self, request: int, name: str, value: Value, where: str) -> None:
        packed = ffi.from_buffer(layout(name).pack(value, where))
        check(lib.kmig_ioctl(self.fd, request, packed), f"KVM_SET of {name}")
