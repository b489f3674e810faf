"""The verbs that become a VM process: run, receive and restore."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from ..config import (
    BootConfig,
    ClockPolicy,
    DiskConfig,
    MachineConfig,
    NetConfig,
    parse_boot,
    parse_size,
    require_own_terminal,
)
from . import report
from .address import parse_address


def default_name() -> str:
    """What a VM is called that was given no name."""
    return f"vm-{os.getpid()}"


def run(
    image: Path,
    name: str,
    memory: str,
    cpus: int,
    cpu: str,
    initrd: Path | None,
    append: str,
    boot: str,
    serial: str,
    paused: bool,
    no_reboot: bool,
    disks: Sequence[str],
    nets: Sequence[str],
    console: str | None,
) -> int:
    """Boot ``image`` and stay with it. Returns the exit status."""
    method, load_addr = parse_boot(boot)
    config = MachineConfig(
        name=name or default_name(),
        memory_bytes=parse_size(memory),
        nr_cpus=cpus,
        serial=serial,
        boot=BootConfig(image, method, load_addr, initrd, append),
        disks=_disks(disks),
        nets=_nets(nets),
        console=console,
        cpu=cpu,
        reboot=not no_reboot,
    )
    from ..control import processes

    return processes.run_machine(config, paused=paused)


def _disks(texts: Sequence[str]) -> tuple[DiskConfig, ...]:
    return tuple(DiskConfig.parse(text) for text in texts)


def _nets(texts: Sequence[str]) -> tuple[NetConfig, ...]:
    return tuple(NetConfig.parse(text) for text in texts)


def receive(
    address: str,
    name: str,
    serial: str,
    paused: bool,
    no_reboot: bool,
    verbose: bool,
    disks: Sequence[str],
    nets: Sequence[str],
    console: str | None,
) -> int:
    """Wait for a guest and stay with it. Returns the exit status."""
    require_own_terminal(serial, console)
    listen_at = parse_address(address)
    from ..control import processes

    show = report.restored if verbose else None
    given = _disks(disks), _nets(nets), console
    return processes.run_incoming(
        listen_at, name or default_name(), serial, *given, paused=paused, show=show, reboot=not no_reboot
    )


def restore(
    directory: Path,
    name: str,
    serial: str,
    clone: bool,
    clock: ClockPolicy,
    paused: bool,
    no_reboot: bool,
    verbose: bool,
    disks: Sequence[str],
    nets: Sequence[str],
    console: str | None,
) -> int:
    """Restore a snapshot and stay with the guest. Returns the exit status."""
    require_own_terminal(serial, console)
    from ..control import processes

    show = report.restored if verbose else None
    own = name or default_name()
    given = _disks(disks), _nets(nets), console
    return processes.run_restored(
        directory, own, serial, *given, paused=paused, show=show, clone=clone, clock=clock, reboot=not no_reboot
    )
