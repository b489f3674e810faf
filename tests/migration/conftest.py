"""Machines and destinations that a test need not close itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from kvmigrate.migration.sink import PART_PAGES
from tests.fake_machine import MIB, FakeMachine
from tests.migration.harness import Proxy, Receiving, Rule

# Examples are timed by nobody: a busy machine would fail them.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


@pytest.fixture
def source_machine() -> Iterator[FakeMachine]:
    machine = FakeMachine(MIB, name="guest", running=True)
    machine.fill(2)
    machine.writes_when_saved = True
    yield machine
    machine.close()


@pytest.fixture
def receive(tmp_path: Path) -> Iterator[Callable[..., Receiving]]:
    made: list[Receiving] = []

    def start(**options: object) -> Receiving:
        made.append(Receiving(tmp_path, **options))  # type: ignore[arg-type]
        return made[-1]

    yield start
    for receiving in made:
        receiving.close()


@pytest.fixture
def proxy_to() -> Iterator[Callable[..., Proxy]]:
    made: list[Proxy] = []

    def start(receiving: Receiving, rule: Rule | None = None) -> Proxy:
        made.append(Proxy(receiving.address, rule))
        return made[-1]

    yield start
    for proxy in made:
        proxy.close()


@pytest.fixture
def large() -> Iterator[FakeMachine]:
    """A guest with pages enough for several connections."""
    machine = FakeMachine(32 * MIB, name="guest", running=True)
    machine.fill(16 * PART_PAGES)
    yield machine
    machine.close()
