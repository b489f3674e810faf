"""The example that moves a Linux does what it says, on a host with taps and a bridge."""

from __future__ import annotations

import os
import re
import subprocess

from tests.emulated.guest import INITRD, KERNEL

from .storage import TAPS, bridge

__all__ = ["bridge"]


def test_the_example_boots_checks_and_moves_a_linux(bridge: None) -> None:
    command = ["sh", "examples/linux_guest.sh", KERNEL, INITRD, *TAPS]
    environment = os.environ | {"READY": "READY"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "can go on" in done.stdout
    wrote = re.search(r"the guest wrote (\d+) bytes here and (\d+) there$", done.stdout, re.MULTILINE)
    assert wrote is not None and int(wrote[1]) > 0 and int(wrote[2]) > 0, done.stdout
