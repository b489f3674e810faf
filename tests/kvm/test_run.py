"""The run loop: exits, pause and resume, kicks, threads. Real guests on the real /dev/kvm."""

from __future__ import annotations

import errno
import threading
import time
from pathlib import Path

import pytest

from kvmigrate._core import lib
from kvmigrate.errors import HostError
from kvmigrate.kvm import exits
from kvmigrate.kvm.vcpu import RUN_QUIT, Vcpu

from .tiny import CODE, tiny, wait_until

pytestmark = pytest.mark.kvm

KICKS = pytest.mark.parametrize(
    "kick", [lib.KMIG_KICK_IMMEDIATE_EXIT, lib.KMIG_KICK_SIGNAL_MASK], ids=["immediate_exit", "signal_mask"]
)
# mov al,'A'; mov dx,0x3f8; loop: out dx,al; inc al; jmp loop
COUNT_ON_SERIAL = "b041 baf803 ee fec0 ebfb"
# loop: inc ecx; jmp loop
SPIN = "6641 ebfc"
# loop: inc rcx; jmp loop, 64-bit
SPIN64 = "48ffc1 ebfb"


def test_out_reaches_the_device_in_order() -> None:
    with tiny() as vm:
        # out 0x42 to port 0x10, 0x1234 to port 0x12, 0x12345678 to port 0x30, then the end
        vm.real_mode("b042 e610 b83412 e712 66b878563412 66e730 e6f4 f4")
        vm.run_until_end()
        assert vm.out[:3] == [(0x10, b"\x42"), (0x12, b"\x34\x12"), (0x30, b"\x78\x56\x34\x12")]


def test_in_gives_the_guest_what_the_device_answers() -> None:
    with tiny() as vm:
        vm.real_mode("e511 e712 e6f4 f4")

        def answer(vcpu: Vcpu) -> None:
            io = exits.io_exit(vcpu.run_area, vcpu.run_bytes)
            if not io.is_write:
                assert (io.port, io.size, io.count) == (0x11, 2, 1)
                io.data[:] = b"\xcd\xab"
            vm.default_exit(vcpu)

        vm.on_exit = answer
        vm.run_until_end()
        assert (0x12, b"\xcd\xab") in vm.out


def test_string_io_comes_with_its_count() -> None:
    with tiny() as vm:
        # mov di,0x3000; mov cx,24; mov dx,0x10; cld; rep insb; out 0xf4
        vm.real_mode("bf0030 b91800 ba1000 fc f36c e6f4 f4")
        counts: list[int] = []
        sent = iter(range(256))

        def answer(vcpu: Vcpu) -> None:
            io = exits.io_exit(vcpu.run_area, vcpu.run_bytes)
            if not io.is_write:
                counts.append(io.count)
                io.data[:] = bytes(next(sent) for _ in range(io.size * io.count))
            vm.default_exit(vcpu)

        vm.on_exit = answer
        vm.run_until_end()
        assert sum(counts) == 24 and max(counts) > 1
        assert vm.memory.read(0x3000, 25) == bytes(range(24)) + b"\0"


def test_mmio_reads_and_writes_reach_the_device() -> None:
    with tiny() as vm:
        # mov word [0x10],0x55aa; mov ax,[0x20]; out 0x30,ax; then the end. The base of ds lies where no RAM is.
        vm.real_mode("c7061000aa55 a12000 e730 e6f4 f4")
        sregs = vm.cpu.get_sregs()
        sregs["ds"].update(base=0x10000000)
        vm.cpu.set_sregs(sregs)
        seen: list[tuple[int, bytes]] = []

        def answer(vcpu: Vcpu) -> None:
            if vcpu.run_area.exit_reason != exits.EXIT_MMIO:
                vm.default_exit(vcpu)
                return
            mmio = exits.mmio_exit(vcpu.run_area)
            if mmio.is_write:
                seen.append((mmio.gpa, bytes(mmio.data)))
            else:
                mmio.data[:] = b"\x34\x12"

        vm.on_exit = answer
        vm.run_until_end()
        assert seen == [(0x10000010, b"\xaa\x55")] and (0x30, b"\x34\x12") in vm.out


