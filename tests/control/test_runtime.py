"""Names, locks and the runtime directory: nobody else gets in, nothing is left behind, and no name is held twice."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from kvmigrate.control import runtime
from kvmigrate.errors import ConfigError, ControlError, HostError


@pytest.fixture(autouse=True)
def _own_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))


def test_the_directory_is_made_private() -> None:
    path = runtime.open_runtime_dir()
    assert path.stat().st_mode & 0o777 == 0o700


def test_a_directory_open_to_others_is_refused(tmp_path: Path) -> None:
    (tmp_path / "kvmigrate").mkdir(mode=0o750)
    with pytest.raises(ControlError, match="open to other users"):
        runtime.open_runtime_dir()


def test_a_symbolic_link_in_its_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    (tmp_path / "kvmigrate").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ControlError, match="symbolic link"):
        runtime.claim("a")


def test_a_file_in_its_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "kvmigrate").write_text("")
    with pytest.raises(ControlError, match="not a directory"):
        runtime.open_runtime_dir()


def test_a_missing_parent_is_an_error_that_names_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "absent"))
    with pytest.raises(HostError, match="absent"):
        runtime.open_runtime_dir()
    assert runtime.running_names() == []


def test_a_relative_runtime_directory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", "run")
    with pytest.raises(ConfigError, match="absolute"):
        runtime.runtime_dir()


def test_a_name_is_held_once(tmp_path: Path) -> None:
    held = runtime.claim("vm.1")
    with pytest.raises(ControlError, match=r"vm\.1 is running already"):
        runtime.claim("vm.1")
    assert runtime.running_names() == ["vm.1"]
    assert runtime.owner_pid("vm.1") == os.getpid()
    held.release()
    assert list((tmp_path / "kvmigrate").iterdir()) == []
    runtime.claim("vm.1").release()


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".hidden", "-x", "a" * 64, "ä", "a\n"])
def test_what_is_no_name_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="not a name"):
        runtime.claim(name)
    with pytest.raises(ConfigError, match="not a name"):
        runtime.socket_path(name)


def test_a_path_too_long_for_a_socket_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = tmp_path / ("d" * 100)
    deep.mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(deep))
    with pytest.raises(ConfigError, match="too long"):
        runtime.claim("a")
    assert list((deep / "kvmigrate").iterdir()) == []


KILLED = """
import os, sys
from kvmigrate.control import runtime
held = runtime.claim("dead")
held.socket_path.write_text("")
(held.directory / ".dead.journal.tmp").write_text("")
print("ready", flush=True)
sys.stdin.read()
"""


def test_a_killed_owner_leaves_no_claim_and_its_files_are_swept(tmp_path: Path) -> None:
    owner = subprocess.Popen([sys.executable, "-c", KILLED], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert owner.stdout is not None
    assert owner.stdin is not None
    assert owner.stdout.readline() == b"ready\n"
    assert runtime.is_running("dead")
    owner.kill()
    owner.wait()
    owner.stdout.close()
    owner.stdin.close()
    assert not runtime.is_running("dead")
    with pytest.raises(ControlError, match="no VM named dead"):
        runtime.socket_path("dead")
    assert runtime.running_names() == []
    assert list((tmp_path / "kvmigrate").iterdir()) == []


def test_claims_that_race_with_releases_never_meet() -> None:
    """Each claim counts itself in and out; two at once would show as a count of 2."""
    inside, most, lock = 0, 0, threading.Lock()

    def contend() -> None:
        nonlocal inside, most
        for _ in range(200):
            try:
                held = runtime.claim("contended")
            except ControlError:
                continue
            with lock:
                inside += 1
                most = max(most, inside)
            with lock:
                inside -= 1
            held.release()

    threads = [threading.Thread(target=contend) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1


def test_an_unknown_name_is_told_with_the_names_there_are() -> None:
    held = runtime.claim("here")
    with pytest.raises(ControlError, match="no VM named there is running here: running are here"):
        runtime.socket_path("there")
    held.release()
