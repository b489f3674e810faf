"""How options and arguments are declared, and those that several verbs take, each with its help.

The declarations are not Typer's own, though they say the same: importing Typer takes as long as restoring a guest, and
:mod:`.plain` reads most command lines without it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

from ..config import MemoryBackend


class Option:
    """An option: ``--name``, or ``flags`` if any are given. One whose type is bool takes no value."""

    def __init__(self, *flags: str, help: str, metavar: str | None = None) -> None:
        self.flags, self.help, self.metavar = flags, help, metavar


class Argument:
    """An argument by its place. ``complete`` lists what it may be, for the shell."""

    def __init__(self, *, help: str, metavar: str, complete: Callable[[], list[str]] | None = None) -> None:
        self.help, self.metavar, self.complete = help, metavar, complete


def _complete_name() -> list[str]:
    from ..control.runtime import running_names

    return running_names()


Name = Annotated[str, Argument(help="Name of a running VM.", metavar="NAME", complete=_complete_name)]
NewName = Annotated[str, Option("--name", help="Name of the VM here; vm-PID if left out.")]
Serial = Annotated[str, Option(help="Where COM1 leads: stdio, pty, null, file:PATH or unix:PATH.")]
Disks = Annotated[
    list[str] | None,
    Option("--disk", metavar="NAME=PATH[,ro]", help="A raw image or block device; may come several times."),
]
OtherDisks = Annotated[
    list[str] | None,
    Option("--disk", metavar="NAME=PATH[,ro]", help="Where a disk of the guest is here, if not at its old path."),
]
Nets = Annotated[
    list[str] | None,
    Option("--net", metavar="NAME=tap:IF[,mac=MAC]", help="A network card before a tap; may come several times."),
]
OtherNets = Annotated[
    list[str] | None,
    Option("--net", metavar="NAME=tap:IF[,mac=MAC]", help="The tap of a network of the guest, if another here."),
]
NoReboot = Annotated[bool, Option("--no-reboot", help="Let a reset end the guest instead of booting it anew.")]
_BACKENDS = "stdio, pty, null, file:PATH or unix:PATH"
Console = Annotated[
    str | None, Option(metavar="BACKEND", help=f"A virtio console (hvc0), and where it leads: {_BACKENDS}.")
]
OtherConsole = Annotated[
    str | None, Option("--console", metavar="BACKEND", help="Where the guest's console leads here; else nowhere.")
]
Json = Annotated[bool, Option("--json", help="Print one JSON object and nothing else on standard output.")]
Paused = Annotated[bool, Option("--paused", help="Do not let the guest run until kvmigrate resume.")]
Verbose = Annotated[bool, Option("--verbose", "-v", help="Also show what became of every item of state.")]
Compress = Annotated[str, Option(help="none, zstd or zstd:LEVEL (-7 to 19).")]
Directory = Annotated[Path, Argument(help="Directory of a snapshot.", metavar="DIR")]
Memory = Annotated[
    MemoryBackend, Option("--memory-backend", help="What guest RAM is made of here; see docs/performance.md.")
]
