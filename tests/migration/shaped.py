"""A link of a known rate: two network namespaces, joined by a veth pair with a token bucket (tc-tbf(8)) at our end."""

from __future__ import annotations

import ctypes
import itertools
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CLONE_NEWNET = 0x40000000
THERE = "169.254.77.2"
_numbers = itertools.count()


def possible() -> bool:
    """Whether such a link can be made here."""
    return os.geteuid() == 0 and bool(shutil.which("tc") and shutil.which("ip"))


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, timeout=20)


class ShapedLink:
    """Carries ``rate`` (as tc says it, such as ``100mbit``) from this namespace to another, at :data:`THERE`."""

    def __init__(self, rate: str) -> None:
        self._name = f"kvmig-{os.getpid()}-{next(_numbers)}"
        near, far = f"kn{os.getpid()}", f"kf{os.getpid()}"
        _run("ip", "netns", "add", self._name)
        try:
            _run("ip", "link", "add", near, "type", "veth", "peer", "name", far, "netns", self._name)
            _run("ip", "addr", "add", "169.254.77.1/30", "dev", near)
            _run("ip", "link", "set", near, "up")
            for command in (("addr", "add", f"{THERE}/30", "dev", far), ("link", "set", far, "up")):
                _run("ip", "-n", self._name, *command)
            _run("tc", "qdisc", "add", "dev", near, "root", "tbf", "rate", rate, "burst", "128kb", "limit", "512kb")
        except BaseException:
            self.close()
            raise

    @contextmanager
    def there(self) -> Iterator[None]:
        """Sockets that this thread makes in the block are at the far end."""
        libc = ctypes.CDLL(None, use_errno=True)
        with Path("/proc/thread-self/ns/net").open() as here, Path("/run/netns", self._name).open() as there:
            try:
                assert libc.setns(there.fileno(), CLONE_NEWNET) == 0, os.strerror(ctypes.get_errno())
                yield
            finally:
                assert libc.setns(here.fileno(), CLONE_NEWNET) == 0

    def close(self) -> None:
        """Take it down, sockets and all."""
        _run("ip", "netns", "del", self._name)
