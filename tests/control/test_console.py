"""The console's socket against clients of every kind: late, slow, stuck, many and mad; the UART is the real one."""

from __future__ import annotations

import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvmigrate.control.attached import MAX_BODY_BYTES, Frames, Kind, frame
from kvmigrate.control.console import MAX_CLIENTS, Console
from kvmigrate.control.runtime import listen
from kvmigrate.control.scrollback import KEPT_BYTES, Scrollback
from kvmigrate.devices.backends import Backend, UnixBackend
from kvmigrate.devices.serial import Serial
from kvmigrate.devices.tee import Tee
from kvmigrate.errors import BadField, StreamError, TooLarge, UnexpectedFrame

WAIT_S = 30.0


def wait_until(seen: Callable[[], object], what: str) -> None:
    end = time.monotonic() + WAIT_S
    while not seen():
        assert time.monotonic() < end, f"never: {what}"
        time.sleep(0.002)


class Client:
    """Reads frames, and keeps what they said; what it missed stands as question marks."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        # One with a timeout would not wait where so many wait already.
        self.socket.connect(str(path))
        self.socket.settimeout(WAIT_S)
        self.frames = Frames()
        self.told: list[tuple[Kind, Any]] = []
        self.output = b""
        self.holes: list[tuple[int, int]] = []

    def read(self) -> bool:
        """Take in something; false at the end."""
        data = self.socket.recv(1 << 16)
        for kind, body in self.frames.feed(data):
            if kind is Kind.OUTPUT:
                self.output += body
            elif kind is Kind.SKIPPED:
                self.holes.append((len(self.output), body["bytes"]))
                self.output += b"?" * body["bytes"]
            else:
                self.told.append((kind, body))
        return bool(data)

    def wait_for(self, kind: Kind) -> Any:
        while not (found := [body for told, body in self.told if told is kind]):
            assert self.read(), f"no {kind!r} before the end"
        return found[0]

    def wait_output(self, size: int) -> bytes:
        while len(self.output) < size:
            assert self.read(), f"{len(self.output)} bytes of {size} before the end"
        return self.output


class Vm:
    """A UART, its null back-end, and a console at ``path``; ``early`` is what the guest says before it has one."""

    def __init__(self, path: Path, early: bytes = b"") -> None:
        self.path = path
        self.console = Console("vm")
        tee = Tee(Backend())
        self.uart = Serial(lambda level: None, tee)
        self.clients: list[Client] = []
        if early:
            self.uart.resume()
            self.say(early)
        self.console.adopt(tee)
        self.console.start(listen(path))
        self.uart.resume()

    def connect(self) -> Client:
        self.clients.append(Client(self.path))
        return self.clients[-1]

    def say(self, data: bytes) -> None:
        for value in data:
            self.uart.write(0, 1, value)

    def listen(self, size: int) -> bytes:
        """The next ``size`` bytes that the guest receives."""
        got = bytearray()
        wait_until(lambda: self._take(got) >= size, "input")
        return bytes(got)

    def _take(self, got: bytearray) -> int:
        while self.uart.read(5, 1) & 1:
            got.append(self.uart.read(0, 1))
        return len(got)

    def close(self) -> None:
        self.console.close()
        for client in self.clients:
            client.socket.close()


@pytest.fixture
def vm(tmp_path: Path) -> Iterator[Vm]:
    made = Vm(tmp_path / "vm.tty")
    yield made
    made.close()


def descriptors_open() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def pattern(size: int) -> bytes:
    """Bytes of which each place can be told from its neighbours."""
    return b"".join(number.to_bytes(4) for number in range(size // 4))


def test_its_socket_is_the_users_alone(vm: Vm) -> None:
    assert stat.S_IMODE(vm.path.stat().st_mode) == 0o600


def test_who_comes_late_is_shown_the_last_64_kib(vm: Vm) -> None:
    text = pattern(3 * KEPT_BYTES)
    vm.say(text)
    client = vm.connect()
    assert client.wait_for(Kind.HELLO) == {"name": "vm", "others": 0}
    assert client.wait_output(KEPT_BYTES) == text[-KEPT_BYTES:]
    vm.say(b"now")
    assert client.wait_output(KEPT_BYTES + 3)[-3:] == b"now"


def test_what_the_guest_said_before_its_console_was_there_is_shown_too(tmp_path: Path) -> None:
    """A restored guest runs before the process has loaded what serves it."""
    text = pattern(3 * KEPT_BYTES)
    vm = Vm(tmp_path / "vm.tty", early=text)
    client = vm.connect()
    assert client.wait_output(KEPT_BYTES) == text[-KEPT_BYTES:]
    vm.say(b"now")
    assert client.wait_output(KEPT_BYTES + 3)[-3:] == b"now"
    vm.close()


def test_the_back_end_gets_it_too_and_sets_the_pace(tmp_path: Path) -> None:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "serial"))
    listener.listen()
    tee = Tee(UnixBackend(str(tmp_path / "serial")))
    peer, _ = listener.accept()
    uart, console = Serial(lambda level: None, tee), Console("vm")
    console.adopt(tee)
    console.start(listen(tmp_path / "vm.tty"))
    uart.resume()
    written = 0
    while uart.read(5, 1) & 0x20:
        uart.write(0, 1, written & 0xFF)
        written += 1
    for _ in range(100):
        uart.write(0, 1, 0x78)
    got = b""
    while len(got) < written + 100:
        got += peer.recv(1 << 16)
    client = Client(tmp_path / "vm.tty")
    assert client.wait_output(len(got)) == got
    peer.sendall(b"!")
    wait_until(lambda: uart.read(5, 1) & 1, "input from the back-end")
    assert uart.read(0, 1) == ord("!")
    tee.close()
    console.close()
    for thing in (client.socket, peer, listener):
        thing.close()


def test_a_client_that_does_not_read_never_makes_the_guest_wait_and_learns_what_it_missed(vm: Vm) -> None:
    client = vm.connect()
    client.wait_for(Kind.HELLO)
    text = pattern(1 << 19)
    for at in range(0, len(text), 1 << 12):
        assert vm.uart.read(5, 1) & 0x20
        vm.say(text[at : at + (1 << 12)])
    got = client.wait_output(len(text))
    assert client.holes
    expected = bytearray(text)
    for place, size in client.holes:
        expected[place : place + size] = b"?" * size
    assert got == expected


def test_input_waits_for_the_guest_and_none_of_it_is_lost(vm: Vm) -> None:
    text = pattern(1 << 15)
    vm.uart.write(2, 1, 0xC1)  # FIFOs on
    client = vm.connect()
    writer = threading.Thread(target=client.socket.sendall, args=(text,))
    writer.start()
    wait_until(lambda: len(vm.uart.save()["rx"]) == 16, "a full FIFO")
    assert vm.listen(len(text)) == text
    writer.join()


def test_the_end_of_the_input_is_answered_when_the_guest_has_all_of_it(vm: Vm) -> None:
    client = vm.connect()
    client.wait_for(Kind.HELLO)
    client.socket.sendall(b"last words")
    client.socket.shutdown(socket.SHUT_WR)
    time.sleep(0.1)
    assert client.told == [(Kind.HELLO, {"name": "vm", "others": 0})]
    assert vm.listen(10) == b"last words"
    client.wait_for(Kind.TAKEN)
    vm.say(b"answer")
    assert client.wait_output(6) == b"answer"


def test_what_was_typed_before_leaving_still_reaches_the_guest(vm: Vm) -> None:
    client = vm.connect()
    client.wait_for(Kind.HELLO)
    client.socket.sendall(b"typed and gone")
    client.socket.close()
    time.sleep(0.1)
    assert vm.listen(14) == b"typed and gone"


def test_so_many_and_no_more_are_attached_and_who_leaves_makes_room(vm: Vm) -> None:
    for number in range(MAX_CLIENTS):
        assert vm.connect().wait_for(Kind.HELLO)["others"] == number
    late = vm.connect()
    assert late.wait_for(Kind.REFUSED)["text"] == f"{MAX_CLIENTS} are attached to VM vm already"
    assert not late.read()
    for client in vm.clients[:MAX_CLIENTS]:
        client.socket.sendall(b"typed, and never taken")
        client.socket.close()
    for _ in range(2 * MAX_CLIENTS):
        client = vm.connect()
        client.wait_for(Kind.HELLO)
        client.socket.sendall(b"typed, and never taken")
        client.socket.close()


def test_clients_that_come_and_go_at_once_cost_nothing(vm: Vm) -> None:
    before = descriptors_open()
    for _ in range(200):
        Client(vm.path).socket.close()
    client = vm.connect()
    client.wait_for(Kind.HELLO)
    wait_until(lambda: descriptors_open() <= before + MAX_CLIENTS, "closed descriptors")
    vm.say(b"still here")
    assert client.wait_output(10) == b"still here"


def test_an_idle_console_takes_no_time(vm: Vm) -> None:
    for _ in range(3):
        vm.connect().wait_for(Kind.HELLO)
    vm.clients[0].socket.sendall(b"nobody takes this")
    vm.clients[0].socket.close()
    time.sleep(0.1)
    before = time.process_time()
    time.sleep(0.5)
    assert time.process_time() - before < 0.05


def test_a_held_console_serves_nobody_and_goes_on_afterwards(vm: Vm) -> None:
    client = vm.connect()
    client.wait_for(Kind.HELLO)
    vm.console.hold(True)
    vm.say(b"held")
    late = vm.connect()
    late.socket.settimeout(0.3)
    client.socket.settimeout(0.3)
    for held in (client, late):
        with pytest.raises(TimeoutError):
            held.read()
    for waiting in (client, late):
        waiting.socket.settimeout(WAIT_S)
    vm.console.hold(False)
    assert client.wait_output(4) == b"held"
    assert late.wait_output(4) == b"held"


def test_the_last_word_comes_after_the_last_output_also_to_who_comes_then(vm: Vm) -> None:
    client = vm.connect()
    client.wait_for(Kind.HELLO)
    client.socket.sendall(b"unread")
    wait_until(lambda: vm.uart.save()["rx"], "input")
    vm.uart.pause()
    vm.say(b"")
    vm.console.end(6, "VM vm has moved to tcp://there:1")
    vm.console.end(2, "a second reason")
    said = {"status": 6, "text": "VM vm has moved to tcp://there:1", "undelivered": 5}
    assert client.wait_for(Kind.END) == said
    assert vm.connect().wait_for(Kind.END) == said | {"undelivered": 0}


def test_a_stuck_client_does_not_hold_up_the_end_for_long(vm: Vm) -> None:
    stuck, reader = vm.connect(), vm.connect()
    reader.wait_for(Kind.HELLO)
    thread = threading.Thread(target=lambda: [None for _ in iter(reader.read, False)])
    thread.start()
    vm.say(pattern(3 << 17))
    before = time.monotonic()
    vm.console.end(0, "over")
    vm.console.close()
    assert time.monotonic() - before < 5
    thread.join()
    assert reader.wait_for(Kind.END)["text"] == "over"
    assert stuck.socket.fileno() >= 0


def test_a_console_that_was_never_started_can_be_closed() -> None:
    console = Console("vm")
    console.end(2, "x")
    console.close()
    console.close()


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (b"\x03" + (MAX_BODY_BYTES + 1).to_bytes(4), TooLarge),
        (b"\x63" + bytes(4), UnexpectedFrame),
        (b"\x00" + bytes(4), UnexpectedFrame),
        (frame(Kind.END, b"[]"), BadField),
        (frame(Kind.HELLO, b"{"), BadField),
        (frame(Kind.HELLO, b"\xff"), BadField),
    ],
)
def test_frames_that_no_vm_sends_are_refused(data: bytes, error: type[StreamError]) -> None:
    with pytest.raises(error):
        list(Frames().feed(data))


def test_frames_come_out_of_any_pieces() -> None:
    data = frame(Kind.HELLO, {"name": "x"}) + frame(Kind.OUTPUT, b"abc") + frame(Kind.TAKEN, {})
    frames = Frames()
    found = [item for at in range(len(data)) for item in frames.feed(data[at : at + 1])]
    assert found == [(Kind.HELLO, {"name": "x"}), (Kind.OUTPUT, b"abc"), (Kind.TAKEN, {})]


def test_the_scrollback_says_how_much_is_gone() -> None:
    scrollback = Scrollback()
    text = pattern(3 * KEPT_BYTES)
    for at in range(0, len(text), 1000):
        scrollback.append(text[at : at + 1000])
    lost, data = scrollback.read(0, 1 << 30)
    assert KEPT_BYTES <= len(data) <= 2 * KEPT_BYTES
    assert lost == len(text) - len(data)
    assert text.endswith(data)
    assert scrollback.read(scrollback.end, 10) == (0, b"")
