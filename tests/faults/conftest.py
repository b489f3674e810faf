"""A world of processes for each test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ..oracle.world import World, open_world


@pytest.fixture
def world() -> Iterator[World]:
    with open_world() as opened:
        yield opened
