"""A guest of a few instructions in ring 3 of long mode, for the dirty log: it writes where the test tells it to.

Its page tables map one virtual window of up to 512 pages to any page frames, so that one short loop reaches both ends
of every slot. Accessed and dirty bits are set from the start: the guest's page walks write nothing of their own.
"""

from __future__ import annotations

import struct
import subprocess
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from kvmigrate.config import PAGE_BYTES
from kvmigrate.kvm.system import System
from kvmigrate.kvm.vcpu import RUN_QUIT
from kvmigrate.memory.region import GuestMemory

PAGE_TABLES, CODE, LEDGER = 0x1000, 0x8000, 0x9000
"""Guest physical addresses: five pages of tables, the code, and the ledger (512 words)."""
OWN_GFNS = range(PAGE_TABLES // PAGE_BYTES, LEDGER // PAGE_BYTES + 1)
TEXT_VA, WINDOW_VA = 0x0, 1 << 30
PRESENT_USER_WRITE_ACCESSED_DIRTY = 0x67

# rdi: the window, rsi: the ledger, rbp: the number of the window's last page (a power of two less one), rbx: the last
# sequence number, r8: the state of a xorshift generator, rdx: how long to idle after each write. Each turn writes the
# next number to the ledger and to a page.
SCRIBBLE = """
    mov %r8, %rax
    shl $13, %rax
    xor %rax, %r8
    mov %r8, %rax
    shr $7, %rax
    xor %rax, %r8
    mov %r8, %rax
    shl $17, %rax
    xor %rax, %r8
    mov %r8, %rax
    and %rbp, %rax
    inc %rbx
    mov %rbx, (%rsi,%rax,8)
    shl $12, %rax
    mov %rbx, (%rdi,%rax)
"""
IDLE = """
    mov %rdx, %rcx
2:  sub $1, %rcx
    jns 2b
"""
RANDOM_WRITER = f"1: {SCRIBBLE} {IDLE} jmp 1b\n"
# Once through all pages of the window, then out.
SWEEP = """
    xor %rax, %rax
1:  mov %rax, %rcx
    shl $12, %rcx
    mov %rbx, (%rdi,%rcx)
    inc %rax
    cmp %rbp, %rax
    jbe 1b
2:  out %al, $0xf4
    jmp 2b
"""


def assemble(text: str, directory: Path) -> bytes:
    """The machine code of ``text``."""
    object_file, flat = directory / "guest.o", directory / "guest.bin"
    subprocess.run(["as", "--64", "-o", object_file, "-"], input=text.encode(), check=True, timeout=20)
    subprocess.run(["objcopy", "-O", "binary", "-j", ".text", object_file, flat], check=True, timeout=20)
    return flat.read_bytes()


def write_page_tables(memory: GuestMemory, window: Sequence[int]) -> None:
    """Map the low 2 MiB onto themselves, and ``window``, a list of gfns, from WINDOW_VA on."""
    flags = PRESENT_USER_WRITE_ACCESSED_DIRTY
    pml4, pdpt, low, high, table = (PAGE_TABLES + at * PAGE_BYTES for at in range(5))
    memory.write(pml4, struct.pack("<Q", pdpt | flags))
    memory.write(pdpt, struct.pack("<QQ", low | flags, high | flags))
    memory.write(low, struct.pack("<Q", 0x80 | flags))
    memory.write(high, struct.pack("<Q", table | flags))
    memory.write(table, b"".join(struct.pack("<Q", gfn * PAGE_BYTES | flags) for gfn in window))


def segment(selector: int, code: bool) -> dict[str, int]:
    return {
        "base": 0, "limit": 0xFFFFFFFF, "selector": selector, "type": 11 if code else 3, "present": 1, "dpl": 3,
        "db": 0 if code else 1, "s": 1, "l": int(code), "g": 1, "avl": 0, "unusable": 0,
    }  # fmt: skip


class Guest:
    """A VM over ``memory`` with one vCPU that runs ``code`` over the pages of ``window``, in a thread of its own."""

    def __init__(self, memory: GuestMemory, code: bytes, window: Sequence[int], *, idle_turns: int = 0) -> None:
        assert len(window) & (len(window) - 1) == 0, "the random writer needs a power of two"
        self.memory = memory
        self.window = window
        with System.open() as system:
            self.vm = system.create_vm()
            cpuid = system.supported_cpuid()
        self.vm.set_tss_addr()
        memory.attach(self.vm.fd)
        write_page_tables(memory, window)
        memory.write(CODE, code)
        self.vcpu = self.vm.create_vcpu(0)
        self.vcpu.set_cpuid2(cpuid)
        self._enter_long_mode(idle_turns)
        self.out = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run)

    def _enter_long_mode(self, idle_turns: int) -> None:
        sregs = self.vcpu.get_sregs()
        sregs |= {"cr0": 0x80000031, "cr3": PAGE_TABLES, "cr4": 0x20, "efer": 0x500, "cs": segment(0x33, True)}
        sregs |= {name: segment(0x2B, False) for name in ("ds", "es", "ss")}
        self.vcpu.set_sregs(sregs)
        regs = dict.fromkeys(self.vcpu.get_regs(), 0)
        regs |= {"rip": CODE, "rflags": 0x3002, "rdi": WINDOW_VA, "rsi": LEDGER, "rbp": len(self.window) - 1}
        self.vcpu.set_regs(regs | {"rbx": 1, "r8": 88172645463325252, "rdx": idle_turns})

    def _run(self) -> None:
        try:
            while self.vcpu.run() != RUN_QUIT:
                self.out.set()
                self.vm.group.request_pause()
        except BaseException as error:  # the thread has nobody else to tell
            self._error = error
            self.out.set()

    def resume(self) -> None:
        self.vm.group.resume()

    def pause(self) -> None:
        self.vm.group.pause()
        self.check()

    def sweep(self, number: int) -> None:
        """Run SWEEP once with ``number`` and wait for its end."""
        self.vcpu.set_regs(self.vcpu.get_regs() | {"rip": CODE, "rbx": number})
        self.out.clear()
        self.resume()
        assert self.out.wait(20)
        self.pause()

    def wait_for_writes(self, nr_writes: int) -> None:
        """Until the running guest has written ``nr_writes`` more pages."""
        goal = max(self.ledger(self.memory).values()) + nr_writes
        until = time.monotonic() + 20
        while max(self.ledger(self.memory).values()) < goal:
            self.check()
            assert time.monotonic() < until, "the guest does not get on"
            time.sleep(0.001)

    def check(self) -> None:
        if self._error is not None:
            raise self._error

    @property
    def sequence(self) -> int:
        """The last number that was written; the guest must be paused."""
        return int(self.vcpu.get_regs()["rbx"])

    def ledger(self, memory: GuestMemory) -> dict[int, int]:
        """What ``memory``, the guest's or a copy of it, says was written last to each page of the window."""
        return dict(zip(self.window, struct.unpack(f"<{len(self.window)}Q", memory.read(LEDGER, 8 * len(self.window))),
                        strict=True))  # fmt: skip

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.vm.group.quit()
        self._thread.join()
        self.vm.close()
