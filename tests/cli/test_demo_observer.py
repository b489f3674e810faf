"""The demo's observers count a heartbeat that begins at one process and ends at the other."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from kvmigrate.cli.demo import DemoFailed, Observer, _conclude


def say(observer: Observer, data: bytes) -> None:
    """Be the process whose guest sends ``data`` and that then ends."""
    with socket.socket(socket.AF_UNIX) as line:
        line.connect(str(observer.path))
        line.sendall(data)
    observer.join()


def conclude(directory: Path, first: bytes, second: bytes) -> int:
    source, destination = Observer(directory / "a"), Observer(directory / "b")
    try:
        say(source, first)
        say(destination, second)
        return _conclude(source, destination, (6, 0))
    finally:
        source.close()
        destination.close()


BEATS = b"H 0 1 5 1\nH 0 2 10 2\nH 0 3 15 3\nH 0 4 20 4\n"


@pytest.mark.parametrize("cut", range(10, 31))
def test_a_guest_may_move_between_any_two_bytes(tmp_path: Path, cut: int) -> None:
    assert conclude(tmp_path, BEATS[:cut], BEATS[cut:] + b"OK\n") == 0


@pytest.mark.parametrize("second", [BEATS[10:], BEATS[31:]], ids=["twice", "lost"])
def test_a_heartbeat_too_many_or_too_few_fails(tmp_path: Path, second: bytes) -> None:
    with pytest.raises(DemoFailed, match=r"lost or came twice|damaged"):
        conclude(tmp_path, BEATS[:20], second + b"OK\n")
