"""The verbs that become a VM process: run, receive and restore."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..config import (
    BootConfig,
    ClockPolicy,
    DiskConfig,
    HostSide,
    MachineConfig,
    MemoryBackend,
    NetConfig,
    parse_boot,
    parse_size,
)
from .address import parse_address

if TYPE_CHECKING:
    from ..state.fidelity import Fidelity


def host_side(
    name: str,
    serial: str,
    disks: Sequence[str] | None,
    nets: Sequence[str] | None,
    console: str | None,
    memory_backend: MemoryBackend,
    *,
    no_reboot: bool,
) -> HostSide:
    """What the options of all three verbs say; a VM that was given no name gets one."""
    return HostSide(
        name or f"vm-{os.getpid()}",
        serial,
        tuple(map(DiskConfig.parse, disks or ())),
        tuple(map(NetConfig.parse, nets or ())),
        console,
        not no_reboot,
        memory_backend,
    )


def run(
    image: Path,
    here: HostSide,
    memory: str,
    cpus: int,
    cpu: str,
    initrd: Path | None,
    append: str,
    boot: str,
    *,
    paused: bool,
) -> int:
    """Boot ``image`` and stay with it. Returns the exit status."""
    method, load_addr = parse_boot(boot)
    config = MachineConfig(
        name=here.name,
        memory_bytes=parse_size(memory),
        nr_cpus=cpus,
        serial=here.serial,
        boot=BootConfig(image, method, load_addr, initrd, append),
        disks=here.disks,
        nets=here.nets,
        console=here.console,
        cpu=cpu,
        reboot=here.reboot,
        memory_backend=here.memory_backend,
    )
    from ..control import processes

    return processes.run_machine(config, paused=paused)


def _show_restored(fidelity: Fidelity) -> None:
    from . import report

    report.restored(fidelity)


def receive(address: str, here: HostSide, prefault: str, *, paused: bool, verbose: bool) -> int:
    """Wait for a guest and stay with it. Returns the exit status."""
    listen_at, prefault_bytes = parse_address(address), parse_size(prefault)
    from ..control import processes

    show = _show_restored if verbose else None
    return processes.run_incoming(listen_at, here, prefault_bytes=prefault_bytes, paused=paused, show=show)


def restore(directory: Path, here: HostSide, *, clone: bool, clock: ClockPolicy, paused: bool, verbose: bool) -> int:
    """Restore a snapshot and stay with the guest. Returns the exit status."""
    from ..control import processes

    show = _show_restored if verbose else None
    return processes.run_restored(directory, here, paused=paused, show=show, clone=clone, clock=clock)