def test_a_group_starts_paused_and_runs_nothing() -> None:
    with tiny(2) as vm:
        vm.real_mode(COUNT_ON_SERIAL)
        vm.start()
        vm.group.pause()
        time.sleep(0.05)
        assert [cpu.nr_entries for cpu in vm.vm.vcpus] == [0, 0] and not vm.out


@KICKS
@pytest.mark.parametrize("code", [COUNT_ON_SERIAL, SPIN], ids=["exits", "no_exits"])
def test_a_paused_guest_stands_still_and_goes_on(kick: int, code: str) -> None:
    with tiny(kick=kick) as vm:
        vm.real_mode(code)
        vm.start()
        progress = []
        for _ in range(100):
            vm.group.resume()
            time.sleep(0.0005)
            vm.group.pause()
            regs, nr_out = vm.cpu.get_regs(), len(vm.out)
            progress.append(nr_out + regs["rcx"])
            time.sleep(0.0005)
            assert vm.cpu.get_regs() == regs and len(vm.out) == nr_out
        assert not vm.errors and progress == sorted(progress) and progress[-1] > progress[0]


@KICKS
def test_a_native_loop_without_exits_is_kicked_out(kick: int) -> None:
    with tiny(kick=kick) as vm:
        vm.long_mode_ring3(SPIN64)
        vm.start()
        seen = 0
        for _ in range(20):
            vm.group.resume()
            wait_until(lambda: vm.cpu.nr_entries > 0)
            time.sleep(0.005)
            vm.group.pause(2000)
            assert vm.cpu.get_regs()["rcx"] >= seen
            seen = vm.cpu.get_regs()["rcx"]
        assert seen > 100_000


@KICKS
def test_quick_pauses_lose_no_wakeup(kick: int) -> None:
    with tiny(2, kick=kick) as vm:
        vm.real_mode(COUNT_ON_SERIAL)
        vm.start()
        for _ in range(1000):
            vm.group.resume()
            vm.group.pause(5000)
        before = len(vm.out)
        vm.group.resume()
        wait_until(lambda: len(vm.out) > before + 10)
        assert not vm.errors


def test_a_pause_waits_for_the_answer_to_an_exit_and_completes_it() -> None:
    with tiny() as vm:
        # mov al,0; in al,0x11; mov [0x3000],al; hlt-free loop
        vm.real_mode("b000 e411 a20030 ebfe")
        in_device, answer_now = threading.Event(), threading.Event()

        def slow(vcpu: Vcpu) -> None:
            io = exits.io_exit(vcpu.run_area, vcpu.run_bytes)
            in_device.set()
            assert answer_now.wait(10)
            io.data[:] = b"\x5a"

        vm.on_exit = slow
        vm.start()
        vm.group.resume()
        assert in_device.wait(10)
        with pytest.raises(HostError) as caught:
            vm.group.pause(50)
        assert caught.value.errno == errno.ETIMEDOUT
        entries = vm.cpu.nr_entries
        answer_now.set()
        vm.group.pause(5000)
        # The IN is complete although nothing after it has run.
        assert vm.cpu.nr_entries == entries + 1
        regs = vm.cpu.get_regs()
        assert regs["rax"] & 0xFF == 0x5A and regs["rip"] == CODE + 4


def test_a_vcpus_own_thread_may_ask_for_a_pause_but_not_wait_for_it() -> None:
    with tiny() as vm:
        vm.real_mode("e610 ebfe")
        refused: list[int] = []

        def stop_here(vcpu: Vcpu) -> None:
            try:
                vm.group.pause(5000)
            except HostError as error:
                refused.append(error.errno)

        vm.on_exit = stop_here
        vm.start()
        vm.group.resume()
        wait_until(lambda: bool(refused))
        vm.group.pause(5000)
        assert refused == [errno.EDEADLK]
        assert vm.cpu.get_regs()["rip"] == CODE + 2


