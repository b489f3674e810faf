"""Linux moves between two hosts with two kernels and a network between them, and everyone who watches agrees.

``make test-hosts`` sets KVMIGRATE_HOPS for a longer journey.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pytest

from tests.oracle.heartbeat import judge
from tests.oracle.recorder import SerialLog

from .bed import run
from .host import Outcome
from .inside.hopping import ADDRESSES
from .inside.linux import unexplained

HOPS = int(os.environ.get("KVMIGRATE_HOPS", "4"))
TIMEOUT_S = 400 + 60 * HOPS

pytestmark = pytest.mark.timeout(TIMEOUT_S + 120)


def wire(host: int, port: int) -> list[str]:
    """QEMU's options for one end of a cable between both hosts."""
    end = f"listen=127.0.0.1:{port}" if host == 0 else f"connect=127.0.0.1:{port}"
    card = f"virtio-net-pci,netdev=cable,romfile=,mac=52:54:00:00:00:0{host + 1}"
    return ["-netdev", f"socket,id=cable,{end}", "-device", card]


def start(host: int, port: int, directory: Path) -> Outcome:
    directory.mkdir()
    command = f"ifconfig eth0 {ADDRESSES[host]} netmask 255.255.255.0 up && "
    command += f"python3 -m tests.emulated.inside.hopping {host} {HOPS}"
    return run(command, directory, TIMEOUT_S, *wire(host, port))


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[Outcome]:
    directory = tmp_path_factory.mktemp("hosts")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda host: start(host, port, directory / f"host{host}"), (0, 1)))


@pytest.fixture(scope="module")
def reports(outcomes: list[Outcome]) -> list[Mapping[str, Any]]:
    for outcome in outcomes:
        assert outcome.status == 0, outcome.console[-8000:]  # None: the host never came to its end
    return [json.loads(outcome.sent) for outcome in outcomes]


def in_order(one: list[Any], other: list[Any]) -> list[Any]:
    """What both hosts tell in turns, the first one first."""
    return [item for pair in zip_longest(one, other) for item in pair if item is not None]


def test_every_heartbeat_came_once_from_one_host_or_the_other(reports: list[Mapping[str, Any]]) -> None:
    logs = in_order(*(report["logs"] for report in reports))
    assert len(logs) == HOPS + 1
    # The hosts' clocks are not one: the order of the hops stands for the time.
    verdict = judge([SerialLog(f"hop {n}", [(float(n), text.encode())]) for n, text in enumerate(logs)])
    assert verdict.beats[0] > 5 * HOPS


def test_every_page_and_register_that_left_one_host_arrived_at_the_other(reports: list[Mapping[str, Any]]) -> None:
    outs = in_order(*([d for d in report["digests"] if d["direction"] == "out"] for report in reports))
    # The first host sends first, so the second one receives first.
    ins = in_order(*([d for d in report["digests"] if d["direction"] == "in"] for report in reversed(reports)))
    assert len(outs) == HOPS
    for out, into in zip(outs, ins, strict=True):
        assert out["pages"] == into["pages"]
        assert unexplained(out, into) == []
