"""What a VM tells QEMU's own library, whose types leave open what an answer or an event is made of."""

from __future__ import annotations

import asyncio
from typing import Any

from qemu.qmp import EventListener, QMPClient


async def ask(client: QMPClient, command: str) -> Any:
    """The answer to ``command``: another type for each."""
    return await client.execute(command)


async def next_event(listener: EventListener, timeout_s: float) -> dict[str, Any]:
    """The next event; what it holds depends on its name."""
    return dict(await asyncio.wait_for(listener.get(), timeout_s))
