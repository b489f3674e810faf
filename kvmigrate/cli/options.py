"""The options and arguments that several verbs take, each with its help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..config import MemoryBackend


def _complete_name() -> list[str]:
    from ..control.runtime import running_names

    return running_names()


Name = Annotated[str, typer.Argument(help="Name of a running VM.", metavar="NAME", autocompletion=_complete_name)]
NewName = Annotated[str, typer.Option("--name", help="Name of the VM here; vm-PID if left out.")]
Serial = Annotated[str, typer.Option(help="Where COM1 leads: stdio, pty, null, file:PATH or unix:PATH.")]
Disks = Annotated[
    list[str] | None,
    typer.Option("--disk", metavar="NAME=PATH[,ro]", help="A raw image or block device; may come several times."),
]
OtherDisks = Annotated[
    list[str] | None,
    typer.Option("--disk", metavar="NAME=PATH[,ro]", help="Where a disk of the guest is here, if not at its old path."),
]
Nets = Annotated[
    list[str] | None,
    typer.Option("--net", metavar="NAME=tap:IF[,mac=MAC]", help="A network card before a tap; may come several times."),
]
OtherNets = Annotated[
    list[str] | None,
    typer.Option("--net", metavar="NAME=tap:IF[,mac=MAC]", help="The tap of a network of the guest, if another here."),
]
NoReboot = Annotated[bool, typer.Option("--no-reboot", help="Let a reset end the guest instead of booting it anew.")]
_BACKENDS = "stdio, pty, null, file:PATH or unix:PATH"
Console = Annotated[
    str | None, typer.Option(metavar="BACKEND", help=f"A virtio console (hvc0), and where it leads: {_BACKENDS}.")
]
OtherConsole = Annotated[
    str | None, typer.Option("--console", metavar="BACKEND", help="Where the guest's console leads here; else nowhere.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else on standard output.")]
Paused = Annotated[bool, typer.Option("--paused", help="Do not let the guest run until kvmigrate resume.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Also show what became of every item of state.")]
Compress = Annotated[str, typer.Option(help="none, zstd or zstd:LEVEL (-7 to 19).")]
Directory = Annotated[Path, typer.Argument(help="Directory of a snapshot.", metavar="DIR")]
Memory = Annotated[
    MemoryBackend, typer.Option("--memory-backend", help="What guest RAM is made of here; see docs/performance.md.")
]
