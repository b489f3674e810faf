"""What lies between source and destination: the loopback, or a shaped link between two network namespaces."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

PORT = 4444
BURST_BYTES = 128 << 10
NETWORK = "198.51.100"  # set aside for documents (RFC 5737): nobody's own


class Loopback:
    """Both sides in this namespace."""

    def prefix(self, side: int) -> list[str]:
        """What goes before the command of a process on ``side`` (0 or 1)."""
        return []

    def uri(self, side: int) -> str:
        """Where a process on ``side`` listens."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            return f"tcp:127.0.0.1:{probe.getsockname()[1]}"


@dataclass(frozen=True)
class Shaped(Loopback):
    """Two namespaces with a veth pair between them, each end behind a token bucket."""

    mbit_s: int
    queue_ms: int
    """How long a packet may wait in the bucket's queue; what would wait longer is dropped."""
    tag: str

    def prefix(self, side: int) -> list[str]:
        return ["ip", "netns", "exec", self._namespace(side)]

    def uri(self, side: int) -> str:
        return f"tcp:{NETWORK}.{side + 1}:{PORT}"

    def _namespace(self, side: int) -> str:
        return f"kvmigrate-{self.tag}-{side}"

    def set_up(self) -> None:
        """Make the namespaces and the pair. Raises CalledProcessError."""
        for side in (0, 1):
            _ip("netns", "add", self._namespace(side))
        ends = [["netns", self._namespace(side)] for side in (0, 1)]
        _ip("link", "add", "link0", *ends[0], "type", "veth", "peer", "name", "link1", *ends[1])
        for side in (0, 1):
            inside = ["-n", self._namespace(side)]
            _ip(*inside, "addr", "add", f"{NETWORK}.{side + 1}/24", "dev", f"link{side}")
            _ip(*inside, "link", "set", f"link{side}", "up")
            bucket = ["rate", f"{self.mbit_s}mbit", "burst", str(BURST_BYTES), "latency", f"{self.queue_ms}ms"]
            _run("tc", *inside, "qdisc", "add", "dev", f"link{side}", "root", "tbf", *bucket)

    def dropped(self) -> int:
        """How many packets both buckets have dropped so far."""
        shown = [
            subprocess.run(
                ["tc", "-s", "-n", self._namespace(side), "qdisc", "show", "dev", f"link{side}"],
                check=True, capture_output=True, text=True,
            ).stdout
            for side in (0, 1)
        ]  # fmt: skip
        return sum(int(text.partition("dropped ")[2].partition(",")[0]) for text in shown)

    def tear_down(self) -> None:
        """Remove both namespaces, and with them the pair."""
        for side in (0, 1):
            subprocess.run(["ip", "netns", "del", self._namespace(side)], check=False, capture_output=True)


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


def _ip(*words: str) -> None:
    _run("ip", *words)


def why_not_shaped() -> str:
    """Why this process can make no shaped link; empty when it can try."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    return f"{' and '.join(missing)} not installed (iproute2)" if missing else ""


@contextmanager
def shaped(mbit_s: int, queue_ms: int) -> Iterator[Shaped]:
    """A shaped link for as long as the block lasts. Raises OSError when this machine cannot have one."""
    link = Shaped(mbit_s, queue_ms, f"{os.getpid()}-{mbit_s}-{queue_ms}")
    if reason := why_not_shaped():
        raise OSError(reason)
    try:
        link.set_up()
        yield link
    except subprocess.CalledProcessError as error:
        raise OSError(f"{' '.join(error.cmd)}: {error.stderr.strip()}") from None
    finally:
        link.tear_down()
