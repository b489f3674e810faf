"""The verbs of the command line, with their options and what ``--help`` says of them.

Every verb returns its exit status. Nothing but their declarations may be imported here at the top.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

from ..config import ClockPolicy, MemoryBackend, MigrationParameters
from .options import (
    Argument,
    Compress,
    Console,
    Directory,
    Disks,
    Json,
    Memory,
    Name,
    Nets,
    NewName,
    NoReboot,
    Option,
    OtherConsole,
    OtherDisks,
    OtherNets,
    Paused,
    Serial,
    Verbose,
)

_DEFAULTS = MigrationParameters()


def run(
    image: Annotated[Path, Argument(help="Flat binary, multiboot or PVH ELF, or bzImage.", metavar="IMAGE")],
    name: NewName = "",
    memory: Annotated[str, Option(help="Size of guest RAM.")] = "1G",
    cpus: Annotated[int, Option(help="Number of vCPUs.")] = 1,
    initrd: Annotated[Path | None, Option(help="Initial RAM disk, or multiboot module.")] = None,
    append: Annotated[str, Option(help="Command line of the guest's kernel.")] = "",
    cpu: Annotated[str, Option(help="host, baseline, or a file of cpu-baseline.", metavar="CPU")] = "host",
    boot: Annotated[str, Option(help="auto, flat@ADDR, multiboot, pvh or linux.")] = "auto",
    memory_backend: Memory = MemoryBackend.ANONYMOUS,
    serial: Serial = "stdio",
    paused: Paused = False,
    no_reboot: NoReboot = False,
    disk: Disks = None,
    net: Nets = None,
    console: Console = None,
) -> int:
    """Run IMAGE as a guest. Stays in the foreground until the guest ends or has moved.

    Exit status: 0 powered off, 2 error, 4 crashed, 6 moved away, 8 stopped, 10 reset and not booted, odd: debug-exit.
    """
    from . import machines

    here = machines.host_side(name, serial, disk, net, console, memory_backend, no_reboot=no_reboot)
    return machines.run(image, here, memory, cpus, cpu, initrd, append, boot, paused=paused)


def receive(
    address: Annotated[str, Argument(help="tcp://HOST:PORT or unix:///PATH to listen on.", metavar="ADDRESS")],
    name: NewName = "",
    memory_backend: Memory = MemoryBackend.ANONYMOUS,
    serial: Serial = "stdio",
    paused: Paused = False,
    no_reboot: NoReboot = False,
    verbose: Verbose = False,
    prefault: Annotated[
        str, Option(help="Touch so much memory while waiting, for a guest of that size.", metavar="SIZE")
    ] = "0",
    disk: OtherDisks = None,
    net: OtherNets = None,
    console: OtherConsole = None,
) -> int:
    """Wait at ADDRESS for one guest and take it over. Stays in the foreground, as run does."""
    from . import machines

    here = machines.host_side(name, serial, disk, net, console, memory_backend, no_reboot=no_reboot)
    return machines.receive(address, here, prefault, paused=paused, verbose=verbose)


def send(
    name: Name,
    address: Annotated[str, Argument(help="tcp://HOST:PORT or unix:///PATH of receive.", metavar="ADDRESS")],
    downtime_limit: Annotated[str, Option(help="Longest time to stop the guest for.")] = "300ms",
    bandwidth: Annotated[str, Option(help="Most bytes per second, such as 1GiB/s; 0: no cap.")] = "0",
    max_rounds: Annotated[int, Option(help="Give up after so many rounds.")] = _DEFAULTS.max_rounds,
    timeout: Annotated[str, Option(help="How long the other side may be silent.")] = "10s",
    compress: Annotated[str, Option(help="auto, none, zstd or zstd:LEVEL.")] = "none",
    delta_cache: Annotated[str, Option(help="Room for pages as last sent, to send what changed; 0: none.")] = "32M",
    connections: Annotated[
        int, Option(help="Send pages over so many; 0: one for every processor, up to 4, and one for a small guest.")
    ] = _DEFAULTS.connections,
    zerocopy: Annotated[
        bool, Option("--zerocopy", help="Send uncompressed pages without a copy; for network cards, over TCP.")
    ] = False,
    json: Json = False,
    verbose: Verbose = False,
) -> int:
    """Move the guest NAME to ADDRESS. There, kvmigrate receive waits for it."""
    from . import transfer

    limits = downtime_limit, bandwidth, max_rounds, timeout, compress, delta_cache, connections
    return transfer.send(name, address, *limits, zerocopy=zerocopy, as_json=json, verbose=verbose)


def check(
    name: Name,
    address: Annotated[str, Argument(help="tcp://HOST:PORT or unix:///PATH of receive.", metavar="ADDRESS")],
    timeout: Annotated[str, Option(help="How long the other side may be silent.")] = "10s",
    json: Json = False,
    verbose: Verbose = False,
) -> int:
    """Ask ADDRESS whether the guest NAME could go on there. It tries the real state; the guest runs on here.

    Exit status: 0 it could, 1 something would be lost, which a table names, 2 error.
    """
    from . import transfer

    return transfer.check(name, address, timeout, as_json=json, verbose=verbose)


def snapshot(
    name: Name,
    directory: Annotated[Path, Argument(help="Directory to make.", metavar="DIR")],
    paused: Annotated[bool, Option("--paused", help="Stop the guest for all of it.")] = False,
    compress: Compress = "none",
    json: Json = False,
) -> int:
    """Save the guest NAME in DIR while it runs on."""
    from . import transfer

    return transfer.snapshot(name, directory, compress, paused=paused, as_json=json)


def restore(
    directory: Directory,
    name: NewName = "",
    serial: Serial = "stdio",
    clone: Annotated[
        bool, Option("--clone", help="As another guest, with a UUID of its own, beside any number of others.")
    ] = False,
    clock: Annotated[
        ClockPolicy, Option(help="Go on from the saved time, or count the time since by the host's clock.")
    ] = ClockPolicy.CONTINUE,
    memory_backend: Memory = MemoryBackend.ANONYMOUS,
    paused: Paused = False,
    no_reboot: NoReboot = False,
    verbose: Verbose = False,
    disk: OtherDisks = None,
    net: OtherNets = None,
    console: OtherConsole = None,
) -> int:
    """Run the guest that was saved in DIR. Stays in the foreground, as run does."""
    from . import machines

    here = machines.host_side(name, serial, disk, net, console, memory_backend, no_reboot=no_reboot)
    return machines.restore(directory, here, clone=clone, clock=clock, paused=paused, verbose=verbose)


def list_(json: Json = False) -> int:
    """List the running VMs."""
    from . import query

    return query.list_vms(as_json=json)


def query_(name: Name, json: Json = False, verbose: Verbose = False) -> int:
    """Show the state of NAME, and its last job."""
    from . import query

    return query.query(name, as_json=json, verbose=verbose)


def pause(name: Name) -> int:
    """Pause the guest NAME."""
    from . import query

    return query.command(name, "stop", "paused")


def resume(name: Name) -> int:
    """Let the paused guest NAME run on."""
    from . import query

    return query.command(name, "cont", "running")


def console_(
    name: Name,
    escape: Annotated[str, Option(help="Key that detaches: Ctrl-A to Ctrl-_, or none.", metavar="KEY")] = "Ctrl-]",
) -> int:
    """Attach this terminal to the serial port of NAME. Input from a pipe goes through, and its end detaches.

    Exit status: 0 detached, 6 the guest moved away, else that of the VM's process when the guest ended.
    """
    from . import console

    return console.console(name, escape)


def cancel(name: Name) -> int:
    """Cancel the move or snapshot of NAME. The guest runs on."""
    from . import query

    return query.command(name, "x-kvmigrate-cancel", "cancelling")


def balloon(
    name: Name,
    size: Annotated[str, Argument(help="How much memory to keep, such as 512M.", metavar="[SIZE]")] = "",
    json: Json = False,
) -> int:
    """Ask the guest NAME to give memory up. Without SIZE, show how much it has and is to keep."""
    from . import query

    return query.balloon(name, size, as_json=json)


def powerdown(name: Name) -> int:
    """Press the power button of the guest NAME. Its own system then shuts it down, or not."""
    from . import query

    return query.command(name, "system_powerdown", "power button pressed")


def reset(name: Name) -> int:
    """Reset the guest NAME. It boots anew from the same files; what it has not written to its disks is lost."""
    from . import query

    return query.command(name, "system_reset", "reset")


def stop(name: Name) -> int:
    """End the guest NAME and its process."""
    from . import query

    return query.stop(name)


def inspect(directory: Directory, json: Json = False) -> int:
    """Show what the snapshot DIR holds. Registers, MSRs, devices and memory ranges."""
    from . import snapshots

    return snapshots.inspect(directory, as_json=json)


def verify(directory: Directory, json: Json = False) -> int:
    """Check all of the snapshot DIR. Exit status 1 when something is wrong, with what and where."""
    from . import snapshots

    return snapshots.verify(directory, as_json=json)


def resolve(
    name: Annotated[str, Argument(help="Name of the VM in doubt.", metavar="NAME")],
    run: Annotated[bool, Option("--run", help="The guest runs nowhere else: run it here.")] = False,
    discard: Annotated[bool, Option("--discard", help="The guest runs elsewhere: discard it here.")] = False,
) -> int:
    """Settle who owns the guest NAME. For a migration whose outcome never became known here."""
    from . import resolve as verb

    return verb.resolve(name, run=run, discard=discard)


def doctor(json: Json = False) -> int:
    """Say what this host can do and how to mend it. Exit status 1 when something needed is missing."""
    from . import doctor as verb

    return verb.doctor(as_json=json)


def cpu_baseline(
    hosts: Annotated[list[Path], Argument(help="What doctor --json said on each host.", metavar="FILE…")],
    output: Annotated[Path | None, Option("--output", "-o", help="File to write, for run --cpu.")] = None,
    json: Json = False,
) -> int:
    """Find the CPU that all hosts have in common. A guest that is run with it can move to each of them."""
    from . import baseline as verb

    return verb.cpu_baseline(hosts, output, as_json=json)


def demo(
    memory: Annotated[str, Option(help="Size of guest RAM.")] = "256M",
    verbose: Verbose = False,
) -> int:
    """Watch a busy guest move between two processes. Over TCP, with a check that it never noticed."""
    from . import demo as verb

    return verb.demo(memory, verbose=verbose)


VERBS: dict[str, Callable[..., int]] = {
    "run": run,
    "receive": receive,
    "send": send,
    "check": check,
    "snapshot": snapshot,
    "restore": restore,
    "list": list_,
    "query": query_,
    "pause": pause,
    "resume": resume,
    "console": console_,
    "cancel": cancel,
    "balloon": balloon,
    "powerdown": powerdown,
    "reset": reset,
    "stop": stop,
    "inspect": inspect,
    "verify": verify,
    "resolve": resolve,
    "doctor": doctor,
    "cpu-baseline": cpu_baseline,
    "demo": demo,
}
"""In the order of ``--help``."""
