"""The verbs that start a long job in a running VM and watch it: send, check and snapshot."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import Compression, MigrationParameters, parse_duration_ms, parse_rate, parse_size
from ..control.client import Client
from ..errors import KvmigrateError, MigrationError, SnapshotError
from . import report, show
from .address import parse_address

if TYPE_CHECKING:
    from rich.progress import Progress

LOSSES = 1
"""The exit status of a check that found something that would be lost."""
POLL_S = 0.22
"""How often progress is asked for: often enough for the eye, too seldom to disturb the VM's process."""
ENDED = frozenset({"completed", "failed", "cancelled"})
IN_DOUBT_S = 3.0
"""How long an unknown outcome is waited out before it is reported: the VM goes on asking without us."""


def send(
    name: str,
    address: str,
    downtime_limit: str,
    bandwidth: str,
    max_rounds: int,
    timeout: str,
    compress: str,
    delta_cache: str,
    connections: int,
    *,
    zerocopy: bool,
    as_json: bool,
    verbose: bool,
) -> int:
    """Migrate ``name`` to ``address``, show how it goes and what came of it. Returns the exit status."""
    target = parse_address(address)
    parameters = MigrationParameters(
        downtime_limit_ms=parse_duration_ms(downtime_limit),
        bandwidth_bytes_s=parse_rate(bandwidth),
        max_rounds=max_rounds,
        compression=Compression.parse(compress),
        timeout_ms=parse_duration_ms(timeout),
        delta_cache_bytes=parse_size(delta_cache),
        connections=connections,
        zero_copy=zerocopy,
    )
    with Client.of(name) as vm:
        wanted = {"events": True, "zero-copy-send": parameters.zero_copy}
        switch = [{"capability": name, "state": state} for name, state in wanted.items()]
        vm.execute("migrate-set-capabilities", {"capabilities": switch})
        vm.execute("migrate-set-parameters", _parameters(parameters))
        job = _watch(vm, f"sending {name}", "migrate", {"uri": str(target)})
    return _conclude(job, MigrationError, as_json=as_json, verbose=verbose)


def _parameters(parameters: MigrationParameters) -> dict[str, Any]:
    return {
        "downtime-limit": _whole_ms(parameters.downtime_limit_ms),
        "max-bandwidth": parameters.bandwidth_bytes_s,
        "multifd-channels": parameters.connections,
        "x-kvmigrate-max-rounds": parameters.max_rounds,
        "x-kvmigrate-compression": str(parameters.compression),
        "x-kvmigrate-delta-cache": parameters.delta_cache_bytes,
        "x-kvmigrate-timeout": _whole_ms(parameters.timeout_ms),
    }


def _whole_ms(ms: float) -> int:
    """As QMP has it."""
    return max(round(ms), 1)


def check(name: str, address: str, timeout: str, *, as_json: bool, verbose: bool) -> int:
    """Have ``address`` try the state of ``name``. Returns the exit status: 1 when the guest could not go on there."""
    target, timeout_ms = parse_address(address), _whole_ms(parse_duration_ms(timeout))
    with Client.of(name) as vm:
        vm.execute("migrate-set-parameters", {"x-kvmigrate-timeout": timeout_ms})
        job = _watch(vm, f"checking {name}", "x-kvmigrate-check", {"uri": str(target)})
    _conclude(job, MigrationError, as_json=as_json, verbose=verbose)
    return 0 if job["result"]["fits"] else LOSSES


def snapshot(name: str, directory: Path, compress: str, *, paused: bool, as_json: bool) -> int:
    """Take a snapshot of ``name``, show how it goes and what came of it. Returns the exit status."""
    arguments = {
        "directory": str(directory.absolute()),
        "paused": paused,
        "compression": str(Compression.parse(compress)),
    }
    with Client.of(name) as vm:
        job = _watch(vm, f"saving {name}", "x-kvmigrate-snapshot", arguments)
    return _conclude(job, SnapshotError, as_json=as_json, verbose=False)


def _conclude(job: Mapping[str, Any], failure: type[KvmigrateError], *, as_json: bool, verbose: bool) -> int:
    """Print the result of an ended job, or raise ``failure`` with the reason why there is none."""
    if as_json:
        show.print_json({key: job[key] for key in job.keys() - {"progress", "result"}} | job.get("result", {}))
    if job["status"] != "completed":
        raise failure(_reason(job))
    if not as_json:
        report.job(job, verbose=verbose)
    return 0


def _reason(job: Mapping[str, Any]) -> str:
    told = job.get("error", {}).get("desc") or job.get("result", {}).get("error-desc")
    return str(told or f"the {job['kind']} ended as {job['status']}")


def _watch(vm: Client, what: str, command: str, arguments: Mapping[str, Any]) -> Mapping[str, Any]:
    """Start a job by ``command`` and follow it until it ends, with a progress bar; Ctrl-C cancels it. Returns its last
    report."""
    # The bar comes first: loading what draws it takes a processor that a short blackout needs.
    with _interrupts() as interrupts, _bar() as bar:
        task = bar.add_task(what, total=1.0, round=0, rate="", left="", eta="")
        vm.execute(command, arguments)
        doubt_since = None
        while True:
            _pause_until_news(vm)
            if interrupts:
                interrupts.clear()
                vm.execute("x-kvmigrate-cancel")
            job: Mapping[str, Any] = vm.execute("x-kvmigrate-job")
            _draw(bar, task, job)
            doubt_since = (doubt_since or time.monotonic()) if job["status"] == "commit-unknown" else None
            if job["status"] in ENDED or (doubt_since and time.monotonic() - doubt_since > IN_DOUBT_S):
                return job


@contextmanager
def _interrupts() -> Iterator[list[int]]:
    """Collect Ctrl-C in place of raising it anywhere: whether it still can cancel is for the VM to say."""
    found: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: found.append(number))
    try:
        yield found
    finally:
        signal.signal(signal.SIGINT, before)


def _pause_until_news(vm: Client) -> None:
    """Wait for the next look, cut short only by the end: an event in the blackout must not make us disturb it."""
    deadline = time.monotonic() + POLL_S
    while (left := deadline - time.monotonic()) > 0:
        event = vm.wait_event(left)
        if event is not None and event.get("data", {}).get("status") in ENDED:
            return


def _draw(bar: Progress, task: Any, job: Mapping[str, Any]) -> None:
    progress = job.get("progress")
    if not progress:
        return
    bar.update(
        task,
        # The VM keeps the fraction from falling; nothing here may make it.
        completed=1.0 if job["status"] == "completed" else progress["fraction"],
        round=progress["round"],
        rate=show.rate(progress["rate-bytes-s"]),
        left=f"{show.size(progress['remaining-bytes'])} left",
        eta="" if progress["eta-ms"] is None else show.duration(progress["eta-ms"]),
    )


def _bar() -> Progress:
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

    console = show.console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        TextColumn("round {task.fields[round]}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[rate]}"),
        TextColumn("{task.fields[left]}"),
        TextColumn("{task.fields[eta]}"),
        console=console,
        refresh_per_second=5,
        disable=not console.is_terminal,
    )
