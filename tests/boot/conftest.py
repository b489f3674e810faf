"""Loads images into real guest memory and gives it back."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from .images import Loaded


@pytest.fixture
def load() -> Iterator[Callable[..., Loaded]]:
    """``load(image, memory_bytes, **BootConfig fields)``; on an error it checks that no page was written."""
    loaded: list[Loaded] = []

    def run(*args: object, **options: object) -> Loaded:
        loaded.append(Loaded(*args, **options))  # type: ignore[arg-type]
        return loaded[-1]

    yield run
    for one in loaded:
        one.memory.close()
