"""Two VMs: one in a state that is unlike a fresh one's, one to take it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from .moving import make_unlike_reset
from .tiny import TinyVm, tiny


@pytest.fixture
def pair() -> Iterator[tuple[TinyVm, TinyVm]]:
    with ExitStack() as stack:
        source = stack.enter_context(tiny(2))
        target = stack.enter_context(tiny(2))
        make_unlike_reset(source)
        yield source, target
