"""The emulated host's file system: this Python, its libraries, kvmigrate from a wheel, and the tests.

Two archives, which the kernel unpacks one over the other: a base that is kept, and a job that is made for each run.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from importlib import metadata
from importlib.metadata import Distribution
from pathlib import Path

from .cpio import Archive
from .guest import add_guest
from .kernel import Kernel

ROOT = Path(__file__).resolve().parents[2]
SITE = "/site"
TESTS = "/project"
RESULT = "/tmp/result.xml"
"""What the command writes here, the host sends out by its second serial port."""
# What no test inside needs, by the name of a file or directory at the top of where it lies.
STDLIB_LEFT_OUT = {"test", "idlelib", "tkinter", "lib2to3", "ensurepip", "turtledemo", "site-packages", "dist-packages"}
STDLIB_LEFT_OUT |= {"pydoc_data", "sqlite3", "distutils"}
LEFT_OUT = re.compile(r"\.a$|^config-|^_tkinter|^_test|\.opt-\d\.pyc$")
# What is installed inside: these with all that they require.
REQUIREMENTS = ("kvmigrate", "pytest", "pytest-timeout", "hypothesis", "qemu.qmp")
STRIP_FROM_BYTES = 256 << 10
TOOLS = (
    "mount", "insmod", "ifconfig", "poweroff", "mkdir", "cat", "sleep", "ls", "mktemp", "dd", "grep", "rm", "wc",
    "stty", "chroot",
)  # fmt: skip
OWN_TOOLS = ("as", "ld", "ip", "pasta", "dash")
"""This machine's, since BusyBox has none or one that knows less: its shell takes its own tools before those of PATH."""
INIT = """#!/bin/sh
export PATH=/bin:/site/bin HOME=/root TMPDIR=/tmp LANG=C.UTF-8
# The kernel's first root can have no other in its place (pivot_root(2)), which pasta wants; one that lies over it can.
[ -d /first ] || {{ mkdir /first; mount -o bind / /first; cd /first; mount -o move . /; exec chroot . /init; }}
mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev
mkdir -p /dev/pts /dev/shm
mount -t devpts pts /dev/pts; mount -t tmpfs shm /dev/shm; mount -t tmpfs run /run; mount -t tmpfs tmp /tmp
for module in {modules}; do insmod /modules/$module.ko; done
ifconfig lo 127.0.0.1 up
stty -echo </dev/ttyS0; cat </dev/ttyS0 >/dev/null &
cd {tests} && export PYTHONPATH={site} && {{ {command}; }} </dev/null
echo "host: exit status $?"
[ -f {result} ] && cat {result} >/dev/ttyS1
poweroff -f
"""


