"""The ``kvmigrate`` command: its verbs and options, and the one place where an error becomes a line and a status.

Every verb returns its exit status. Nothing but Typer and the option parsers may be imported here at the top.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from ..config import ClockPolicy, MemoryBackend, MigrationParameters
from ..errors import KvmigrateError
from .options import (
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
    OtherConsole,
    OtherDisks,
    OtherNets,
    Paused,
    Serial,
    Verbose,
)

app = typer.Typer(
    name="kvmigrate",
    help="Run a guest on KVM, and migrate, snapshot and restore it while it runs.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    no_args_is_help=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_DEFAULTS = MigrationParameters()


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"kvmigrate {version('kvmigrate')}")
        raise typer.Exit(0)


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    """Run a guest on KVM, and migrate, snapshot and restore it while it runs."""


@app.command()
def run(
    image: Annotated[Path, typer.Argument(help="Flat binary, multiboot or PVH ELF, or bzImage.", metavar="IMAGE")],
    name: NewName = "",
    memory: Annotated[str, typer.Option(help="Size of guest RAM.")] = "1G",
    cpus: Annotated[int, typer.Option(help="Number of vCPUs.")] = 1,
    initrd: Annotated[Path | None, typer.Option(help="Initial RAM disk, or multiboot module.")] = None,
    append: Annotated[str, typer.Option(help="Command line of the guest's kernel.")] = "",
    cpu: Annotated[str, typer.Option(help="host, baseline, or a file of cpu-baseline.", metavar="CPU")] = "host",
    boot: Annotated[str, typer.Option(help="auto, flat@ADDR, multiboot, pvh or linux.")] = "auto",
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


@app.command()
def receive(
    address: Annotated[str, typer.Argument(help="tcp://HOST:PORT or unix:///PATH to listen on.", metavar="ADDRESS")],
    name: NewName = "",
    memory_backend: Memory = MemoryBackend.ANONYMOUS,
    serial: Serial = "stdio",
    paused: Paused = False,
    no_reboot: NoReboot = False,
    verbose: Verbose = False,
    prefault: Annotated[
        str, typer.Option(help="Touch so much memory while waiting, for a guest of that size.", metavar="SIZE")
    ] = "0",
    disk: OtherDisks = None,
    net: OtherNets = None,
    console: OtherConsole = None,
) -> int:
    """Wait at ADDRESS for one guest and take it over. Stays in the foreground, as run does."""
    from . import machines

    here = machines.host_side(name, serial, disk, net, console, memory_backend, no_reboot=no_reboot)
    return machines.receive(address, here, prefault, paused=paused, verbose=verbose)


@app.command()
def send(
    name: Name,
    address: Annotated[str, typer.Argument(help="tcp://HOST:PORT or unix:///PATH of receive.", metavar="ADDRESS")],
    downtime_limit: Annotated[str, typer.Option(help="Longest time to stop the guest for.")] = "300ms",
    bandwidth: Annotated[str, typer.Option(help="Most bytes per second, such as 1GiB/s; 0: no cap.")] = "0",
    max_rounds: Annotated[int, typer.Option(help="Give up after so many rounds.")] = _DEFAULTS.max_rounds,
    timeout: Annotated[str, typer.Option(help="How long the other side may be silent.")] = "10s",
    compress: Annotated[str, typer.Option(help="auto, none, zstd or zstd:LEVEL.")] = "none",
    delta_cache: Annotated[
        str, typer.Option(help="Room for pages as last sent, to send what changed; 0: none.")
    ] = "32M",
    connections: Annotated[
        int | None, typer.Option(help="Send pages over so many; if not given, one for every two processors, up to 4.")
    ] = None,
    zerocopy: Annotated[
        bool, typer.Option("--zerocopy", help="Send uncompressed pages without a copy; for network cards, over TCP.")
    ] = False,
    json: Json = False,
    verbose: Verbose = False,
) -> int:
    """Move the guest NAME to ADDRESS. There, kvmigrate receive waits for it."""
    from . import transfer

    limits = downtime_limit, bandwidth, max_rounds, timeout, compress, delta_cache, connections
    return transfer.send(name, address, *limits, zerocopy=zerocopy, as_json=json, verbose=verbose)


@app.command()
def check(
    name: Name,
    address: Annotated[str, typer.Argument(help="tcp://HOST:PORT or unix:///PATH of receive.", metavar="ADDRESS")],
    timeout: Annotated[str, typer.Option(help="How long the other side may be silent.")] = "10s",
    json: Json = False,
    verbose: Verbose = False,
) -> int:
    """Ask ADDRESS whether the guest NAME could go on there. It tries the real state; the guest runs on here.

    Exit status: 0 it could, 1 something would be lost, which a table names, 2 error.
    """
    from . import transfer

    return transfer.check(name, address, timeout, as_json=json, verbose=verbose)


@app.command()
def snapshot(
    name: Name,
    directory: Annotated[Path, typer.Argument(help="Directory to make.", metavar="DIR")],
    paused: Annotated[bool, typer.Option("--paused", help="Stop the guest for all of it.")] = False,
    compress: Compress = "none",
    json: Json = False,
) -> int:
    """Save the guest NAME in DIR while it runs on."""
    from . import transfer

    return transfer.snapshot(name, directory, compress, paused=paused, as_json=json)


@app.command()
def restore(
    directory: Directory,
    name: NewName = "",
    serial: Serial = "stdio",
    clone: Annotated[
        bool, typer.Option("--clone", help="As another guest, with a UUID of its own, beside any number of others.")
    ] = False,
    clock: Annotated[
        ClockPolicy, typer.Option(help="Go on from the saved time, or count the time since by the host's clock.")
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


@app.command("list")
def list_(json: Json = False) -> int:
    """List the running VMs."""
    from . import query

    return query.list_vms(as_json=json)


@app.command("query")
def query_(name: Name, json: Json = False, verbose: Verbose = False) -> int:
    """Show the state of NAME, and its last job."""
    from . import query

    return query.query(name, as_json=json, verbose=verbose)


@app.command()
def pause(name: Name) -> int:
    """Pause the guest NAME."""
    from . import query

    return query.command(name, "stop", "paused")


@app.command()
def resume(name: Name) -> int:
    """Let the paused guest NAME run on."""
    from . import query

    return query.command(name, "cont", "running")


@app.command("console")
def console_(
    name: Name,
    escape: Annotated[
        str, typer.Option(help="Key that detaches: Ctrl-A to Ctrl-_, or none.", metavar="KEY")
    ] = "Ctrl-]",
) -> int:
    """Attach this terminal to the serial port of NAME. Input from a pipe goes through, and its end detaches.

    Exit status: 0 detached, 6 the guest moved away, else that of the VM's process when the guest ended.
    """
    from . import console

    return console.console(name, escape)


@app.command()
def cancel(name: Name) -> int:
    """Cancel the move or snapshot of NAME. The guest runs on."""
    from . import query

    return query.command(name, "x-kvmigrate-cancel", "cancelling")


@app.command()
def balloon(
    name: Name,
    size: Annotated[str, typer.Argument(help="How much memory to keep, such as 512M.", metavar="[SIZE]")] = "",
    json: Json = False,
) -> int:
    """Ask the guest NAME to give memory up. Without SIZE, show how much it has and is to keep."""
    from . import query

    return query.balloon(name, size, as_json=json)


@app.command()
def powerdown(name: Name) -> int:
    """Press the power button of the guest NAME. Its own system then shuts it down, or not."""
    from . import query

    return query.command(name, "system_powerdown", "power button pressed")


@app.command()
def reset(name: Name) -> int:
    """Reset the guest NAME. It boots anew from the same files; what it has not written to its disks is lost."""
    from . import query

    return query.command(name, "system_reset", "reset")


@app.command()
def stop(name: Name) -> int:
    """End the guest NAME and its process."""
    from . import query

    return query.stop(name)


@app.command()
def inspect(directory: Directory, json: Json = False) -> int:
    """Show what the snapshot DIR holds. Registers, MSRs, devices and memory ranges."""
    from . import snapshots

    return snapshots.inspect(directory, as_json=json)


@app.command()
def verify(directory: Directory, json: Json = False) -> int:
    """Check all of the snapshot DIR. Exit status 1 when something is wrong, with what and where."""
    from . import snapshots

    return snapshots.verify(directory, as_json=json)


@app.command()
def resolve(
    name: Annotated[str, typer.Argument(help="Name of the VM in doubt.", metavar="NAME")],
    run: Annotated[bool, typer.Option("--run", help="The guest runs nowhere else: run it here.")] = False,
    discard: Annotated[bool, typer.Option("--discard", help="The guest runs elsewhere: discard it here.")] = False,
) -> int:
    """Settle who owns the guest NAME. For a migration whose outcome never became known here."""
    from . import resolve as verb

    return verb.resolve(name, run=run, discard=discard)


@app.command()
def doctor(json: Json = False) -> int:
    """Say what this host can do and how to mend it. Exit status 1 when something needed is missing."""
    from . import doctor as verb

    return verb.doctor(as_json=json)


@app.command("cpu-baseline")
def cpu_baseline(
    hosts: Annotated[list[Path], typer.Argument(help="What doctor --json said on each host.", metavar="FILE…")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="File to write, for run --cpu.")] = None,
    json: Json = False,
) -> int:
    """Find the CPU that all hosts have in common. A guest that is run with it can move to each of them."""
    from . import baseline as verb

    return verb.cpu_baseline(hosts, output, as_json=json)


@app.command()
def demo(
    memory: Annotated[str, typer.Option(help="Size of guest RAM.")] = "256M",
    verbose: Verbose = False,
) -> int:
    """Watch a busy guest move between two processes. Over TCP, with a check that it never noticed."""
    from . import demo as verb

    return verb.demo(memory, verbose=verbose)


def main() -> None:
    """The console script: run a verb, and turn whatever it raises into one line and an exit status."""
    sys.exit(run_command(sys.argv[1:]))


def run_command(arguments: list[str]) -> int:
    """The exit status of ``kvmigrate ARGUMENTS``. Errors are told in one line on standard error."""
    try:
        return app(arguments or ["--help"], prog_name="kvmigrate", standalone_mode=False) or 0
    except KvmigrateError as error:
        return _fail(error, str(error), 2)
    except (KeyboardInterrupt, typer.Abort) as error:
        return _fail(error, "interrupted", 130)
    except BrokenPipeError:
        # Nobody reads standard output any more; keep the interpreter from saying so at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 141
    except Exception as error:
        usage = getattr(error, "format_message", None)
        if usage is not None:  # a mistake in the options, of Typer's own class
            print(f"kvmigrate: {' '.join(usage().split())} (see kvmigrate --help)", file=sys.stderr)
            return 2
        return _fail(error, f"unexpected {type(error).__name__}: {error} (KVMIGRATE_TRACEBACK=1 shows where)", 2)


def _fail(error: BaseException, text: str, status: int) -> int:
    if os.environ.get("KVMIGRATE_TRACEBACK"):
        import traceback

        traceback.print_exception(error, file=sys.stderr)
    print("kvmigrate: " + " ".join(text.split()), file=sys.stderr)
    return status
