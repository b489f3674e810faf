"""The terminal at which somebody attaches to a guest: raw while that lasts, and as it was on every way out."""

from __future__ import annotations

import os
import re
import signal
import sys
import termios
import tty
from types import FrameType

from ..errors import ConfigError

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
_KEY = re.compile(r"(?:ctrl-|\^)([a-z@\[\\\]^_?])", re.IGNORECASE)


def parse_escape(text: str) -> int | None:
    """``Ctrl-]``, ``^]`` or ``ctrl-a`` as the byte that a terminal sends for it; None for ``none``."""
    if text.lower() == "none":
        return None
    match = _KEY.fullmatch(text)
    if match is None:
        raise ConfigError(f"{text!r} is not an escape key: write it like Ctrl-] or ^A, or none")
    return ord(match[1].upper()) ^ 0x40


def escape_name(key: int) -> str:
    """What a person calls ``key``."""
    return f"Ctrl-{chr(key ^ 0x40)}"


class Terminal:
    """Standard input, which may be no terminal, and the signals: none of them ends the process before :meth:`close`,
    each is told through ``signal_fd``, one byte of its number."""

    def __init__(self) -> None:
        self.fd = _number_of_stdin()
        self.is_terminal = self.fd >= 0 and os.isatty(self.fd)
        self.is_raw = False
        self._before = termios.tcgetattr(self.fd) if self.is_terminal else None
        self.signal_fd, self._told_fd = os.pipe()
        os.set_blocking(self.signal_fd, False)
        os.set_blocking(self._told_fd, False)
        numbers = (*ENDING, signal.SIGTSTP, signal.SIGCONT)
        self._handlers = {number: signal.signal(number, _told_by_pipe) for number in numbers}
        self._wakeup_fd = signal.set_wakeup_fd(self._told_fd, warn_on_full_buffer=False)

    def set_raw(self) -> None:
        """Every key goes on as it is, at once and unechoed, those for signals too. What was typed ahead stays."""
        if self.is_terminal:
            self.is_raw = True
            tty.setraw(self.fd, termios.TCSANOW)

    def set_back(self) -> None:
        """As it was found."""
        if self.is_raw and self._before is not None:
            self.is_raw = False
            # From the background this would stop the process.
            before = signal.signal(signal.SIGTTOU, signal.SIG_IGN)
            try:
                termios.tcsetattr(self.fd, termios.TCSANOW, self._before)
            except termios.error:
                pass  # it is gone
            signal.signal(signal.SIGTTOU, before)

    def signalled(self) -> int:
        """What came through ``signal_fd``: the number of a signal that ends the process, or 0. One that stops it is
        carried out, with the terminal set back meanwhile."""
        for number in os.read(self.signal_fd, 64):
            if number in ENDING:
                return number
            was_raw = self.is_raw
            if number == signal.SIGTSTP:
                self.set_back()
                os.kill(os.getpid(), signal.SIGSTOP)
            # Who went on without it may have changed it.
            if was_raw and os.tcgetpgrp(self.fd) == os.getpgrp():
                self.set_raw()
        return 0

    def close(self) -> None:
        """Everything as it was found, the signals last."""
        self.set_back()
        signal.set_wakeup_fd(self._wakeup_fd)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        os.close(self.signal_fd)
        os.close(self._told_fd)


def die_of(number: int) -> None:
    """End this process by a signal, as it would have without us."""
    sys.stdout.flush()
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


def _told_by_pipe(number: int, frame: FrameType | None) -> None:
    """The number is in the pipe already."""


def _number_of_stdin() -> int:
    """Its descriptor; -1 when it is closed, since its number may belong to another file by now."""
    try:
        return -1 if sys.__stdin__ is None else sys.__stdin__.fileno()
    except (OSError, ValueError):
        return -1