def build_wheel(cache: Path) -> Path:
    """Build kvmigrate's wheel into ``cache``, as it would be published. Raises RuntimeError."""
    shutil.rmtree(cache / "wheel", ignore_errors=True)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    done = subprocess.run([*command, "--wheel-dir", cache / "wheel", ROOT], check=False, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the wheel cannot be built: {done.stderr.strip()}")
    return next((cache / "wheel").glob("kvmigrate-*.whl"))


def write_base(path: Path, kernel: Kernel) -> None:
    """Write what changes seldom: modules, tools, Python and what kvmigrate and its tests require."""
    with path.open("wb") as out:
        archive = Archive(out)
        for name in ("proc", "sys", "dev", "run", "tmp", "root"):
            archive.add_directory(name)
        archive.add_bytes("etc/passwd", b"root:x:0:0:root:/root:/bin/sh\n")
        archive.add_bytes("etc/hosts", b"127.0.0.1 localhost\n::1 localhost\n")
        archive.add(Path(shutil.which("busybox") or "/bin/busybox").resolve(), "/bin/busybox")
        for tool in TOOLS:
            archive.add_link(f"bin/{tool}", "busybox")
        _add_own_tools(archive)
        archive.add_link("bin/sh", "dash")
        for name, content in kernel.modules():
            archive.add_bytes(f"modules/{name}.ko", content)
        add_guest(archive, kernel)
        _add_python(archive)
        _add_site(archive)
        archive.close()


def write_job(path: Path, kernel: Kernel, wheel: Path, command: str) -> None:
    """Write what is laid over the base: kvmigrate from its wheel, its tests, and an init that runs ``command``."""
    with path.open("wb") as out:
        archive = Archive(out)
        with zipfile.ZipFile(wheel) as contents:
            for name in contents.namelist():
                archive.add_bytes(f"{SITE}/{name}", contents.read(name))
        archive.add(ROOT / "pyproject.toml", f"{TESTS}/pyproject.toml")
        for file in (*_tree(ROOT / "tests", {"bench", "structure"}), *_tree(ROOT / "examples", set())):
            archive.add(file, f"{TESTS}/{file.relative_to(ROOT)}")
        modules = " ".join(name for name, _ in kernel.modules())
        init = INIT.format(modules=modules, command=command, tests=TESTS, site=SITE, result=RESULT)
        archive.add_bytes("init", init.encode(), 0o755)
        archive.close()


def python() -> Path:
    """The interpreter behind this virtual environment."""
    return Path(sys.executable).resolve()


def _add_own_tools(archive: Archive) -> None:
    for name in OWN_TOOLS:
        path = Path(shutil.which(name, path=os.defpath + ":/usr/sbin:/sbin") or f"/usr/bin/{name}")
        _add_file(archive, path.resolve(), f"/bin/{name}")
        _add_libraries(archive, [path])


def _add_python(archive: Archive) -> None:
    stdlib = [Path(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib")]
    files = [path for top in dict.fromkeys(stdlib) for path in _tree(top, STDLIB_LEFT_OUT)]
    for path in files:
        _add_file(archive, path)
    _add_file(archive, python())
    archive.add_link("bin/python3", str(python()))
    _add_libraries(archive, [python(), *(path for path in files if path.suffix == ".so")])


def _add_site(archive: Archive) -> None:
    libraries = []
    for distribution in _required(REQUIREMENTS):
        for file in distribution.files or []:
            path = Path(str(distribution.locate_file(file)))
            if distribution.name == "kvmigrate" or ".." in file.parts or not path.is_file():
                continue
            _add_file(archive, path, f"{SITE}/{file}")
            libraries += [path] if ".so" in path.suffixes else []
    _add_libraries(archive, libraries)
    script = f"#!{python()}\nfrom kvmigrate.cli.app import main\nmain()\n"
    archive.add_bytes(f"{SITE}/bin/kvmigrate", script.encode(), 0o755)


def _required(names: Iterable[str]) -> list[Distribution]:
    """The installed distributions ``names`` and what they require, extras and other platforms left out."""
    found: dict[str, Distribution] = {}
    waiting = list(names)
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if name in found:
            continue
        try:
            found[name] = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue  # for another platform or another Python
        wanted = (one for one in found[name].requires or [] if "extra ==" not in one)
        waiting += [match[0] for one in wanted if (match := re.match(r"[\w.-]+", one))]
    return list(found.values())


def _tree(top: Path, left_out: set[str]) -> Iterator[Path]:
    """Every file under ``top``, but what lies in a directory at its top that is left out."""
    for path in sorted(top.iterdir()):
        if path.name in left_out or LEFT_OUT.search(path.name):
            continue
        if path.is_dir():
            yield from _tree(path, set())
        else:
            yield path


def _add_libraries(archive: Archive, binaries: Iterable[Path]) -> None:
    """The shared libraries that the dynamic linker would load for any of ``binaries``."""
    needed: set[str] = set()
    for path in binaries:
        listed = subprocess.run(["ldd", str(path)], check=False, capture_output=True, text=True).stdout
        needed.update(re.findall(r"(/\S+) \(0x", listed))
    for name in sorted(needed):
        _add_file(archive, Path(name))


def _add_file(archive: Archive, path: Path, name: str | None = None) -> None:
    """Add a file, an ELF file without what only a debugger reads: the host unpacks all of it at every start."""
    real = path.resolve()
    if real.stat().st_size < STRIP_FROM_BYTES or real.read_bytes()[:4] != b"\x7fELF":
        archive.add_resolved(path) if name is None else archive.add(path, name)
        return
    with tempfile.NamedTemporaryFile() as stripped:
        command = ["strip", "--strip-debug", "-o", stripped.name, str(real)]
        subprocess.run(command, check=True, capture_output=True)
        content = Path(stripped.name).read_bytes()
    archive.add_bytes(name or str(real), content, 0o755)
    if name is None:
        archive.add_resolved(path)
