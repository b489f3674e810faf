"""The C core under AddressSanitizer and UndefinedBehaviorSanitizer, driven by the tests of memory and devices."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from .variant import build, run_pytest

SANITIZE = "-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -g -O1"
OPTIONS = {
    # Python itself gives little back before it ends, and its allocator would hide overruns of small buffers.
    "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1:exitcode=99",
    "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1:exitcode=99",
    "PYTHONMALLOC": "malloc",
}


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("sanitized"), SANITIZE)


@pytest.fixture(scope="module")
def env() -> dict[str, str]:
    """The runtimes must be loaded before Python's own libraries."""
    names = [
        subprocess.run(
            ["gcc", f"-print-file-name={name}"], capture_output=True, text=True, check=True, timeout=20
        ).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    assert all(Path(name).is_absolute() for name in names), f"the compiler has no sanitizers: {names}"
    return OPTIONS | {"LD_PRELOAD": " ".join(names)}


@pytest.mark.timeout(200)
def test_the_memory_tests_find_no_fault_under_the_sanitizers(sanitized: Path, env: dict[str, str]) -> None:
    # Those that time things or drive a guest for long are about the kernel's behaviour, not about the core's memory.
    skipped = "bandwidth or untouched or while_rounds_run or counters_can"
    result = run_pytest(sanitized, ["tests/memory", "-k", f"not ({skipped})"], env, timeout_s=180)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    assert " passed" in result.stdout


@pytest.mark.timeout(200)
def test_devices_and_hostile_drivers_find_no_fault_under_the_sanitizers(sanitized: Path, env: dict[str, str]) -> None:
    result = run_pytest(sanitized, ["tests/devices/virtio", "tests/devices/test_serial.py"], env, timeout_s=180)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    assert " passed" in result.stdout


OVERRUN = """
from kvmigrate._core import ffi, lib

def test_overrun():
    lib.kmig_hash(ffi.new("uint8_t[]", 64), 4096)
"""


def test_the_sanitizers_do_watch_the_core(sanitized: Path, env: dict[str, str]) -> None:
    """A read past the end of a buffer must end the process, or the test above proves nothing."""
    (sanitized / "test_overrun.py").write_text(OVERRUN)
    result = run_pytest(sanitized, ["test_overrun.py"], env, timeout_s=60)
    assert result.returncode == 99 and "heap-buffer-overflow" in result.stderr
