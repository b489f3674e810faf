"""The devices that are a few registers, reached as a guest reaches them: over the bus."""

from __future__ import annotations

import pytest

from kvmigrate.devices import debug_exit, i8042, port92, power, poweroff, pvpanic
from kvmigrate.devices.bus import Device, MmioBus, PioBus
from kvmigrate.devices.debug_exit import DebugExit
from kvmigrate.devices.end import GuestEnd
from kvmigrate.devices.i8042 import I8042
from kvmigrate.devices.port92 import Port92
from kvmigrate.devices.power import Power
from kvmigrate.devices.poweroff import PowerOff
from kvmigrate.devices.pvpanic import PvPanic
from kvmigrate.errors import BadField, BadVersion, ConfigError
from kvmigrate.state.section import Section


class Board:
    """All small devices on one bus, and how the guest ended."""

    def __init__(self) -> None:
        self.ends: list[GuestEnd] = []
        self.pio = PioBus()
        self.devices: list[Device] = []
        end = self.ends.append
        self.add(DebugExit(end), (debug_exit.PORT, debug_exit.NR_PORTS))
        self.add(PowerOff(end), (poweroff.PORT, poweroff.NR_PORTS))
        self.levels: list[bool] = []
        self.power = Power(end, self.levels.append)
        self.add(self.power, (power.PORT, power.NR_PORTS))
        self.add(PvPanic(end), (pvpanic.PORT, pvpanic.NR_PORTS))
        self.add(Port92(end), (port92.PORT, port92.NR_PORTS))
        self.add(I8042(end), (i8042.DATA_PORT, 1), (i8042.COMMAND_PORT, 1))

    def add(self, device: Device, *ranges: tuple[int, int]) -> None:
        for port, count in ranges:
            self.pio.add(device, port, count)
        self.devices.append(device)


@pytest.fixture
def board() -> Board:
    return Board()


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize(("code", "status"), [(0, 1), (1, 3), (0x10, 0x21), (0x7F, 0xFF), (0x80, 1), (0xFF, 0xFF)])
def test_debug_exit_status_is_twice_the_code_plus_one(board: Board, size: int, code: int, status: int) -> None:
    board.pio.write(0xF4, size, code)
    assert [(end.kind, end.exit_status) for end in board.ends] == [("debug-exit", status)]
    assert board.pio.read(0xF4, size) == 0


@pytest.mark.parametrize("value", [0x2000, 0x2001, 0x3400, 0xFFFF])
def test_sleep_enable_powers_off(board: Board, value: int) -> None:
    board.pio.write(0x604, 2, value)
    assert board.ends == [GuestEnd.powered_off()]
    assert board.ends[0].exit_status == 0
    assert board.pio.read(0x604, 2) & 0x2001 == 1, "SLP_EN reads as zero, SCI_EN as one"


def test_sleep_enable_in_a_byte_of_its_own_powers_off(board: Board) -> None:
    board.pio.write(0x605, 1, 0x20)
    assert board.ends == [GuestEnd.powered_off()]


def test_power_control_without_sleep_enable_is_kept(board: Board) -> None:
    board.pio.write(0x604, 2, 0x1C00)
    assert (board.pio.read(0x604, 2), board.pio.read(0x605, 1), board.ends) == (0x1C01, 0x1C, [])


@pytest.mark.parametrize("command", [0xFE, 0xF0])
def test_i8042_pulse_of_the_reset_line_resets(board: Board, command: int) -> None:
    board.pio.write(0x64, 1, command)
    assert [(end.kind, end.exit_status) for end in board.ends] == [("reset", 10)]


def test_i8042_pulse_of_other_lines_does_not_reset(board: Board) -> None:
    board.pio.write(0x64, 1, 0xFF)
    assert not board.ends


def test_i8042_output_port_resets_with_bit_0_clear(board: Board) -> None:
    board.pio.write(0x64, 1, 0xD1)
    board.pio.write(0x60, 1, 0xDF)
    assert not board.ends
    board.pio.write(0x64, 1, 0xD1)
    board.pio.write(0x60, 1, 0xDE)
    assert [end.kind for end in board.ends] == ["reset"]


@pytest.mark.parametrize(("command", "answer"), [(0xAA, 0x55), (0xAB, 0x00), (0xA9, 0x00), (0x20, 0x24), (0xD0, 0x03)])
def test_i8042_answers_once_with_its_flag_set(board: Board, command: int, answer: int) -> None:
    assert not board.pio.read(0x64, 1) & 0x01
    board.pio.write(0x64, 1, command)
    assert board.pio.read(0x64, 1) & 0x0B == 0x09, "output full, last write a command, ready for input"
    assert board.pio.read(0x60, 1) == answer
    assert not board.pio.read(0x64, 1) & 0x01


def test_i8042_keeps_its_mode(board: Board) -> None:
    board.pio.write(0x64, 1, 0x60)
    board.pio.write(0x60, 1, 0x47)
    board.pio.write(0x64, 1, 0xAD)
    board.pio.write(0x64, 1, 0x20)
    assert board.pio.read(0x60, 1) == 0x57


