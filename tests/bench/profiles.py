"""Profiles of the hot paths: where the processors are during a move, and what a start of kvmigrate imports."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

from .goals import Group
from .lineage import READY_S, measure_move
from .link import Loopback
from .moves import OURS, TIMEOUT_S
from .samples import Sample, Series
from .scratch import scratch
from .sizes import filled
from .vm import Vm
from .warm import warm

FREQUENCY_HZ = 1999
LINES = 40
IMPORT = re.compile(r"import time:\s*(\d+) \|\s*(\d+) \|\s*(\S+)")


@contextmanager
def profile(_: Path) -> Iterator[Group]:
    """One move under perf, both processes; one import of the command line under -X importtime."""
    if shutil.which("perf") is None:
        raise OSError("perf is not installed")
    title = "Profile: a move of 1 GiB of incompressible data, both processes under perf"
    group = Group(title, [], ["total ms"])
    group.rows = [Series("kvmigrate under perf", partial(_profiled, group.texts), ours=True)]
    group.texts["profile-imports.txt"] = imports()
    yield group


def _profiled(texts: dict[str, str]) -> Sample:
    guest, link, variant = filled(1024), Loopback(), OURS[0]
    with scratch() as directory, ExitStack() as stack:
        source = variant.boot(directory / "s", guest, [])
        stack.callback(source.close)
        source.heartbeats.wait_first(READY_S)
        uri = link.uri(1)
        destination = variant.receive(directory / "d", guest, [], uri)
        stack.callback(destination.close)
        variant.prepare(source)
        warm(guest.data_mib)
        with perf(directory / "perf.data", source, destination):
            sample = measure_move(source, destination, uri, TIMEOUT_S)
        for name, vm in (("source", source), ("destination", destination)):
            texts[f"profile-{name}.txt"] = _report(directory / "perf.data", vm.pid)
    return sample


@contextmanager
def perf(path: Path, *vms: Vm) -> Iterator[None]:
    """Sample the processes by the clock: a virtual machine often has no counters. Waits until perf is ready."""
    orders, answers = os.pipe(), os.pipe()
    command = ["perf", "record", "-q", "-e", "cpu-clock", "-F", str(FREQUENCY_HZ), "-o", str(path), "-D", "-1"]
    command += ["-p", ",".join(str(vm.pid) for vm in vms), f"--control=fd:{orders[0]},{answers[1]}"]
    recorder = subprocess.Popen(command, stderr=subprocess.DEVNULL, pass_fds=(orders[0], answers[1]))
    try:
        os.close(answers[1])
        os.write(orders[1], b"enable\n")
        if not os.read(answers[0], 16):
            raise OSError("perf does not record here")
        yield
    finally:
        recorder.send_signal(signal.SIGINT)
        recorder.wait(READY_S)
        for fd in (*orders, answers[0]):
            os.close(fd)


def _report(path: Path, pid: int) -> str:
    command = ["perf", "report", "-i", str(path), "--stdio", "--no-children", "-g", "none", "--pid", str(pid)]
    command += ["--percentage", "relative"]
    found = subprocess.run([*command, "--sort", "dso,symbol"], check=False, capture_output=True, text=True)
    lines = [
        re.sub(r"(\s+-)*\s*$", "", line) for line in found.stdout.splitlines() if line and not line.startswith("#")
    ]
    head = f"Share of the process's samples (perf, cpu-clock, {FREQUENCY_HZ} Hz) by library and function"
    return "\n".join([head, *lines[:LINES], ""])


def imports() -> str:
    """The modules whose own code takes longest to import before a guest is restored, in microseconds."""
    command = [sys.executable, "-X", "importtime", "-m", "kvmigrate", "restore", "absent"]
    with tempfile.TemporaryDirectory() as directory:
        environment = {**os.environ, "XDG_RUNTIME_DIR": directory}
        told = subprocess.run(command, check=False, capture_output=True, text=True, env=environment).stderr
    found = sorted(((int(own), name) for own, _, name in IMPORT.findall(told)), reverse=True)
    head = [f"{sum(own for own, _ in found)} us in {len(found)} modules, by the time that each takes itself"]
    return "\n".join([*head, *(f"{own:8} {name}" for own, name in found[:LINES]), ""])
