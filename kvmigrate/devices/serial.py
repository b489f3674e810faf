"""A 16550A UART at COM1 (National Semiconductor PC16550D data sheet), with both FIFOs, loopback and its interrupt.

The registers are the C core's (csrc/uart.c): most accesses of a guest are answered there and never come here. This is
the side towards the backend. The line has no speed: THRE and TEMT read as one while the backend takes what it is given.
Once it refuses a byte they read as zero until all that waits has left. A guest that looks at LSR before it writes
therefore waits and loses nothing. One that does not look still has a queue of ``TX_QUEUE_BYTES``; beyond that each
write waits ``TX_WAIT_S`` for room and is then lost, as it would be on a real UART. The queue is part of the saved
state, so what was not sent here is sent after a migration, once.

What the guest writes is sent by a thread of the UART's own, which wakes for the first byte after a silence and then
takes what has come meanwhile, so that a log of many lines costs the guest neither a turn of the interpreter nor a write
to the backend for each byte. A pause, the guest's end, and every access that does come here send what waits at once.
That first byte itself is sent by the vCPU, where the backend has a socket: the thread waits for the interpreter, which
after a migration is busy just when somebody listens for the guest's first sign of life.

Received bytes are taken from the backend only when the FIFO has room, so input is never lost either; the only overrun
is the guest's own, in loopback. The character timeout (IIR 0x0c) is raised as soon as bytes wait below the trigger
level. The modem lines read as connected. As in QEMU, OUT2 does not gate the interrupt.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from .._core import ffi, lib
from ..errors import BadField, check
from ..state.section import Fields, Section, Value, pack, require_version, unpack
from ..threads import Thread
from .backends import Backend
from .bus import Device

PORT = 0x3F8
NR_PORTS: int = lib.KMIG_UART_NR_PORTS
IRQ = 4
FIFO_BYTES: int = lib.KMIG_UART_FIFO_BYTES
TX_QUEUE_BYTES: int = lib.KMIG_UART_TX_BYTES
TX_WAIT_S = 0.01
CLOSE_WAIT_S = 1.0
SEND_SLICE_NS = 100_000
"""The least that Linux gives. A sender that is woken beside a vCPU that never sleeps then goes before it, instead of
waiting for up to a scheduler's tick: after a migration for as long as the guest's first sign of life (seen: 4 ms)."""

DATA = 0
FCR_ENABLE, FCR_KEPT = 1, lib.KMIG_UART_FCR_BITS
_NUMBERS: dict[str, int] = {
    "divisor": 0xFFFF,
    "ier": lib.KMIG_UART_IER_BITS,
    "fcr": 0xFF,
    "lcr": 0xFF,
    "mcr": lib.KMIG_UART_MCR_BITS,
    "msr_delta": lib.KMIG_UART_MSR_DELTA_BITS,
    "scr": 0xFF,
}
_TRUTHS = ("overrun", "thre_pending")
_MAP = ffi.typeof("char[]")


class Serial(Device):
    """``irq`` sets the level of the interrupt line; it is called with the UART's lock held and must not block.
    :meth:`connect` takes its place.

    A new UART is paused, so that no input comes to it before its state: :meth:`resume` it before the guest runs.
    """

    name = "serial0"
    item_names = tuple(sorted((*_NUMBERS, *_TRUTHS, "rx", "tx")))

    def __init__(self, irq: Callable[[bool], None], backend: Backend) -> None:
        self._irq = irq
        self._backend = backend
        created = ffi.new("struct kmig_uart **")
        check(lib.kmig_uart_create(created), "making the UART")
        self.handle: Any = ffi.gc(created[0], lib.kmig_uart_destroy)
        self._waiting = ffi.new("uint8_t[]", TX_QUEUE_BYTES)
        self._changed = threading.Condition(threading.Lock())
        """Guards all calls of the backend and those registers that it has a part in."""
        self._level = False
        self._thread: Thread | None = None
        backend.attach(self)

    def start(self) -> None:
        """Start the thread that sends what the guest writes without coming here, before any does: call :meth:`close`.
        """
        lib.kmig_uart_send_to(self.handle, self._backend.socket_fd)
        self._thread = Thread(self._send_forever)
        self._thread.start()

    def connect(self, vm_fd: int) -> None:
        """Let the core drive the line ``IRQ`` of the VM behind ``vm_fd`` instead of calling ``irq``."""
        lib.kmig_uart_connect(self.handle, vm_fd, IRQ)
        self._irq = lambda level: None

    def close(self) -> None:
        """End the thread, before the backend is closed. Idempotent."""
        lib.kmig_uart_quit(self.handle)
        if self._thread is not None:
            self._thread.join()

    # Guest accesses

    def read(self, offset: int, size: int) -> int:
        with self._changed:
            had_room = lib.kmig_uart_room(self.handle)
            value = lib.kmig_uart_read(self.handle, offset)
            self._after_access(had_room)
            return value

    def write(self, offset: int, size: int, value: int) -> None:
        """See :meth:`Device.write`; what the guest wrote before, by the core, goes out first."""
        with self._changed:
            if offset == DATA and lib.kmig_uart_is_full(self.handle):
                self._make_room()
            had_room = lib.kmig_uart_room(self.handle)
            lib.kmig_uart_write(self.handle, offset, value & 0xFF)
            self._send()
            self._after_access(had_room)

    def _make_room(self) -> None:
        """The lock is held and is let go while waiting."""
        self._send()
        self._changed.wait_for(lambda: not lib.kmig_uart_is_full(self.handle), TX_WAIT_S)

    def _after_access(self, had_room: int) -> None:
        if not had_room and lib.kmig_uart_room(self.handle):
            self._backend.wake()
        self._update_irq()

    def _update_irq(self) -> None:
        level = bool(lib.kmig_uart_level(self.handle))
        if level != self._level:
            self._level = level
            self._irq(level)

    # The line

    def _send_forever(self) -> None:
        # A refusal changes nothing but how soon it comes to its turn.
        lib.kmig_thread_slice(SEND_SLICE_NS)
        while lib.kmig_uart_wait(self.handle):
            self.flush()

    def flush(self) -> None:
        """Send what waits, unless the backend refused it before: then its own thread sends it."""
        with self._changed:
            self._send()

    def _send(self) -> None:
        """The same with the lock held."""
        if not lib.kmig_uart_refused(self.handle) and not lib.kmig_uart_paused(self.handle):
            self._offer()

    def _offer(self) -> None:
        """Give the backend what waits, as far as it takes it. The lock is held."""
        size = lib.kmig_uart_waiting(self.handle, self._waiting)
        if not size:
            return
        data = bytes(ffi.buffer(self._waiting, size))
        if sent := lib.kmig_uart_ahead(self.handle):
            self._backend.was_sent(data[:sent])
        while sent < size and (taken := self._backend.write(data[sent:])):
            sent += taken
        lib.kmig_uart_sent(self.handle, sent, sent < size)
        if sent < size:
            self._backend.wake()
        self._update_irq()
        self._changed.notify_all()

    def _nr_waiting(self) -> int:
        return lib.kmig_uart_waiting(self.handle, self._waiting)

    # The backend's side, called by its thread

    def rx_wanted(self) -> bool:
        """Whether a received byte could be taken now."""
        return bool(lib.kmig_uart_room(self.handle))

    def tx_waiting(self) -> bool:
        """Whether bytes wait until the backend can take them."""
        return bool(lib.kmig_uart_refused(self.handle)) and not lib.kmig_uart_paused(self.handle)

    def fill(self, read: Callable[[int], bytes]) -> None:
        """Take what ``read(most)`` returns without blocking; called only while there is room for ``most`` bytes."""
        with self._changed:
            # The guest can only make more room without the lock.
            if room := lib.kmig_uart_room(self.handle):
                data = read(room)
                lib.kmig_uart_receive(self.handle, data, len(data))
                self._update_irq()

    def drain(self) -> None:
        """Send what waits, as far as the backend takes it, also what it refused before."""
        with self._changed:
            if not lib.kmig_uart_paused(self.handle):
                self._offer()

    # State

    def pause(self) -> None:
        """See :meth:`Device.pause`; what the backend takes at once is sent before."""
        with self._changed:
            self._send()
            lib.kmig_uart_pause(self.handle)

    def resume(self) -> None:
        """See :meth:`Device.resume`; what waits in the transmit queue is sent from now on."""
        with self._changed:
            lib.kmig_uart_resume(self.handle)
            self._level = bool(lib.kmig_uart_level(self.handle))
            self._irq(self._level)
        # Not every backend has a thread that would.
        self.drain()
        self._backend.wake()

    def reset(self) -> None:
        """See :meth:`Device.reset`. What the guest had sent is on the line: its last words before a reboot come out."""
        with self._changed:
            lib.kmig_uart_reset(self.handle)
            self._update_irq()
        self._backend.wake()

    def save(self) -> dict[str, Value]:
        """All registers, both queues; IIR, LSR, MSR's lines and the interrupt's level follow from them."""
        body: dict[str, Value] = unpack(self.packed(), self.name)
        return body

    def packed(self) -> bytes:
        """See :meth:`Device.packed`. The core makes the map of its registers: a guest waits for it, on both sides."""
        out = ffi.new(_MAP, lib.KMIG_UART_MAP_BYTES)
        size_bytes = check(lib.kmig_uart_pack(self.handle, out, lib.KMIG_UART_MAP_BYTES), "the UART as msgpack")
        return bytes(ffi.buffer(out, size_bytes))

    def load(self, body: Value) -> None:
        """See :meth:`Device.load`. The interrupt line is driven by :meth:`resume`, not here."""
        check(self._take(pack(_checked(body, self.name))), "loading the UART")

    def load_section(self, section: Section) -> None:
        """See :meth:`Device.load_section`. The core takes the map as it came; of one that it does not take,
        :meth:`load` says what is wrong."""
        require_version(section, self.version)
        if self._take(section.packed):
            self.load(section.body)

    def _take(self, packed: bytes) -> int:
        with self._changed:
            return lib.kmig_uart_load(self.handle, packed, len(packed))

    def finish(self) -> None:
        """Wait until what waits is sent, for a bounded time, and pause for good.

        A paused UART sends nothing: what waits in it may have been sent by the machine that took its state over.
        """
        with self._changed:
            self._send()
            self._changed.wait_for(self._is_done, CLOSE_WAIT_S)
            lib.kmig_uart_pause(self.handle)

    def _is_done(self) -> bool:
        return bool(lib.kmig_uart_paused(self.handle)) or not self._nr_waiting()


def _checked(body: Value, where: str) -> dict[str, Value]:
    """``body`` when it is a UART's, by the same rules as csrc/uart_map.c has. Raises :class:`BadField`."""
    fields = Fields(body, where)
    numbers = {name: fields.integer(name, 0, most) for name, most in _NUMBERS.items()}
    truths = {name: fields.boolean(name) for name in _TRUTHS}
    fcr = numbers["fcr"]
    if fcr & ~FCR_KEPT or (fcr and not fcr & FCR_ENABLE):
        raise BadField(f"{where}: fcr is {fcr:#x}: it keeps bits 0xc9 only, and none without bit 0")
    rx = fields.blob("rx", FIFO_BYTES if fcr else 1)
    tx = fields.blob("tx", TX_QUEUE_BYTES)
    fields.done()
    if truths["thre_pending"] and tx:
        raise BadField(f"{where}: thre_pending is set while {len(tx)} bytes wait in tx")
    return {**numbers, **truths, "rx": rx, "tx": tx}
