"""A 16550A UART at COM1 (National Semiconductor PC16550D data sheet), with both FIFOs, loopback and its interrupt.

The line has no speed: a byte that the guest writes leaves at once, in the vCPU's own thread, when nothing waits before
it. When the backend takes no more, the byte waits in the transmit queue, THRE and TEMT read as zero, and the backend's
thread sends it when it can. A guest that looks at LSR before it writes therefore waits and loses nothing. One that does
not look still has a queue of ``TX_QUEUE_BYTES``; beyond that each write waits ``TX_WAIT_S`` for room and is then lost,
as it would be on a real UART. The queue is part of the saved state, so what was not sent here is sent after a
migration, once.

Received bytes are taken from the backend only when the FIFO has room, so input is never lost either; the only overrun
is the guest's own, in loopback. The character timeout (IIR 0x0c) is raised as soon as bytes wait below the trigger
level. The modem lines read as connected. As in QEMU, OUT2 does not gate the interrupt.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from ..errors import BadField
from ..state.section import Fields, Value
from .backends import Backend
from .bus import Device

PORT = 0x3F8
NR_PORTS = 8
IRQ = 4
FIFO_BYTES = 16
TX_QUEUE_BYTES = 4096
TX_WAIT_S = 0.01
CLOSE_WAIT_S = 1.0

IER_RX, IER_THRE, IER_LINE, IER_MODEM = 1, 2, 4, 8
IIR_NONE, IIR_MODEM, IIR_THRE, IIR_RX, IIR_LINE, IIR_TIMEOUT, IIR_FIFO_ON = 1, 0, 2, 4, 6, 0x0C, 0xC0
FCR_ENABLE, FCR_CLEAR_RX, FCR_CLEAR_TX, FCR_KEPT = 1, 2, 4, 0xC9
LCR_DLAB = 0x80
MCR_DTR, MCR_RTS, MCR_OUT1, MCR_OUT2, MCR_LOOP = 1, 2, 4, 8, 0x10
LSR_DR, LSR_OVERRUN, LSR_THRE, LSR_TEMT = 1, 2, 0x20, 0x40
MSR_CTS, MSR_DSR, MSR_RI, MSR_DCD = 0x10, 0x20, 0x40, 0x80
MSR_CONNECTED = MSR_CTS | MSR_DSR | MSR_DCD
TRIGGER_BYTES = (1, 4, 8, 14)


class Serial(Device):
    """``irq`` sets the level of the interrupt line; it is called with the UART's lock held and must not block.

    A new UART is paused, so that no input comes to it before its state: :meth:`resume` it before the guest runs.
    """

    name = "serial0"

    def __init__(self, irq: Callable[[bool], None], backend: Backend) -> None:
        self._irq = irq
        self._backend = backend
        self._changed = threading.Condition(threading.Lock())
        self._paused = True
        self._level = False
        self._tx = bytearray()
        self._power_on()
        backend.attach(self)

    def _power_on(self) -> None:
        self._divisor = 12
        self._ier = self._fcr = self._lcr = self._scr = self._msr_delta = 0
        self._mcr = MCR_OUT2
        self._overrun = self._thre_pending = False
        self._rx = bytearray()

    # Guest accesses

    def read(self, offset: int, size: int) -> int:
        with self._changed:
            return self._readers[offset](self)

    def write(self, offset: int, size: int, value: int) -> None:
        with self._changed:
            self._writers[offset](self, value & 0xFF)

    def _read_data(self) -> int:
        if self._lcr & LCR_DLAB:
            return self._divisor & 0xFF
        if not self._rx:
            return 0
        was_full = self._rx_room() == 0
        value = self._rx.pop(0)
        self._update_irq()
        if was_full:
            self._backend.wake()
        return value

    def _read_ier(self) -> int:
        return self._divisor >> 8 if self._lcr & LCR_DLAB else self._ier

    def _read_iir(self) -> int:
        cause = self._cause()
        if cause == IIR_THRE:
            self._thre_pending = False
            self._update_irq()
        return cause | (IIR_FIFO_ON if self._fcr & FCR_ENABLE else 0)

    def _read_lcr(self) -> int:
        return self._lcr

    def _read_mcr(self) -> int:
        return self._mcr

    def _read_lsr(self) -> int:
        value = (LSR_DR if self._rx else 0) | (LSR_OVERRUN if self._overrun else 0)
        self._overrun = False
        self._update_irq()
        return value | (0 if self._tx else LSR_THRE | LSR_TEMT)

    def _read_msr(self) -> int:
        value = self._modem_lines() | self._msr_delta
        self._msr_delta = 0
        self._update_irq()
        return value

    def _read_scr(self) -> int:
        return self._scr

    def _write_data(self, value: int) -> None:
        if self._lcr & LCR_DLAB:
            self._divisor = self._divisor & 0xFF00 | value
            return
        self._thre_pending = False
        if self._mcr & MCR_LOOP:
            self._loop_back(value)
        else:
            self._transmit(value)
        self._thre_pending = not self._tx
        self._update_irq()

    def _write_ier(self, value: int) -> None:
        if self._lcr & LCR_DLAB:
            self._divisor = self._divisor & 0xFF | value << 8
            return
        turned_on = value & ~self._ier
        self._ier = value & 0x0F
        if turned_on & IER_THRE and not self._tx:
            self._thre_pending = True
        self._update_irq()

    def _write_fcr(self, value: int) -> None:
        toggled = (value ^ self._fcr) & FCR_ENABLE
        if toggled or value & FCR_CLEAR_RX:
            self._rx.clear()
            self._backend.wake()
        if toggled or value & FCR_CLEAR_TX:
            self._thre_pending = self._thre_pending or bool(self._tx)
            self._tx.clear()
        self._fcr = value & FCR_KEPT if value & FCR_ENABLE else 0
        self._update_irq()

    def _write_lcr(self, value: int) -> None:
        self._lcr = value

    def _write_mcr(self, value: int) -> None:
        before = self._modem_lines()
        if self._mcr & ~value & MCR_LOOP:
            self._backend.wake()
        self._mcr = value & 0x1F
        after = self._modem_lines()
        changed = before ^ after
        self._msr_delta |= changed >> 4 & 0x0B | (before & ~after & MSR_RI) >> 4
        self._update_irq()

    def _ignore(self, value: int) -> None:
        pass

    def _write_scr(self, value: int) -> None:
        self._scr = value

    _readers = (
        _read_data, _read_ier, _read_iir, _read_lcr, _read_mcr, _read_lsr, _read_msr, _read_scr,
    )  # fmt: skip
    _writers = (
        _write_data, _write_ier, _write_fcr, _write_lcr, _write_mcr, _ignore, _ignore, _write_scr,
    )  # fmt: skip

    # The line

    def _transmit(self, value: int) -> None:
        """Send one byte, or queue it behind the others. The lock is held and is let go while waiting for room."""
        if not self._tx and not self._paused and self._backend.write(bytes((value,))):
            return
        if len(self._tx) >= TX_QUEUE_BYTES and not self._changed.wait_for(
            lambda: len(self._tx) < TX_QUEUE_BYTES, TX_WAIT_S
        ):
            return
        self._tx.append(value)
        if len(self._tx) == 1:
            self._backend.wake()

    def _loop_back(self, value: int) -> None:
        if self._rx_room():
            self._rx.append(value)
        else:
            self._overrun = True

    def _rx_room(self) -> int:
        return (FIFO_BYTES if self._fcr & FCR_ENABLE else 1) - len(self._rx)

    def _wants_input(self) -> bool:
        return not self._paused and not self._mcr & MCR_LOOP and self._rx_room() > 0

    def _modem_lines(self) -> int:
        if not self._mcr & MCR_LOOP:
            return MSR_CONNECTED
        looped = ((MCR_RTS, MSR_CTS), (MCR_DTR, MSR_DSR), (MCR_OUT1, MSR_RI), (MCR_OUT2, MSR_DCD))
        return sum(line for control, line in looped if self._mcr & control)

    def _cause(self) -> int:
        """The pending interrupt of the highest priority, as IIR gives it. Derived, so it is not saved."""
        if self._ier & IER_LINE and self._overrun:
            return IIR_LINE
        if self._ier & IER_RX and self._rx:
            at_trigger = not self._fcr & FCR_ENABLE or len(self._rx) >= TRIGGER_BYTES[self._fcr >> 6]
            return IIR_RX if at_trigger else IIR_TIMEOUT
        if self._ier & IER_THRE and self._thre_pending:
            return IIR_THRE
        if self._ier & IER_MODEM and self._msr_delta:
            return IIR_MODEM
        return IIR_NONE

    def _update_irq(self) -> None:
        level = self._cause() != IIR_NONE
        if level != self._level:
            self._level = level
            self._irq(level)

    # The backend's side, called by its thread

    def rx_wanted(self) -> bool:
        """Whether a received byte could be taken now."""
        with self._changed:
            return self._wants_input()

    def tx_waiting(self) -> bool:
        """Whether bytes wait until the backend can take them."""
        with self._changed:
            return not self._paused and bool(self._tx)

    def fill(self, read: Callable[[int], bytes]) -> None:
        """Take what ``read(most)`` returns without blocking; called only while there is room for ``most`` bytes."""
        with self._changed:
            if self._wants_input():
                self._rx += read(self._rx_room())
                self._update_irq()

    def drain(self) -> None:
        """Send what waits, as far as the backend takes it."""
        with self._changed:
            if self._paused or not self._tx:
                return
            del self._tx[: self._backend.write(bytes(self._tx))]
            self._thre_pending = self._thre_pending or not self._tx
            self._update_irq()
            self._changed.notify_all()

    # State

    def pause(self) -> None:
        with self._changed:
            self._paused = True

    def resume(self) -> None:
        """See :meth:`Device.resume`; what waits in the transmit queue is sent from now on."""
        with self._changed:
            self._paused = False
            # The kernel's interrupt controllers are restored without knowing who drives their pins. Driving a line
            # to the level it has already makes no new edge there.
            self._level = self._cause() != IIR_NONE
            self._irq(self._level)
        # Not every backend has a thread that would.
        self.drain()
        self._backend.wake()

    def reset(self) -> None:
        """See :meth:`Device.reset`. What the guest had sent is on the line: its last words before a reboot come out."""
        with self._changed:
            self._power_on()
            self._update_irq()
        self._backend.wake()

    def save(self) -> dict[str, Value]:
        """All registers, both queues; IIR, LSR, MSR's lines and the interrupt's level follow from them."""
        with self._changed:
            return {
                "divisor": self._divisor,
                "ier": self._ier,
                "fcr": self._fcr,
                "lcr": self._lcr,
                "mcr": self._mcr,
                "msr_delta": self._msr_delta,
                "scr": self._scr,
                "overrun": self._overrun,
                "thre_pending": self._thre_pending,
                "rx": bytes(self._rx),
                "tx": bytes(self._tx),
            }

    def load(self, body: Value) -> None:
        """See :meth:`Device.load`. The interrupt line is driven by :meth:`resume`, not here."""
        fields = Fields(body, self.name)
        divisor = fields.integer("divisor", 0, 0xFFFF)
        ier = fields.integer("ier", 0, 0x0F)
        fcr = fields.integer("fcr", 0, 0xFF)
        lcr = fields.integer("lcr", 0, 0xFF)
        mcr = fields.integer("mcr", 0, 0x1F)
        msr_delta = fields.integer("msr_delta", 0, 0x0F)
        scr = fields.integer("scr", 0, 0xFF)
        overrun = fields.boolean("overrun")
        thre_pending = fields.boolean("thre_pending")
        if fcr & ~FCR_KEPT or (fcr and not fcr & FCR_ENABLE):
            raise BadField(f"{self.name}: fcr is {fcr:#x}: it keeps bits 0xc9 only, and none without bit 0")
        rx = fields.blob("rx", FIFO_BYTES if fcr else 1)
        tx = fields.blob("tx", TX_QUEUE_BYTES)
        fields.done()
        if thre_pending and tx:
            raise BadField(f"{self.name}: thre_pending is set while {len(tx)} bytes wait in tx")
        with self._changed:
            self._divisor, self._ier, self._fcr, self._lcr = divisor, ier, fcr, lcr
            self._mcr, self._msr_delta, self._scr = mcr, msr_delta, scr
            self._overrun, self._thre_pending = overrun, thre_pending
            self._rx, self._tx = bytearray(rx), bytearray(tx)

    def finish(self) -> None:
        """Wait until what waits is sent, for a bounded time, and pause for good.

        A paused UART sends nothing: what waits in it may have been sent by the machine that took its state over.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._paused or not self._tx, CLOSE_WAIT_S)
            self._paused = True
