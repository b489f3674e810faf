"""How a guest ends, and the exit status that ``run``, ``receive`` and ``restore`` make of it."""

from __future__ import annotations

from collections.abc import Callable

from ..record import dataclass, replace

POWEROFF = "poweroff"
DEBUG_EXIT = "debug-exit"
RESET = "reset"
RESET_BUTTON = "reset-button"
CRASH = "crash"


@dataclass(frozen=True, slots=True)
class GuestEnd:
    """Why the guest is over: ``kind`` (one of the words above), the process's ``exit_status``, one line of ``text``."""

    kind: str
    exit_status: int
    text: str

    @classmethod
    def powered_off(cls) -> GuestEnd:
        """The guest switched itself off: exit status 0."""
        return cls(POWEROFF, 0, "the guest powered off")

    @classmethod
    def debug_exit(cls, code: int) -> GuestEnd:
        """The guest wrote ``code`` to isa-debug-exit: exit status ``(code << 1) | 1`` modulo 256, so never 0."""
        return cls(DEBUG_EXIT, (code << 1 | 1) & 0xFF, f"the guest wrote {code:#x} to its debug-exit port")

    @classmethod
    def reset(cls, how: str) -> GuestEnd:
        """The guest asked for a reset by ``how``: it starts anew, or else ends with exit status 10."""
        return cls(RESET, 10, f"the guest asked for a reset ({how})")

    @classmethod
    def reset_button(cls) -> GuestEnd:
        """The operator resets the guest: as :meth:`reset`."""
        return cls(RESET_BUTTON, 10, "the operator reset the guest")

    def but(self, why: str) -> GuestEnd:
        """The same, with the reason why it came to this."""
        return replace(self, text=f"{self.text}, but {why}")

    @classmethod
    def crashed(cls, text: str) -> GuestEnd:
        """The guest stopped in a way that no guest intends (a triple fault, an emulation failure): exit status 4."""
        return cls(CRASH, 4, text)


EndCallback = Callable[[GuestEnd], None]
"""Told once by a device that the guest ended or is to be reset; it must not block, the vCPU's thread calls it."""