def test_ports_between_those_of_the_i8042_are_not_its_own() -> None:
    bus = PioBus()
    bus.add(I8042(lambda end: None), i8042.DATA_PORT, i8042.COMMAND_OFFSET + 1)
    bus.write(0x64, 1, 0xAA)
    bus.write(0x62, 1, 0xAB)
    assert [bus.read(port, 1) for port in (0x61, 0x62, 0x63)] == [0xFF] * 3
    assert bus.read(0x60, 1) == 0x55


def test_i8042_finds_no_keyboard(board: Board) -> None:
    board.pio.write(0x60, 1, 0xFF)
    assert not board.pio.read(0x64, 1) & 0x01


def test_port_92_resets_when_bit_0_is_raised(board: Board) -> None:
    board.pio.write(0x92, 1, 0x02)
    assert (board.pio.read(0x92, 1), board.ends) == (0x02, [])
    board.pio.write(0x92, 1, 0x03)
    assert [end.kind for end in board.ends] == ["reset"]


def test_absent_ports_read_all_ones_and_swallow_writes(board: Board) -> None:
    board.pio.write(0x3000, 4, 0)
    assert [board.pio.read(0x3000, size) for size in (1, 2, 4)] == [0xFF, 0xFFFF, 0xFFFFFFFF]
    assert board.pio.read(0xFFFF, 4) == 0xFFFFFFFF


def test_a_port_taken_twice_is_refused(board: Board) -> None:
    with pytest.raises(ConfigError, match="0x92 belongs to port92"):
        board.pio.add(DebugExit(board.ends.append), 0x90, 4)
    with pytest.raises(ConfigError, match="do not exist"):
        board.pio.add(DebugExit(board.ends.append), 0xFFFE, 4)


class Register(Device):
    """Four bytes that a test looks at."""

    name = "register"

    def __init__(self, max_access_bytes: int) -> None:
        self.max_access_bytes = max_access_bytes
        self.seen: list[tuple[int, int, int]] = []

    def read(self, offset: int, size: int) -> int:
        return int.from_bytes(bytes(range(offset + 1, offset + 1 + size)), "little")

    def write(self, offset: int, size: int, value: int) -> None:
        self.seen.append((offset, size, value))

    def save(self) -> dict[str, int]:
        return {}

    def load(self, body: object) -> None:
        pass

    def reset(self) -> None:
        pass


@pytest.mark.parametrize(
    ("width", "seen"), [(1, [(0, 1, 0xDD), (1, 1, 0xCC), (2, 1, 0xBB), (3, 1, 0xAA)]), (4, [(0, 4, 0xAABBCCDD)])]
)
def test_wide_accesses_reach_a_device_as_it_takes_them(width: int, seen: list[tuple[int, int, int]]) -> None:
    pio, mmio = PioBus(), MmioBus()
    for bus, base in ((pio, 0x100), (mmio, 0xD0000000)):
        device = Register(width)
        bus.add(device, base, 4)
        bus.write(base, 4, 0xAABBCCDD)
        assert device.seen == seen
        assert bus.read(base, 4) == 0x04030201


def test_mmio_outside_of_a_device_reads_all_ones() -> None:
    bus = MmioBus()
    device = Register(8)
    bus.add(device, 0xD0000000, 4)
    assert bus.read(0xD0000003, 2) == 0xFFFF, "crossing the end"
    assert bus.read(0xCFFFFFFF, 2) == 0xFFFF, "crossing the start"
    assert bus.read(0xFEE00000, 8) == 0xFFFFFFFFFFFFFFFF
    bus.write(0xD0000002, 4, 0)
    assert not device.seen


@pytest.mark.parametrize(("gpa", "size"), [(0xD0000FFF, 2), (0xCFFFFFFF, 2), (0xD0000800, 1), (0xC0000000, 0x20000000)])
def test_mmio_overlap_is_refused(gpa: int, size: int) -> None:
    bus = MmioBus()
    bus.add(Register(8), 0xD0000000, 0x1000)
    with pytest.raises(ConfigError, match="overlap"):
        bus.add(Register(8), gpa, size)


BAD: list[tuple[type[Device], dict[str, object]]] = [
    (DebugExit, {"code": 1}),
    (PowerOff, {"control": 0x2001}),
    (PowerOff, {"control": 0}),
    (PowerOff, {"control": 0x10001}),
    (Port92, {"control": 0x100}),
    (I8042, {"answer": b"xx"}),
    (I8042, {"pending": 0x61, "last_was_command": True}),
    (I8042, {"pending": 0x60, "last_was_command": False}),
    (I8042, {"output": 0x02}),
    (I8042, {"mode": 256}),
]


@pytest.mark.parametrize(("kind", "change"), BAD)
def test_bad_state_is_refused_and_changes_nothing(kind: type[Device], change: dict[str, object], board: Board) -> None:
    (device,) = (device for device in board.devices if isinstance(device, kind))
    before = device.save()
    with pytest.raises(BadField, match=device.name):
        device.load(before | change)
    assert device.save() == before


def test_a_newer_section_is_refused(board: Board) -> None:
    for device in board.devices:
        with pytest.raises(BadVersion, match=device.name):
            device.load_section(Section(device.name, device.version + 1, device.save()))
