"""Variants of the C core: the same sources, built with other flags in a directory of their own, and tested there."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
IGNORED = shutil.ignore_patterns("*.so", "__pycache__", "_core.c", "*.o")


def build(directory: Path, cflags: str) -> Path:
    """Copy the package and the tests of memory, devices and state to ``directory``; build the C core there with
    ``cflags``."""
    for name in ("kvmigrate", "tests/memory", "tests/devices", "tests/kvm"):
        shutil.copytree(ROOT / name, directory / name, ignore=IGNORED)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "tests/__init__.py", "tests/backends.py"):
        shutil.copy(ROOT / name, directory / name)
    built = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
        cwd=directory,
        env=os.environ | {"KVMIGRATE_CFLAGS": cflags},
        check=False,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert built.returncode == 0, built.stderr
    return directory


def run_pytest(
    directory: Path, arguments: Sequence[str], extra_env: dict[str, str], timeout_s: float
) -> subprocess.CompletedProcess[str]:
    """pytest over the variant in ``directory``, in a process of its own that may end without a word from pytest."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-s", "-p", "no:cacheprovider", *arguments]
    env = os.environ | {"PYTHONPATH": str(directory), "PYTHONDONTWRITEBYTECODE": "1"} | extra_env
    return subprocess.run(
        command, cwd=directory, env=env, check=False, capture_output=True, text=True, timeout=timeout_s
    )
