"""Tiny guests as raw bytes: a VM with 4 MiB of RAM, its vCPUs' threads, and what they did to the outside."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from kvmigrate.kvm import exits
from kvmigrate.kvm.cpuid import guest_cpuid
from kvmigrate.kvm.system import System
from kvmigrate.kvm.vcpu import RUN_DEBUG, RUN_QUIT, Vcpu
from kvmigrate.memory.region import GuestMemory

CODE = 0x1000
TABLES = 0x2000
GDT = 0x8000
TSS = 0x9000
STACK = 0x7000
MEMORY_BYTES = 4 << 20
TIMER_VECTOR = 0x30


class TinyVm:
    """A VM whose vCPU threads hand every exit to ``on_exit``; what that raises is in ``errors`` when they end."""

    def __init__(self, system: System, nr_cpus: int = 1, *, kick: int | None = None, irqchip: bool = True) -> None:
        self.vm = system.create_vm()
        self.memory = GuestMemory(MEMORY_BYTES)
        self.memory.attach(self.vm.fd)
        self.vm.set_tss_addr()
        self.vm.set_identity_map_addr()
        if irqchip:
            self.vm.create_irqchip()
            self.vm.create_pit()
        for n in range(nr_cpus):
            vcpu = self.vm.create_vcpu(n, kick=kick)
            vcpu.set_cpuid2(guest_cpuid(system.supported_cpuid(), n, nr_cpus))
        self.threads: list[threading.Thread] = []
        self.errors: list[BaseException] = []
        self.out: list[tuple[int, bytes]] = []
        self.ended = threading.Event()
        self.on_exit: Callable[[Vcpu], None] = self.default_exit
        self.on_debug: Callable[[Vcpu], None] = lambda vcpu: None

    @property
    def group(self) -> Any:
        return self.vm.group

    @property
    def cpu(self) -> Vcpu:
        return self.vm.vcpus[0]

    def default_exit(self, vcpu: Vcpu) -> None:
        """Record OUTs, answer INs with 0; a write to port 0xf4 ends the run; anything else is an error."""
        assert vcpu.run_area.exit_reason == exits.EXIT_IO, exits.describe_exit(vcpu.run_area)
        io = exits.io_exit(vcpu.run_area, vcpu.run_bytes)
        if io.is_write:
            self.out.append((io.port, bytes(io.data)))
        if io.port == 0xF4:
            self.ended.set()

    def start(self) -> None:
        """Start the vCPU threads, parked."""
        for vcpu in self.vm.vcpus:
            thread = threading.Thread(target=self._body, args=(vcpu,), daemon=True)
            self.threads.append(thread)
            thread.start()

    def _body(self, vcpu: Vcpu) -> None:
        try:
            while (why := vcpu.run()) != RUN_QUIT:
                (self.on_debug if why == RUN_DEBUG else self.on_exit)(vcpu)
        except BaseException as error:
            self.errors.append(error)
            self.ended.set()
        finally:
            vcpu.leave()

    def run_until_end(self, timeout_s: float = 20.0) -> None:
        """Start, let run until a write to port 0xf4, pause."""
        if not self.threads:
            self.start()
        self.group.resume()
        assert self.ended.wait(timeout_s), "the guest did not come to its end"
        if self.errors:
            raise self.errors[0]
        self.group.pause()

    def close(self) -> None:
        self.group.quit()
        for thread in self.threads:
            thread.join(10)
            assert not thread.is_alive()
        self.vm.close()
        self.memory.close()

    def real_mode(self, code: str, at: int = CODE, vcpu: Vcpu | None = None) -> None:
        """Put ``code`` (hexadecimal) at ``at`` and point a vCPU there, in real mode with flat segments from 0."""
        cpu = vcpu or self.cpu
        self.memory.write(at, bytes.fromhex(code))
        sregs = cpu.get_sregs()
        for name in ("cs", "ds", "es", "ss"):
            sregs[name].update(base=0, selector=0)
        cpu.set_sregs(sregs)
        cpu.set_regs(cpu.get_regs() | {"rip": at, "rflags": 2, "rsp": STACK})

    def long_mode_ring3(self, code: str) -> None:
        """The same in 64-bit ring 3 with IOPL 3: the only mode that runs natively on every backend."""
        self._long_mode(code, ring=3)

    def long_mode_ring0(self, code: str) -> None:
        """The same in 64-bit ring 0."""
        self._long_mode(code, ring=0)

    def _long_mode(self, code: str, ring: int) -> None:
        self.memory.write(CODE, bytes.fromhex(code))
        user = 7
        for table, entry in ((0, TABLES + 0x1000 | user), (1, TABLES + 0x2000 | user), (2, 0x80 | user)):
            self.memory.write(TABLES + 0x1000 * table, entry.to_bytes(8, "little"))
        sregs = self.cpu.get_sregs()
        flat = {"base": 0, "limit": 0xFFFFFFFF, "present": 1, "dpl": ring, "s": 1, "g": 1, "unusable": 0}
        sregs["cs"] |= flat | {"selector": 0x30 | ring, "type": 11, "l": 1, "db": 0}
        for name in ("ds", "es", "fs", "gs", "ss"):
            sregs[name] |= flat | {"selector": 0x28 | ring, "type": 3, "l": 0, "db": 1}
        sregs["tr"] |= {"base": TSS, "limit": 0x67, "selector": 0x40, "type": 11, "present": 1, "s": 0, "unusable": 0}
        sregs["gdt"] = {"base": GDT, "limit": 0x7F}
        sregs |= {"cr0": 0x80000033, "cr3": TABLES, "cr4": 0x620, "efer": 0x501}
        self.cpu.set_sregs(sregs)
        self.cpu.set_regs(self.cpu.get_regs() | {"rip": CODE, "rflags": 0x3002, "rsp": STACK})


@contextmanager
def tiny(nr_cpus: int = 1, *, kick: int | None = None, irqchip: bool = True) -> Iterator[TinyVm]:
    with System.open() as system:
        vm = TinyVm(system, nr_cpus, kick=kick, irqchip=irqchip)
        try:
            yield vm
        finally:
            vm.close()


def wait_until(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    """Wait for what another thread does; fails when it does not."""
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.001)
