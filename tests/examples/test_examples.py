"""Every example runs to its end against the real thing and shows what it says it shows."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
# What each prints when the guest came through unharmed.
SHOWN = {
    "boot_an_image.py": ("OK updates", "the guest powered off: exit status 0"),
    "migrate_two_processes.py": ("source: round 1:", "the guest stood still for", "destination: OK updates"),
    "snapshot_and_inspect.py": ("saved in", "rip 0x", "verify: good", "restored: OK updates"),
}

pytestmark = pytest.mark.kvm


def test_every_example_is_run_here_or_in_an_emulated_host() -> None:
    inside = (EXAMPLES.parent / "tests/emulated/inside/example.py").read_text()
    for path in EXAMPLES.iterdir():
        assert path.name in SHOWN or f'"sh", "examples/{path.name}"' in inside, path


@pytest.mark.parametrize("name", SHOWN)
def test_example_runs(name: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, EXAMPLES / name], cwd=tmp_path, check=False, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert [text for text in SHOWN[name] if text not in done.stdout] == [], done.stdout
    assert done.stderr == ""
