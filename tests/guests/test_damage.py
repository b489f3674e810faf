"""Whatever is changed behind the ledger guest's back, it says so: each of its equations can fail."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from kvmigrate.contract import RunState
from kvmigrate.machine.machine import Machine

from .running import HEADER_OFFSET, LEDGER_ENTRY_BYTES, ledger_entry, ledger_pages, running

PAGES = 300
PARAMETERS = f"beat=10 pages={PAGES} fill=1 state=1 ymm=1 rate=0"


def flip(machine: Machine, gpa: int) -> None:
    machine.memory.write(gpa, bytes([machine.memory.read(gpa, 1)[0] ^ 0x10]))


def payload_byte(machine: Machine) -> None:
    flip(machine, random.choice(ledger_pages(machine)) + random.choice([0, 63, 96, 2000, 4095]))


def header_byte(machine: Machine) -> None:
    flip(machine, random.choice(ledger_pages(machine)) + HEADER_OFFSET + random.randrange(32))


def ledger_byte(machine: Machine) -> None:
    entry = ledger_entry(machine, ledger_pages(machine))
    flip(machine, entry + LEDGER_ENTRY_BYTES * random.randrange(PAGES) + random.randrange(8))


def stale_page(machine: Machine) -> None:
    """A page as it was a moment ago: consistent in itself, so only the ledger can tell."""
    page = random.choice(ledger_pages(machine))
    old = machine.memory.read(page, 4096)
    machine.resume()
    deadline = time.monotonic() + 10
    while machine.memory.read(page + HEADER_OFFSET + 8, 8) == old[HEADER_OFFSET + 8 : HEADER_OFFSET + 16]:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    machine.pause(RunState.PAUSED)
    machine.memory.write(page, old)


def swapped_pages(machine: Machine) -> None:
    one, other = random.sample(ledger_pages(machine), 2)
    first, second = machine.memory.read(one, 4096), machine.memory.read(other, 4096)
    machine.memory.write(one, second)
    machine.memory.write(other, first)


def zeroed_page(machine: Machine) -> None:
    machine.memory.write(random.choice(ledger_pages(machine)), bytes(4096))


def filled_page(machine: Machine) -> None:
    """The filled pages follow the first run of pages under the ledger."""
    flip(machine, ledger_pages(machine)[PAGES // 2 - 1] + 4096 * random.randrange(1, 257) + 77)


def register(machine: Machine) -> None:
    vcpu = machine.platform.vm.vcpus[0]
    vcpu.set_regs(vcpu.get_regs() | {"r15": vcpu.get_regs()["r15"] + 1})


def ticket_register(machine: Machine) -> None:
    vcpu = machine.platform.vm.vcpus[0]
    vcpu.set_regs(vcpu.get_regs() | {"r12": vcpu.get_regs()["r12"] + 1000})


def msr(machine: Machine) -> None:
    machine.platform.vm.vcpus[0].set_msrs({0xC0000082: 0x1000})


def debug_register(machine: Machine) -> None:
    vcpu = machine.platform.vm.vcpus[0]
    vcpu.set_debugregs(vcpu.get_debugregs() | {"db": [0x1000, 0, 0, 0]})


def xmm(machine: Machine) -> None:
    vcpu = machine.platform.vm.vcpus[0]
    state = vcpu.get_fpu()
    state["xmm"][9] = bytes(16)
    vcpu.set_fpu(state)


DAMAGES: dict[Callable[[Machine], None], str] = {
    payload_byte: "page content does not match",
    header_byte: "page",
    ledger_byte: "ledger",
    stale_page: "page is not of this time",
    swapped_pages: "page is another one",
    zeroed_page: "page is another one",
    filled_page: "filled page changed",
    register: "differ",
    ticket_register: "shared counter went back",
    msr: "state changed",
    debug_register: "state changed",
    xmm: "xmm register changed",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_ledger_notices(damage: Callable[[Machine], None], tmp_path: Path) -> None:
    output = tmp_path / "tty"
    with running("ledger", PARAMETERS, f"file:{output}") as machine:
        while b"H 0 5 " not in output.read_bytes():
            time.sleep(0.01)
        machine.pause(RunState.PAUSED)
        damage(machine)
        machine.resume()
        end = machine.wait_end(20)
    assert end is not None and end.exit_status == 3, output.read_text()[-300:]
    last = output.read_text().splitlines()[-1]
    assert last.startswith("BAD") and DAMAGES[damage] in last


def test_ledger_goes_on_after_a_pause_without_damage(tmp_path: Path) -> None:
    output = tmp_path / "tty"
    with running("ledger", PARAMETERS + " beats=40", f"file:{output}") as machine:
        while b"H 0 5 " not in output.read_bytes():
            time.sleep(0.01)
        machine.pause(RunState.PAUSED)
        ledger_pages(machine)
        machine.resume()
        end = machine.wait_end(20)
    assert end is not None and end.exit_status == 0, output.read_text()[-300:]


@pytest.mark.parametrize(("start_mib", "complaint"), [(2, "filled page changed"), (9, "hot page changed")])
def test_writer_notices(start_mib: int, complaint: str, tmp_path: Path) -> None:
    """Filled pages lie below 9 MiB, hot ones above, and the first words are looked at before the next write."""
    output = tmp_path / "tty"
    with running("writer", "beat=2 beats=500 fill=7 hot=4 speed=50", f"file:{output}") as machine:
        while b"H 0 100 " not in output.read_bytes().replace(b"\n", b" "):
            time.sleep(0.01)
        machine.pause(RunState.PAUSED)
        flip(machine, (start_mib << 20) + 4096 * random.randrange(100, 200))
        machine.resume()
        end = machine.wait_end(20)
    assert end is not None and end.exit_status == 3, output.read_text()[-300:]
    last = output.read_text().splitlines()[-1]
    assert last.startswith("BAD") and complaint in last
