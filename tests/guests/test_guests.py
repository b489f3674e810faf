"""The guests run to their end, on one vCPU and on two, and on both sides of the 32-bit hole."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import zstandard

from kvmigrate import guests
from kvmigrate.errors import ConfigError

from ..oracle.recorder import Recorder
from .running import MIB, run_to_end, running


def heartbeats(text: str, cpu: int = 0) -> list[int]:
    return [int(beat) for beat in re.findall(rf"^H {cpu} (\d+)", text, re.MULTILINE)]


def test_a_guest_that_is_not_there_is_named() -> None:
    with pytest.raises(ConfigError, match="'nothing' is not a guest"):
        guests.path("nothing")


def test_an_image_that_was_not_built_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(guests, "__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(ConfigError, match=r"idle\.elf was not built: install gcc"):
        guests.path("idle")


def test_images_are_multiboot() -> None:
    for name in guests.NAMES:
        assert b"\x02\xb0\xad\x1b\x03\x00\x00\x00" in guests.path(name).read_bytes()[:8192]


def test_idle_sends_every_heartbeat_once(tmp_path: Path) -> None:
    end, text = run_to_end("idle", "beat=2 beats=100 fill=4", tmp_path / "tty")
    assert (end.kind, end.exit_status) == ("poweroff", 0)
    assert heartbeats(text) == list(range(1, 101))
    assert text.endswith("OK beats 100\n")


@pytest.mark.parametrize("rate", [0, 20])
@pytest.mark.parametrize("cpus", [1, 2])
def test_ledger_balances(tmp_path: Path, cpus: int, rate: int) -> None:
    parameters = f"beat=10 beats=40 pages=500 fill=2 rate={rate} cpus={cpus} irq=1 state=1 ymm=1"
    end, text = run_to_end("ledger", parameters, tmp_path / "tty", cpus=cpus)
    assert end.exit_status == 0, text
    for cpu in range(cpus):
        beats = heartbeats(text, cpu)
        assert beats == list(range(1, len(beats) + 1))
    match = re.search(r"^OK updates (\d+) tickets (\d+)\n$", text, re.MULTILINE)
    assert match and int(match[1]) >= int(match[2]) > 100


def test_ledger_uses_both_sides_of_the_hole(tmp_path: Path) -> None:
    end, text = run_to_end("ledger", "beat=10 beats=20 pages=300", tmp_path / "tty", mib=3584)
    assert end.exit_status == 0, text


def test_ledger_says_when_memory_is_too_small(tmp_path: Path) -> None:
    end, text = run_to_end("ledger", "pages=20000", tmp_path / "tty")
    assert end.exit_status == 3
    assert text.startswith("BAD memory is too small")


def test_ledger_says_when_a_vcpu_does_not_start(tmp_path: Path) -> None:
    end, text = run_to_end("ledger", "cpus=2", tmp_path / "tty")
    assert end.exit_status == 3
    assert text.startswith("BAD vcpus did not start")


def test_ledger_echoes_what_the_uart_receives(tmp_path: Path) -> None:
    with Recorder(tmp_path) as recorder:
        log, serial = recorder.listen("guest")
        with running("ledger", "beat=10 irq=1 pages=100", serial):
            log.wait_for("H 0 1 ")
            for number in range(20):
                log.send(f"line {number}\n")
                log.wait_for(f"E line {number}\n")


@pytest.mark.parametrize("kind", [0, 1, 2])
def test_writer_finds_all_its_data_at_the_end(tmp_path: Path, kind: int) -> None:
    end, text = run_to_end("writer", f"beat=2 beats=100 fill=4 kind={kind} hot=2", tmp_path / "tty")
    assert end.exit_status == 0, text
    assert heartbeats(text) == list(range(1, 101))
    match = re.search(r"^OK writes (\d+)\n$", text, re.MULTILINE)
    assert match and int(match[1]) > 2 * MIB // 4096, "it did not come round"


def test_writer_writes_as_much_as_it_was_told(tmp_path: Path) -> None:
    """400 ms of guest time at 20 MiB/s are 2048 pages; a backlog of at most 50 ms may be missing."""
    end, text = run_to_end("writer", "beat=2 beats=200 hot=2 speed=20", tmp_path / "tty")
    assert end.exit_status == 0, text
    match = re.search(r"^OK writes (\d+)\n$", text, re.MULTILINE)
    assert match and 1024 < int(match[1]) <= 2060


def filled_memory(tmp_path: Path, parameters: str) -> bytes:
    """16 MiB of RAM with 8 MiB of data, the guest's own pages included."""
    output = tmp_path / "tty"
    with running("idle", f"beat=2 beats=20 fill=8 {parameters}", f"file:{output}", mib=16) as machine:
        assert machine.wait_end(30) is not None
        return machine.memory.read(2 * MIB, 6 * MIB)


def test_data_does_not_shrink_unless_it_is_to_be_like_a_text(tmp_path: Path) -> None:
    ratios = []
    for kind in (0, 1):
        data = filled_memory(tmp_path, f"kind={kind}")
        ratios.append(len(data) / len(zstandard.compress(data, 1)))
    assert ratios[0] < 1.01
    assert 2 < ratios[1] < 4


def test_every_second_page_of_the_last_kind_is_zero(tmp_path: Path) -> None:
    data = filled_memory(tmp_path, "kind=2")
    zero = [not any(data[at : at + 4096]) for at in range(0, len(data), 4096)]
    assert sum(zero) == len(zero) // 2
