"""A vCPU that is paused in the middle of string I/O loses nothing, and what its completion writes is logged."""

from __future__ import annotations

import queue
import threading
from typing import Any

import pytest

from kvmigrate._core import ffi, lib
from kvmigrate.kvm import exits
from kvmigrate.kvm.vcpu import Vcpu
from kvmigrate.kvm.vm_state import load_state, save_state
from kvmigrate.memory.dirty import DirtyLog, LogMode

from .tiny import CODE, TinyVm, tiny, wait_until

pytestmark = pytest.mark.kvm

BUFFER, NR_BYTES = 0x40000, 600
# mov ax,0x4000; mov es,ax; xor di,di; mov cx,600; mov dx,0x10; cld; rep insb; then the end
READ_600 = "b80040 8ec0 31ff b95802 ba1000 fc f36c e6f4 f4"
KICKS = pytest.mark.parametrize(
    "kick", [lib.KMIG_KICK_IMMEDIATE_EXIT, lib.KMIG_KICK_SIGNAL_MASK], ids=["immediate_exit", "signal_mask"]
)


class Wire:
    """A device that counts: its n-th byte is n modulo 251. ``stop_at`` makes it wait in the exit that reaches it."""

    def __init__(self, stop_at: int) -> None:
        self.nr_given = 0
        self.stop_at = stop_at
        self.stopped: queue.Queue[int] = queue.Queue()
        self.go_on = threading.Event()

    def plug_into(self, vm: TinyVm) -> None:
        def answer(vcpu: Vcpu) -> None:
            io = exits.io_exit(vcpu.run_area, vcpu.run_bytes)
            if io.is_write:
                vm.default_exit(vcpu)
                return
            size = len(io.data)
            if self.nr_given < self.stop_at <= self.nr_given + size:
                self.stopped.put(size)
                assert self.go_on.wait(10)
            io.data[:] = bytes((self.nr_given + n) % 251 for n in range(size))
            self.nr_given += size

        vm.on_exit = answer


def pause_inside(vm: TinyVm, wire: Wire) -> None:
    """Pause while a thread is in the device's answer; returns when the pause is complete."""
    wire.plug_into(vm)
    vm.start()
    vm.group.resume()
    assert wire.stopped.get(timeout=10) > 0
    pausing = threading.Thread(target=vm.group.pause, args=(10_000,))
    pausing.start()
    pausing.join(0.05)
    assert pausing.is_alive(), "the pause did not wait for the half-done I/O"
    wire.go_on.set()
    pausing.join(10)
    assert not pausing.is_alive()


@KICKS
@pytest.mark.parametrize("stop_at", [1, 2, 100, 599])
def test_string_io_paused_in_the_middle_goes_on_in_another_vm(kick: int, stop_at: int) -> None:
    wire = Wire(stop_at)
    with tiny(kick=kick) as source, tiny(kick=kick) as target:
        source.real_mode(READ_600)
        pause_inside(source, wire)
        given = wire.nr_given
        assert given >= stop_at
        # All that the device gave is in memory and in the registers: none of it is left in the kernel.
        assert source.memory.read(BUFFER, given) == bytes(n % 251 for n in range(given))
        assert NR_BYTES - given <= source.cpu.get_regs()["rcx"] & 0xFFFF <= NR_BYTES
        target.memory.write(0, source.memory.read(0, source.memory.size_bytes))
        vm, vcpus = save_state(source.vm)
        load_state(target.vm, vm, vcpus).require()
        wire.stop_at = NR_BYTES + 1
        wire.plug_into(target)
        target.run_until_end()
        assert wire.nr_given == NR_BYTES
        assert target.memory.read(BUFFER, NR_BYTES + 1) == bytes(n % 251 for n in range(NR_BYTES)) + b"\0"


