"""A receiver keeps off the processor of a sender on this host, while it receives."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from kvmigrate.memory.prefault import Prefault
from kvmigrate.memory.region import GuestMemory
from kvmigrate.migration import incoming
from kvmigrate.migration.apart import Apart
from kvmigrate.migration.pages import ANNOUNCED_PAGES
from tests.fake_machine import MIB, FakeMachine

from .harness import Receiving, migrate

Receive = Callable[..., Receiving]
ALLOWED = os.sched_getaffinity(0)


@pytest.fixture(autouse=True)
def unchanged() -> Iterator[None]:
    yield
    os.sched_setaffinity(0, ALLOWED)


def connected() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        source = socket.create_connection(listener.getsockname())
        destination, _ = listener.accept()
    return source, destination


def send_from(cpu: int, sock: socket.socket) -> None:
    def send() -> None:
        os.sched_setaffinity(0, {cpu})
        sock.sendall(b"x")

    sender = threading.Thread(target=send)
    sender.start()
    sender.join()


@pytest.mark.parametrize("cpu", sorted(ALLOWED))
def test_the_processor_of_the_sender_is_left_to_it_until_the_end(cpu: int) -> None:
    source, destination = connected()
    with source, destination:
        send_from(cpu, source)
        apart = Apart(destination)
        apart.keep()
        assert os.sched_getaffinity(0) == (ALLOWED - {cpu} or ALLOWED)
        apart.end()
        apart.end()
    assert os.sched_getaffinity(0) == ALLOWED


def test_a_sender_that_moves_is_followed() -> None:
    source, destination = connected()
    with source, destination:
        apart = Apart(destination)
        for cpu in sorted(ALLOWED):
            send_from(cpu, source)
            apart.keep()
            assert os.sched_getaffinity(0) == (ALLOWED - {cpu} or ALLOWED)
        apart.end()
    assert os.sched_getaffinity(0) == ALLOWED


def test_a_process_with_one_processor_keeps_it() -> None:
    source, destination = connected()
    cpu = min(ALLOWED)
    with source, destination:
        os.sched_setaffinity(0, {cpu})
        send_from(cpu, source)
        Apart(destination).keep()
        assert os.sched_getaffinity(0) == {cpu}


def test_of_other_connections_nothing_is_known() -> None:
    for sock in socket.socketpair():
        with sock:
            Apart(sock).keep()
    assert os.sched_getaffinity(0) == ALLOWED


def test_a_destination_is_apart_while_it_receives_and_everywhere_from_the_load_on(
    tmp_path: Path, source_machine: FakeMachine, receive: Receive, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[tuple[FakeMachine, str], set[int]] = {}

    def spy(name: str) -> None:
        real = getattr(FakeMachine, name)

        def spied(machine: FakeMachine, *arguments: Any) -> Any:
            seen[machine, name] = os.sched_getaffinity(0)
            return real(machine, *arguments)

        monkeypatch.setattr(FakeMachine, name, spied)

    for name in ("warm_up", "load", "resume"):
        spy(name)
    # Not warm from the trial of the state, but each time.
    monkeypatch.setattr("kvmigrate.migration.handover.WARM_FOR_S", 0.0)
    receiving = receive()
    assert migrate(source_machine, receiving.address, tmp_path).error is None
    receiving.join()
    assert receiving.machine is not None
    assert len(seen[receiving.machine, "warm_up"]) == max(len(ALLOWED) - 1, 1)
    # What is started in there is the guest's.
    assert seen[receiving.machine, "load"] == seen[receiving.machine, "resume"] == ALLOWED
    assert seen[source_machine, "warm_up"] == ALLOWED


def test_what_touches_memory_ahead_of_the_pages_may_run_everywhere(
    tmp_path: Path, receive: Receive, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[set[int]] = []

    class Spied(Prefault):
        def __init__(self, memory: GuestMemory, runs: Sequence[tuple[int, int]]) -> None:
            seen.append(os.sched_getaffinity(0))
            super().__init__(memory, runs)

    monkeypatch.setattr(incoming, "Prefault", Spied)
    machine = FakeMachine(48 * MIB, running=True)
    machine.fill(ANNOUNCED_PAGES)
    receiving = receive()
    assert migrate(machine, receiving.address, tmp_path).error is None
    receiving.join()
    assert seen == [ALLOWED]
    machine.close()
