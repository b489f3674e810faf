"""The UART as a guest sees it, over a real socket."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from kvmigrate._core import lib
from kvmigrate.devices import serial
from kvmigrate.devices.backends import Backend
from kvmigrate.devices.bus import PioBus
from kvmigrate.devices.serial import Serial

from .conftest import Line, wait_until

DATA, IER, IIR, FCR, LCR, MCR, LSR, MSR, SCR = 0, 1, 2, 2, 3, 4, 5, 6, 7
FIFO_ON = 0xC0


def write(line: Line, offset: int, *values: int) -> None:
    for value in values:
        line.uart.write(offset, 1, value)


def read(line: Line, offset: int) -> int:
    return line.uart.read(offset, 1)


def test_a_byte_is_on_the_wire_when_the_write_returns(line: Line) -> None:
    for value in b"heartbeat":
        write(line, DATA, value)
        assert line.there_already() == bytes((value,))
        assert read(line, LSR) == 0x60


def test_thre_interrupt_comes_when_enabled_and_after_each_byte(line: Line) -> None:
    write(line, IER, 0x02)
    assert line.level
    assert read(line, IIR) == 0x02, "THRE is the cause"
    assert not line.level, "reading IIR acknowledges it"
    assert read(line, IIR) == 0x01
    write(line, DATA, 0x41)
    assert line.level


def test_received_data_interrupt_lasts_until_all_is_read(line: Line) -> None:
    write(line, IER, 0x01)
    line.send(b"ab")
    assert line.level and read(line, IIR) == 0x04
    assert read(line, LSR) & 0x01
    assert read(line, DATA) == ord("a")
    wait_until(lambda: bool(read(line, LSR) & 1), "the second byte comes when the first was read")
    assert read(line, DATA) == ord("b")
    assert not line.level and read(line, IIR) == 0x01 and not read(line, LSR) & 0x01


@pytest.mark.parametrize(("trigger", "count"), [(0x00, 1), (0x40, 4), (0x80, 8), (0xC0, 14)])
def test_fifo_trigger_tells_data_from_timeout(line: Line, trigger: int, count: int) -> None:
    write(line, FCR, 0x01 | trigger)
    write(line, IER, 0x01)
    line.send(b"x" * count)
    assert read(line, IIR) == FIFO_ON | 0x04
    read(line, DATA)
    assert read(line, IIR) == FIFO_ON | (0x0C if count > 1 else 0x01)


def test_input_waits_on_the_line_while_the_fifo_is_full(line: Line) -> None:
    text = bytes(range(100))
    write(line, FCR, 0x01)
    line.send(text)
    got = bytearray()
    while len(got) < len(text):
        wait_until(lambda: bool(read(line, LSR) & 1), "more input")
        got.append(read(line, DATA))
    assert got == text
    assert not read(line, LSR) & 0x02, "no overrun"


def test_a_guest_that_looks_at_lsr_loses_nothing_to_a_slow_reader(line: Line) -> None:
    written = line.stuff()
    assert read(line, LSR) & 0x60 == 0
    assert line.received(len(written)) == written
    wait_until(lambda: read(line, LSR) & 0x60 == 0x60, "the line is free again")
    assert line.nothing_more()


def test_thre_interrupt_waits_for_a_slow_reader(line: Line) -> None:
    written = line.stuff()
    write(line, IER, 0x02)
    assert not line.level
    line.received(len(written))
    wait_until(lambda: line.level, "the interrupt comes when the byte has left")
    assert read(line, IIR) == 0x02


def test_a_guest_that_does_not_look_has_a_queue_and_never_waits_long(line: Line) -> None:
    written = line.stuff()
    more = bytes(i % 251 for i in range(serial.TX_QUEUE_BYTES - 1))
    write(line, DATA, *more)
    began = time.monotonic()
    write(line, DATA, 0xEE)
    assert serial.TX_WAIT_S <= time.monotonic() - began < 1.0
    assert line.received(len(written) + len(more)) == written + more
    wait_until(lambda: read(line, LSR) & 0x20 == 0x20, "the queue is empty")
    assert line.nothing_more(), "the byte over the queue's end is lost"


def test_waiting_output_moves_with_the_state_and_is_sent_once(new_line: Callable[[], Line]) -> None:
    source, destination = new_line(), new_line()
    destination.uart.pause()
    written = source.stuff()
    write(source, DATA, *b"in flight")
    source.uart.pause()
    body = source.uart.save()
    destination.uart.load(body)
    sent = len(written) - 1
    assert source.received(sent) == written[:sent]
    assert destination.nothing_more(), "nothing is sent before the guest runs there"
    destination.uart.resume()
    assert destination.received(10) == written[-1:] + b"in flight"
    began = time.monotonic()
    source.backend.close()
    assert time.monotonic() - began < serial.CLOSE_WAIT_S / 2, "a paused UART has nothing to wait for"
    assert source.nothing_more(), "what was handed over is not sent here again"


def test_a_failed_migration_sends_waiting_output_here(line: Line) -> None:
    written = line.stuff()
    line.uart.pause()
    line.uart.save()
    line.uart.resume()
    assert line.received(len(written)) == written


def test_a_paused_uart_takes_no_input(line: Line) -> None:
    line.uart.pause()
    before = line.uart.save()
    line.peer.sendall(b"later")
    time.sleep(0.05)
    assert line.uart.save() == before
    line.uart.resume()
    wait_until(lambda: line.uart.save()["rx"] == b"l", "input comes after resume")


def test_a_new_uart_takes_no_input_before_it_is_resumed() -> None:
    uart = Serial(lambda level: None, Backend())
    uart.fill(lambda most: b"x" * most)
    assert not uart.rx_wanted() and uart.save()["rx"] == b""
    uart.resume()
    assert uart.rx_wanted()


def test_resume_drives_the_interrupt_line_to_its_level(new_line: Callable[[], Line]) -> None:
    source, destination = new_line(), new_line()
    write(source, IER, 0x01)
    source.send(b"q")
    source.uart.pause()
    destination.uart.pause()
    destination.uart.load(source.uart.save())
    assert not destination.levels, "load leaves the line alone: the interrupt chips come with their own state"
    destination.uart.resume()
    assert destination.levels == [True]
    assert read(destination, DATA) == ord("q")
    assert destination.levels == [True, False]


def test_close_sends_what_waits(line: Line) -> None:
    written = line.stuff()
    closing = threading.Thread(target=line.backend.close)
    closing.start()
    assert line.received(len(written)) == written
    closing.join()


def test_loopback_stays_off_the_line(line: Line) -> None:
    write(line, MCR, 0x10)
    write(line, DATA, 0x5A)
    assert read(line, LSR) == 0x61
    assert read(line, DATA) == 0x5A
    assert line.nothing_more()


def test_loopback_overrun_is_told_once_and_interrupts(line: Line) -> None:
    write(line, MCR, 0x10)
    write(line, IER, 0x04)
    write(line, DATA, 1, 2)
    assert line.level and read(line, IIR) == 0x06
    assert read(line, LSR) & 0x02
    assert not read(line, LSR) & 0x02 and not line.level
    assert read(line, DATA) == 1, "the byte that was there first is kept"


def test_input_comes_back_after_loopback(line: Line) -> None:
    write(line, MCR, 0x10)
    line.peer.sendall(b"z")
    time.sleep(0.02)
    assert not read(line, LSR) & 1
    write(line, MCR, 0x08)
    wait_until(lambda: bool(read(line, LSR) & 1), "input")


@pytest.mark.parametrize(("control", "status"), [(0x01, 0x20), (0x02, 0x10), (0x04, 0x40), (0x08, 0x80)])
def test_loopback_joins_modem_control_to_modem_status(line: Line, control: int, status: int) -> None:
    write(line, MCR, 0x10)
    read(line, MSR)
    write(line, IER, 0x08)
    write(line, MCR, 0x10 | control)
    assert read(line, MSR) & 0xF0 == status
    write(line, MCR, 0x10)
    assert line.level and read(line, IIR) == 0x00
    assert read(line, MSR) & 0x0F, "falling, every line is told; ring only then"
    assert not line.level


def test_ring_indicator_tells_only_its_trailing_edge(line: Line) -> None:
    write(line, MCR, 0x10)
    read(line, MSR)
    write(line, MCR, 0x14)
    assert read(line, MSR) == 0x40
    write(line, MCR, 0x10)
    assert read(line, MSR) == 0x04


def test_line_reads_as_connected(line: Line) -> None:
    assert read(line, MSR) == 0xB0


def test_divisor_hides_data_and_interrupt_enable(line: Line) -> None:
    write(line, IER, 0x05)
    write(line, LCR, 0x83)
    write(line, DATA, 0x34)
    write(line, IER, 0x12)
    assert (read(line, DATA), read(line, IER)) == (0x34, 0x12)
    write(line, LCR, 0x03)
    assert read(line, IER) == 0x05
    assert line.nothing_more()


def test_scratch_keeps_what_was_written(line: Line) -> None:
    write(line, SCR, 0xA5)
    assert read(line, SCR) == 0xA5


def test_identification_tells_a_16550a(line: Line) -> None:
    assert read(line, IIR) & FIFO_ON == 0
    write(line, FCR, 0x01)
    assert read(line, IIR) & FIFO_ON == FIFO_ON


def test_fifo_control_clears_what_it_says(line: Line) -> None:
    write(line, FCR, 0x01)
    line.send(b"abc")
    write(line, FCR, 0x03)
    assert not read(line, LSR) & 1


def test_a_wide_access_is_split_into_bytes(line: Line) -> None:
    bus = PioBus()
    bus.add(line.uart, serial.PORT, serial.NR_PORTS)
    bus.write(serial.PORT + LCR, 4, 0x00100003)
    assert bus.read(serial.PORT + LCR, 2) == 0x0003
    assert bus.read(serial.PORT + SCR, 2) >> 8 == 0xFF, "the port behind the last one is absent"


def test_clearing_the_fifo_keeps_what_the_guest_was_told_has_left(line: Line) -> None:
    # Straight to the registers, as the core does: nobody has sent it yet, but THRE and TEMT are one.
    for value in b"said":
        lib.kmig_uart_write(line.uart.handle, DATA, value)
    assert lib.kmig_uart_read(line.uart.handle, LSR) == 0x60
    write(line, FCR, 0x07)
    assert line.received(4) == b"said"


def test_clearing_the_fifo_drops_what_waits_for_a_slow_reader(line: Line) -> None:
    written = line.stuff()
    write(line, DATA, *b"dropped")
    write(line, FCR, 0x04)
    assert line.received(len(written)) == written
    wait_until(lambda: read(line, LSR) & 0x60 == 0x60, "the line is free again")
    assert line.nothing_more()


def test_the_state_of_a_running_uart_can_be_loaded(new_line: Callable[[], Line]) -> None:
    source, destination = new_line(), new_line()
    # Nobody has sent it yet, and the guest may write more.
    for value in b"said":
        lib.kmig_uart_write(source.uart.handle, DATA, value)
    destination.uart.pause()
    destination.uart.load(source.uart.save())
    destination.uart.resume()
    assert destination.received(4) == b"said"


def test_reset_goes_back_to_power_on(line: Line) -> None:
    fresh = line.uart.save()
    write(line, FCR, 0xC1)
    write(line, IER, 0x0F)
    write(line, MCR, 0x1F)
    line.uart.reset()
    assert line.uart.save() == fresh and not line.level


def test_what_waited_is_sent_also_where_the_backend_has_no_thread(line: Line) -> None:
    line.stuff()
    line.uart.write(0, 1, 0x21)
    line.uart.pause()
    saved = line.uart.save()
    assert saved["tx"]
    uart = Serial(lambda level: None, Backend())
    uart.load(saved)
    uart.resume()
    assert uart.save()["tx"] == b""
    assert uart.read(5, 1) & 0x60 == 0x60