@KICKS
@pytest.mark.parametrize("mode", LogMode)
def test_what_completing_io_writes_is_in_the_log_after_the_pause(kick: int, mode: LogMode) -> None:
    wire = Wire(1)
    with tiny(kick=kick) as vm:
        vm.real_mode(READ_600)
        log = DirtyLog(vm.memory, mode)
        log.start()
        log.sync()
        slot = vm.memory.handle.slot[0]
        for word in range((vm.memory.slots[0].nr_pages + 63) // 64):
            slot.pending[word] = 0
        pause_inside(vm, wire)
        log.sync()
        page = BUFFER >> 12
        assert slot.pending[page // 64] >> page % 64 & 1
        log.stop()


def test_a_wide_mmio_write_is_complete_after_a_pause() -> None:
    """A write across two pages outside of RAM is two exits: the second comes out of the completion of the first."""
    with tiny() as vm:
        # mov dword [0xffe],0x44332211 with ds where no RAM is, twice over; then a loop
        vm.real_mode("66c706fe0f11223344 ebfe")
        sregs = vm.cpu.get_sregs()
        sregs["ds"].update(base=0x10000000)
        vm.cpu.set_sregs(sregs)
        seen: list[tuple[int, bytes]] = []
        first, go_on = threading.Event(), threading.Event()

        def answer(vcpu: Vcpu) -> None:
            mmio = exits.mmio_exit(vcpu.run_area)
            seen.append((mmio.gpa, bytes(mmio.data)))
            first.set()
            assert go_on.wait(10)

        vm.on_exit = answer
        vm.start()
        vm.group.resume()
        assert first.wait(10)
        vm.group.request_pause()
        go_on.set()
        vm.group.pause(5000)
        assert seen == [(0x10000FFE, b"\x11\x22"), (0x10001000, b"\x33\x44")]
        assert vm.cpu.get_regs()["rip"] == 0x1009


# mov ax,0x4000; mov es,ax; xor di,di; cld; look: mov dx,0x3fd; in al,dx; test al,1; jz look; mov dx,0x3f8; in al,dx;
# stosb; and di,0x7fff; jmp look
COPY_INPUT = "b80040 8ec0 31ff fc bafd03 ec a801 74fb baf803 ec aa 81e7ff7f ebed"
STOSB_AT = CODE + 20


def wait_until_fewer_are_held(uart: Any, nr: int) -> None:
    """Until the guest has taken so many from the receive FIFO that fewer than ``nr`` are left."""
    wait_until(lambda: lib.kmig_uart_room(uart) > 16 - nr)


@KICKS
def test_input_that_the_core_answers_is_never_half_done_after_a_pause(kick: int) -> None:
    """What left the receive FIFO is in the guest's memory, or in AL right before the store."""
    created = ffi.new("struct kmig_uart **")
    assert lib.kmig_uart_create(created) == 0
    uart, nr_given = created[0], 0
    with tiny(kick=kick) as vm:
        lib.kmig_uart_write(uart, 2, 1)
        lib.kmig_uart_resume(uart)
        vm.group.answer_uart(0x3F8, uart)
        vm.real_mode(COPY_INPUT)
        vm.start()
        state = ffi.new("struct kmig_uart_state *")
        for turn in range(100):
            vm.group.resume()
            # With the FIFO never full, no access is anybody's but the core's.
            room = lib.kmig_uart_room(uart) - 1
            lib.kmig_uart_receive(uart, bytes((nr_given + n) & 0xFF for n in range(room)), room)
            nr_given += room
            wait_until_fewer_are_held(uart, turn % 8 + 4)
            vm.group.pause(5000)
            lib.kmig_uart_get(uart, state)
            regs = vm.cpu.get_regs()
            in_al = regs["rip"] == STOSB_AT
            assert regs["rdi"] & 0x7FFF == (nr_given - state.nr_rx - in_al) & 0x7FFF
            if in_al:
                assert regs["rax"] & 0xFF == (nr_given - state.nr_rx - 1) & 0xFF
        assert nr_given > 200 and not vm.errors
    lib.kmig_uart_destroy(uart)
