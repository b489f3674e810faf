"""The i8042 keyboard controller (IBM PS/2 Technical Reference, "Keyboard and Auxiliary Device Controller"), bare.

Nothing is plugged into it: it is enough for a guest to test it, to set A20 through it, and to reset the machine
(command 0xfe). An answer waits at port 0x60, one at a time, with OBF set in the status at port 0x64; there is no
interrupt, as there is no key to press. Bytes for a keyboard or a mouse vanish: a guest that probes for one finds none.
"""

from __future__ import annotations

from ..errors import BadField
from ..state.section import Fields, Value
from .bus import Device
from .end import EndCallback, GuestEnd

DATA_PORT, COMMAND_PORT = 0x60, 0x64
DATA_OFFSET, COMMAND_OFFSET = 0, COMMAND_PORT - DATA_PORT
STATUS_OBF, STATUS_SYSTEM, STATUS_COMMAND, STATUS_UNLOCKED = 1 << 0, 1 << 2, 1 << 3, 1 << 4
READ_MODE, WRITE_MODE = 0x20, 0x60
DISABLE_AUX, ENABLE_AUX, TEST_AUX, SELF_TEST, TEST_KEYBOARD, DISABLE_KEYBOARD, ENABLE_KEYBOARD = (
    0xA7, 0xA8, 0xA9, 0xAA, 0xAB, 0xAD, 0xAE,
)  # fmt: skip
READ_OUTPUT, WRITE_OUTPUT, WRITE_AUX = 0xD0, 0xD1, 0xD4
PULSE = 0xF0
MODE_SYSTEM, MODE_NO_KEYBOARD, MODE_NO_AUX = 1 << 2, 1 << 4, 1 << 5
OUTPUT_NOT_RESET, OUTPUT_A20 = 1 << 0, 1 << 1
TAKES_DATA = frozenset({WRITE_MODE, WRITE_OUTPUT, WRITE_AUX})
ANSWERS = {SELF_TEST: 0x55, TEST_KEYBOARD: 0x00, TEST_AUX: 0x00}
MODE_CHANGES = {
    DISABLE_AUX: (0, MODE_NO_AUX),
    ENABLE_AUX: (MODE_NO_AUX, 0),
    DISABLE_KEYBOARD: (0, MODE_NO_KEYBOARD),
    ENABLE_KEYBOARD: (MODE_NO_KEYBOARD, 0),
}


class I8042(Device):
    """``mode`` is the controller command byte, ``output`` the output port, ``pending`` the command that waits for its
    data byte or 0, ``answer`` at most one byte that waits at port 0x60. The ports
    between 0x60 and 0x64 are not its own and read all ones."""

    name = "i8042"

    def __init__(self, end: EndCallback) -> None:
        self._end = end
        self._power_on()

    def _power_on(self) -> None:
        self._mode = MODE_SYSTEM | MODE_NO_AUX
        self._output = OUTPUT_NOT_RESET | OUTPUT_A20
        self._pending = 0
        self._last_was_command = False
        self._answer = b""
        self._last_data = 0

    def read(self, offset: int, size: int) -> int:
        return {DATA_OFFSET: self._read_data, COMMAND_OFFSET: self._read_status}.get(offset, self._absent)()

    def write(self, offset: int, size: int, value: int) -> None:
        """A command (port 0x64) or a byte of data (port 0x60)."""
        if offset == COMMAND_OFFSET:
            self._last_was_command = True
            self._command(value & 0xFF)
        elif offset == DATA_OFFSET:
            self._last_was_command = False
            self._take_data(value & 0xFF)

    def _absent(self) -> int:
        return 0xFF

    def _read_status(self) -> int:
        return (
            STATUS_UNLOCKED
            | (STATUS_OBF if self._answer else 0)
            | (STATUS_SYSTEM if self._mode & MODE_SYSTEM else 0)
            | (STATUS_COMMAND if self._last_was_command else 0)
        )

    def _read_data(self) -> int:
        if self._answer:
            self._last_data = self._answer[0]
            self._answer = b""
        return self._last_data

    def _command(self, command: int) -> None:
        self._pending = command if command in TAKES_DATA else 0
        if command in ANSWERS:
            self._answer = bytes((ANSWERS[command],))
        elif command in MODE_CHANGES:
            clear, set_ = MODE_CHANGES[command]
            self._mode = self._mode & ~clear | set_
        elif command == READ_MODE:
            self._answer = bytes((self._mode,))
        elif command == READ_OUTPUT:
            self._answer = bytes((self._output,))
        elif command >= PULSE and not command & OUTPUT_NOT_RESET:
            self._end(GuestEnd.reset("i8042 command 0xfe"))

    def _take_data(self, value: int) -> None:
        command, self._pending = self._pending, 0
        if command == WRITE_MODE:
            self._mode = value
        elif command == WRITE_OUTPUT:
            self._output = value | OUTPUT_NOT_RESET
            if not value & OUTPUT_NOT_RESET:
                self._end(GuestEnd.reset("i8042 output port"))

    def save(self) -> dict[str, Value]:
        """All of the controller; its status follows from it."""
        return {
            "mode": self._mode,
            "output": self._output,
            "pending": self._pending,
            "last_was_command": self._last_was_command,
            "last_data": self._last_data,
            "answer": self._answer,
        }

    def load(self, body: Value) -> None:
        """See :meth:`Device.load`. Nothing is taken over before all of it was looked at."""
        fields = Fields(body, self.name)
        mode = fields.integer("mode", 0, 0xFF)
        output = fields.integer("output", 0, 0xFF)
        pending = fields.integer("pending", 0, 0xFF)
        last_was_command = fields.boolean("last_was_command")
        last_data = fields.integer("last_data", 0, 0xFF)
        answer = fields.blob("answer", 1)
        fields.done()
        if pending and (pending not in TAKES_DATA or not last_was_command):
            raise BadField(f"{self.name}: pending is {pending:#x}, which is no command that waits for data now")
        if not output & OUTPUT_NOT_RESET:
            raise BadField(f"{self.name}: output is {output:#x}, but a machine that is being reset is not saved")
        self._mode, self._output, self._pending = mode, output, pending
        self._last_was_command, self._last_data, self._answer = last_was_command, last_data, answer

    def reset(self) -> None:
        self._power_on()
