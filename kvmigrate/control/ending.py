"""How a VM process ends: its exit status, and the words for it."""

from __future__ import annotations

from typing import Any

from ..devices.end import CRASH, RESET, RESET_BUTTON, GuestEnd
from ..errors import KvmigrateError
from ..record import dataclass

STATUS_ERROR, STATUS_MOVED, STATUS_STOPPED = 2, 6, 8
REASONS = {CRASH: "guest-panic", RESET: "guest-reset", RESET_BUTTON: "host-qmp-system-reset"}
"""QEMU's words for why a guest ended or was reset."""


@dataclass(frozen=True, slots=True)
class Exit:
    """How the process ends: its status, a line for whoever watches (or nothing), and the reason for SHUTDOWN."""

    status: int
    text: str = ""
    reason: str = ""
    moved: bool = False
    error: KvmigrateError | None = None
    story: str = ""
    """What became of the guest, also where ``text`` needs none."""

    @classmethod
    def of_guest(cls, end: GuestEnd) -> Exit:
        text = end.text if end.kind in REASONS else ""
        return cls(end.exit_status, text, REASONS.get(end.kind, "guest-shutdown"), story=end.text)


def whose(reason: str) -> dict[str, Any]:
    """The data of QEMU's events for the end and the reset of a guest."""
    return {"guest": reason.startswith("guest"), "reason": reason}
