"""The state comes in two parts, or in one from an older source, and in no other way."""

from __future__ import annotations

import socket
from collections.abc import Callable

import pytest

from kvmigrate.migration import wire
from kvmigrate.state.frame import FrameKind, encode_frame
from kvmigrate.state.section import Section, encode, pack, unpack
from tests.fake_machine import MIB

from .harness import Receiving

Receive = Callable[..., Receiving]
Frames = list[tuple[FrameKind, bytes]]

CONFIG = (FrameKind.CONFIG, pack({"name": "guest", "uuid": "u-1", "memory_bytes": MIB, "slots": [[0, 0, 256]]}))
CPU, SERIAL = (
    (FrameKind.SECTION, encode(Section(name, 1, body)))
    for name, body in (("cpu0", {"rip": 0x1234, "rsp": 0}), ("serial0", {"lcr": 3}))
)
END = (FrameKind.END, wire.End(0, 0, 0, 0, True).to_payload())
PAGES = (FrameKind.PAGES, bytes(16))


def hello(*features: str) -> tuple[FrameKind, bytes]:
    return FrameKind.HELLO, wire.Hello(wire.FORMAT, features, "u-1", 7, "guest").to_payload()


def part(*sections: tuple[FrameKind, bytes], more: bool = False) -> Frames:
    size_bytes = sum(32 + len(payload) for _, payload in sections)
    round_ = wire.Round(1, 0, 0, 0, len(sections), size_bytes, more)
    return [(FrameKind.ROUND, round_.to_payload()), *sections]


FIRST = [hello(wire.PARTS), CONFIG, *part(CPU, more=True)]


def heard(receiving: Receiving, frames: Frames) -> bytes:
    """What the destination says to ``frames`` until it has nothing more to say."""
    said = bytearray()
    with socket.create_connection((receiving.address.host, receiving.address.port)) as sock:
        sock.settimeout(20)
        sock.sendall(b"".join(encode_frame(*frame, number) for number, frame in enumerate(frames)))
        while b"load_us" not in said and (data := sock.recv(1 << 16)):
            said += data
    return bytes(said)


def test_the_second_part_completes_the_first(receive: Receive) -> None:
    receiving = receive()
    assert b"load_us" in heard(receiving, [*FIRST, *part(SERIAL), END])
    assert receiving.machine is not None and receiving.machine.state["cpu0"]["rip"] == 0x1234


def test_a_source_that_knows_of_no_parts_sends_all_at_once(receive: Receive) -> None:
    receiving = receive()
    marker, *sections = part(CPU, SERIAL)
    older = unpack(marker[1], "ROUND")
    del older["more"]
    assert b"load_us" in heard(receiving, [hello(), CONFIG, (FrameKind.ROUND, pack(older)), *sections, END])
    assert receiving.machine is not None and receiving.machine.state["cpu0"]["rip"] == 0x1234


@pytest.mark.parametrize(
    ("frames", "why"),
    [
        ([*FIRST, PAGES], b"PAGES may not come while receiving the rest of the state"),
        ([*FIRST, END], b"END may not come while receiving the rest of the state"),
        ([*FIRST, SERIAL], b"SECTION may not come while receiving the rest of the state"),
        ([*FIRST, *part()], b"the second one, and the last"),
        ([*FIRST, *part(SERIAL, more=True)], b"the second one, and the last"),
        ([*FIRST, *part(SERIAL), *part(SERIAL)], b"ROUND may not come while receiving the last pages"),
        ([hello(), CONFIG, *part(CPU)], b"section serial0 is missing"),
        ([hello(), CONFIG, *part(CPU, CPU, more=True), *part(SERIAL)], b"section cpu0 comes twice"),
    ],
)
def test_what_else_may_come_ends_it_and_nothing_runs(receive: Receive, frames: Frames, why: bytes) -> None:
    receiving = receive()
    said = heard(receiving, frames)
    assert b"load_us" not in said and why in said
    receiving.join()
    assert not receiving.ran
