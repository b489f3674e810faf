"""``python -m kvmigrate``, with what a test wants to see or to break from inside the process.

KVMIGRATE_TEST_WITNESS=DIR    write a digest of the guest to DIR when it has stopped for good, and before it first runs
KVMIGRATE_TEST_LOG_MODE=MODE  fetch the dirty log in this mode: GET or CLEAR
KVMIGRATE_TEST_HOST_WRITES=1  write to a running guest's memory from the VMM
KVMIGRATE_TEST_FAULT=NAME     plant the fault NAME of tests/planted/faults.py
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

# At the end: a build of the package that is under test comes before the checkout.
sys.path.append(str(Path(__file__).parents[2]))


def prepare() -> None:
    """Do what the environment asks for, before anything of kvmigrate runs."""
    from tests.oracle import hooks

    if directory := os.environ.get("KVMIGRATE_TEST_WITNESS"):
        hooks.witness(Path(directory))
    if mode := os.environ.get("KVMIGRATE_TEST_LOG_MODE"):
        hooks.use_log_mode(mode)
    if os.environ.get("KVMIGRATE_TEST_HOST_WRITES"):
        hooks.write_from_host()
    if fault := os.environ.get("KVMIGRATE_TEST_FAULT"):
        from tests.planted import faults

        faults.plant(fault)


if __name__ == "__main__":
    if any(name.startswith("KVMIGRATE_TEST_") for name in os.environ):
        prepare()
    from kvmigrate.cli.app import main

    main()
