"""The verbs that ask a running VM something or tell it a single thing: list, query, pause, resume, cancel, stop."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from ..config import parse_size
from ..control import runtime
from ..control.client import Client
from ..errors import ControlError
from . import report, show

STOP_TIMEOUT_S = 20.0


def list_vms(*, as_json: bool) -> int:
    """Print name, run state, memory, vCPUs and pid of every running VM of this user."""
    rows = [row for name in runtime.running_names() if (row := _describe(name)) is not None]
    if as_json:
        show.print_json({"vms": rows})
    elif rows:
        show.table("", ["name", "state", "memory", "vCPUs", "pid"], [_cells(row) for row in rows], right=(2, 3, 4))
    else:
        print("no VM is running")
    return 0


def _cells(row: Mapping[str, Any]) -> list[str]:
    # A process that waits for a guest has no memory and no vCPUs yet.
    machine = (show.size(row["memory-bytes"]), str(row["vcpus"])) if row["vcpus"] else ("–", "–")
    return [row["name"], row["status"], *machine, str(row["pid"])]


def _describe(name: str) -> dict[str, Any] | None:
    """A row of the list; None when the VM ended meanwhile."""
    try:
        with Client.of(name) as vm:
            return {
                "name": name,
                "status": vm.execute("query-status")["status"],
                "memory-bytes": vm.execute("query-memory-size-summary")["base-memory"],
                "vcpus": len(vm.execute("query-cpus-fast")),
                "pid": runtime.owner_pid(name),
            }
    except ControlError:
        pid = runtime.owner_pid(name)
        return {"name": name, "status": "no answer", "memory-bytes": 0, "vcpus": 0, "pid": pid} if pid else None


def query(name: str, *, as_json: bool, verbose: bool) -> int:
    """Print the run state of ``name`` and the figures of its last migration or snapshot."""
    with Client.of(name) as vm:
        facts = {
            "name": name,
            "status": vm.execute("query-status")["status"],
            "uuid": vm.execute("query-uuid")["UUID"],
            "memory-bytes": vm.execute("query-memory-size-summary")["base-memory"],
            "vcpus": len(vm.execute("query-cpus-fast")),
            "pid": runtime.owner_pid(name),
        }
        job = vm.execute("x-kvmigrate-job")
    if as_json:
        show.print_json({**facts, "job": job})
        return 0
    shown = {**facts, "memory-bytes": show.size(facts["memory-bytes"])}
    show.table("", ["", ""], [[key.replace("-bytes", ""), str(value)] for key, value in shown.items()])
    report.job(job, verbose=verbose)
    return 0


def balloon(name: str, size: str, *, as_json: bool) -> int:
    """Ask the guest ``name`` to keep no more than ``size`` of memory, if any is given; print how far it is."""
    with Client.of(name) as vm:
        if size:
            vm.execute("balloon", {"value": parse_size(size)})
        told = vm.execute("query-balloon")
        whole = vm.execute("query-memory-size-summary")["base-memory"]
    facts = {
        "name": name,
        "target-bytes": told["x-kvmigrate-target"],
        "actual-bytes": told["actual"],
        "memory-bytes": whole,
        "driver": told["x-kvmigrate-driver"],
    }
    if as_json:
        show.print_json(facts)
    else:
        target, actual = show.size(facts["target-bytes"]), show.size(facts["actual-bytes"])
        nobody = "" if facts["driver"] else "; it has no balloon driver, or that is not ready"
        print(f"{name}: has {actual} of {show.size(whole)}, is to keep {target}{nobody}")
    return 0


def command(name: str, qmp_command: str, done: str) -> int:
    """Send one QMP command without arguments and say what ``name`` is now."""
    with Client.of(name) as vm:
        vm.execute(qmp_command)
    print(f"{name}: {done}")
    return 0


def stop(name: str) -> int:
    """End the guest ``name`` and wait until its process gave the name back."""
    with Client.of(name) as vm:
        vm.execute("quit")
        vm.wait_closed(STOP_TIMEOUT_S)
    deadline = time.monotonic() + STOP_TIMEOUT_S
    while (pid := runtime.owner_pid(name)) and time.monotonic() < deadline:
        time.sleep(0.02)
    if pid:
        raise ControlError(f"VM {name} did not end within {STOP_TIMEOUT_S:.0f} s: kill it with kill -9 {pid}")
    print(f"{name}: stopped")
    return 0
