"""The command answers at once: nothing heavy is imported for its help."""

from __future__ import annotations

import os
import subprocess
import sys

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


def processor_s(*arguments: str) -> float:
    """The processor time of Python with ``arguments``."""
    process = subprocess.Popen([sys.executable, *arguments], stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return used.ru_utime + used.ru_stime


def test_help_costs_little_more_than_its_parser() -> None:
    # Against the parser's own import on the same machine, in turn, since that may be slow or busy by turns.
    both = [
        (processor_s("-m", "kvmigrate", "--help"), processor_s("-c", "import typer, typer.core, dataclasses"))
        for _ in range(6)
    ]
    ours, parsers = (min(times) for times in zip(*both, strict=True))
    assert ours < 2 * parsers, both
