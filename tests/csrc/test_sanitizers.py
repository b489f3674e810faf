"""The C core under AddressSanitizer and UndefinedBehaviorSanitizer: the tests of memory, devices and state drive it."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
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

# Those that time things or drive a guest for long are about the kernel's behaviour, not about the core's memory.
LEFT_OUT = "bandwidth or untouched or while_rounds_run or counters_can"
RUNS = {
    "memory": ["tests/memory", "-k", f"not ({LEFT_OUT})"],
    "devices": ["tests/devices/virtio", "tests/devices/test_serial.py"],
    "state": [f"tests/kvm/test_{name}.py" for name in ("layouts", "structs", "images")],
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


@pytest.fixture(scope="module")
def results(sanitized: Path, env: dict[str, str]) -> Iterator[dict[str, Future[subprocess.CompletedProcess[str]]]]:
    """All runs at once: each keeps little more than one processor busy."""
    with ThreadPoolExecutor(len(RUNS)) as pool:
        yield {name: pool.submit(run_pytest, sanitized, arguments, env, 180) for name, arguments in RUNS.items()}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", RUNS)
def test_the_tests_of_memory_devices_and_state_find_no_fault_under_the_sanitizers(
    results: dict[str, Future[subprocess.CompletedProcess[str]]], name: str
) -> None:
    result = results[name].result()
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
