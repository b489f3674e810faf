"""What a guest has to wait for when it is restored: what the command imports before the guest runs."""

from __future__ import annotations

import subprocess
import sys

import pytest

from .command import Host
from .test_moves import busy_guest

pytestmark = pytest.mark.kvm

UP_TO_THE_FIRST_INSTRUCTION = """
import os, sys
from kvmigrate.machine.machine import Machine

def show(machine):
    print(*sys.modules, flush=True)
    os._exit(0)

Machine.resume = show
from kvmigrate.cli.app import main
main()
"""
TOO_DEAR = {
    *("typer", "rich", "argparse", "dataclasses", "inspect", "ast", "asyncio", "logging", "json", "uuid", "platform"),
    *("subprocess", "shutil", "tempfile", "ctypes", "ssl", "importlib.metadata", "zstandard", "email", "traceback"),
}
"""Of other people's: each takes milliseconds, some take tens."""
NOT_FOR_IT = {
    *("kvmigrate.cli.full", "kvmigrate.cli.report", "kvmigrate.control.session", "kvmigrate.control.qmp"),
    *("kvmigrate.boot", "kvmigrate.precopy", "kvmigrate.memory.prefault", "kvmigrate.machine.trial"),
    *("kvmigrate.migration.source", "kvmigrate.migration.destination", "kvmigrate.migration.wire"),
    *("kvmigrate.snapshot.save", "kvmigrate.snapshot.frames", "kvmigrate.snapshot.verify"),
}
"""Of ours: what other verbs use, and what a VM's process uses once its guest runs."""


def test_a_restored_guest_does_not_wait_for_what_it_does_not_need(host: Host) -> None:
    with busy_guest(host, "one"):
        assert host("snapshot", "one", "snap").status == 0
        host("stop", "one")
    done = subprocess.run(
        [sys.executable, "-c", UP_TO_THE_FIRST_INSTRUCTION, "restore", "snap", "--clone", "--serial", "null"],
        check=True,
        capture_output=True,
        text=True,
        cwd=host.directory,
        env={"XDG_RUNTIME_DIR": str(host.run_dir)},
    )
    loaded = set(done.stdout.split())
    assert "kvmigrate.snapshot.load" in loaded
    assert loaded & (TOO_DEAR | NOT_FOR_IT) == set()
