"""The command answers at once: nothing heavy is imported for its help."""

from __future__ import annotations

import subprocess
import sys
import time

HELP_S = 0.3
HEAVY = ("rich", "msgpack", "zstandard", "xxhash", "asyncio", "kvmigrate._core", "kvmigrate.machine")
SHOW_MODULES = (
    "import sys; from kvmigrate.cli.app import run_command; status = run_command(['--help']); "
    "print(*sys.modules, file=sys.stderr); sys.exit(status)"
)


def test_help_imports_nothing_heavy() -> None:
    shown = subprocess.run([sys.executable, "-c", SHOW_MODULES], check=True, capture_output=True, text=True)
    assert "migrate" in shown.stdout
    loaded = set(shown.stderr.split())
    assert "kvmigrate.cli.app" in loaded
    assert [name for name in HEAVY if name in loaded] == []


def test_help_takes_less_than_300_ms_of_processor_time() -> None:
    taken = []
    for _ in range(5):
        start = time.monotonic()
        process = subprocess.Popen([sys.executable, "-m", "kvmigrate", "--help"], stdout=subprocess.DEVNULL)
        assert process.wait() == 0
        taken.append(time.monotonic() - start)
    # The least of several: what the machine does besides must not count.
    assert min(taken) < HELP_S