def test_a_vcpu_that_left_is_not_waited_for() -> None:
    with tiny() as vm:
        vm.real_mode("e6f4 f4")

        def fail(vcpu: Vcpu) -> None:
            raise RuntimeError("the device broke")

        vm.on_exit = fail
        vm.start()
        vm.group.resume()
        assert vm.ended.wait(10)
        vm.threads[0].join(10)
        vm.group.pause(1000)
        assert [str(error) for error in vm.errors] == ["the device broke"]


def test_another_thread_may_not_run_an_owned_vcpu() -> None:
    with tiny() as vm:
        vm.real_mode(SPIN)
        vm.start()
        vm.group.resume()
        wait_until(lambda: vm.cpu.nr_entries > 0)
        caught: list[int] = []

        def intrude() -> None:
            try:
                vm.cpu.run()
            except HostError as error:
                caught.append(error.errno)

        other = threading.Thread(target=intrude)
        other.start()
        other.join(10)
        assert caught == [errno.EPERM]


def test_quit_ends_running_and_parked_vcpus_for_ever() -> None:
    with tiny(2) as vm:
        vm.real_mode(SPIN)
        vm.start()
        vm.group.resume()
        vm.group.quit()
        for thread in vm.threads:
            thread.join(10)
            assert not thread.is_alive()
        ends: list[int] = []
        late = threading.Thread(target=lambda: ends.append(vm.cpu.run()))
        late.start()
        late.join(10)
        assert ends == [RUN_QUIT]


@pytest.mark.parametrize("nmi", [False, True], ids=["quiet", "with_pending_nmi"])
def test_an_application_processor_that_waits_for_init_does_not_spin(nmi: bool) -> None:
    with tiny(2) as vm:
        vm.real_mode(SPIN)
        waiting = vm.vm.vcpus[1]
        vm.start()
        if nmi:
            waiting.nmi()
        vm.group.resume()
        time.sleep(0.3)
        # One try a millisecond at most; a busy loop makes tens of thousands.
        assert waiting.nr_entries < 1000
        vm.group.pause(1000)
        assert waiting.get_mp_state() == {"mp_state": lib.KVM_MP_STATE_UNINITIALIZED}


def test_init_and_sipi_start_an_application_processor() -> None:
    with tiny(2) as vm:
        # The second CPU: out 0x77 to port 0x10, then the end. SIPI vector 4 points it to 0x4000.
        vm.memory.write(0x4000, bytes.fromhex("b077 e610 e6f4 fa f4"))
        # The first: write INIT, then SIPI 4 to the ICR at 0xfee00300, through ds with its base there.
        icr = "66c706 0003 {:s}"
        words = [(0x000C4500).to_bytes(4, "little").hex(), (0x000C4604).to_bytes(4, "little").hex()]
        vm.real_mode("".join(icr.format(word) for word in words) + "ebfe")
        sregs = vm.cpu.get_sregs()
        sregs["ds"].update(base=0xFEE00000, limit=0xFFFF)
        vm.cpu.set_sregs(sregs)
        lapic = bytearray(vm.cpu.get_lapic()["regs"])
        lapic[0xF0:0xF4] = (0x1FF).to_bytes(4, "little")
        vm.cpu.set_lapic({"regs": bytes(lapic)})
        vm.run_until_end()
        assert (0x10, b"\x77") in vm.out


def test_a_signal_to_the_process_is_not_taken_by_a_vcpu_thread() -> None:
    with tiny() as vm:
        vm.real_mode(SPIN)
        vm.start()
        vm.group.resume()
        wait_until(lambda: vm.cpu.nr_entries > 0)
        status = Path(f"/proc/self/task/{vm.threads[0].native_id}/status").read_text()
        blocked = int(next(line for line in status.splitlines() if line.startswith("SigBlk")).split()[1], 16)
        for number in (2, 15, 14, 28):
            assert blocked >> (number - 1) & 1
