"""Linux moves between two hosts with two kernels and a network between them, and everyone who watches agrees.

Two guests make the same journey, each between two hosts of its own; ``make test-hosts`` sets KVMIGRATE_HOPS for longer
ones.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pytest

from tests.oracle.heartbeat import judge, judge_restored
from tests.oracle.recorder import SerialLog
from tests.oracle.world import free_port, is_listening

from .bed import run
from .host import Outcome
from .inside.hopping import ADDRESSES
from .inside.linux import unexplained

LONG = "KVMIGRATE_HOPS" in os.environ
HOPS = int(os.environ.get("KVMIGRATE_HOPS", "10"))
GUEST_CPUS = (1, 2)
# Short journeys go side by side: of two hosts one waits for the other for much of the time.
AT_ONCE = 1 if LONG else len(GUEST_CPUS)
TIMEOUT_S = 600 + 120 * HOPS
DISK_BYTES = 2 << 20

# The second one may wait for the first.
pytestmark = pytest.mark.timeout(2 * TIMEOUT_S + 120)


def wire(host: int, port: int) -> list[str]:
    """QEMU's options for one end of a cable between both hosts."""
    end = f"listen=127.0.0.1:{port}" if host == 0 else f"connect=127.0.0.1:{port}"
    card = f"virtio-net-pci,netdev=cable,romfile=,mac=52:54:00:00:00:0{host + 1}"
    return ["-netdev", f"socket,id=cable,{end}", "-device", card]


def await_cable(port: int) -> None:
    """Return once the first host holds its end of the cable: the other end has to find it."""
    deadline = time.monotonic() + TIMEOUT_S
    while not is_listening(f"tcp://127.0.0.1:{port}"):
        assert time.monotonic() < deadline, "the first host was never switched on"
        time.sleep(0.1)


def storage(disk: Path) -> list[str]:
    """QEMU's options for a disk that both hosts have, as on a storage network."""
    drive = f"file={disk},format=raw,if=none,id=shared,cache=writethrough,file.locking=off"
    return ["-drive", drive, "-device", "virtio-blk-pci,drive=shared,share-rw=on"]


def start(host: int, cpus: int, port: int, directory: Path) -> Outcome:
    here = directory / f"host{host}"
    here.mkdir()
    if host == 1:
        await_cable(port)
    commands = [
        "ifconfig eth0 up",
        "busybox brctl addbr br0",
        "busybox brctl addif br0 eth0",
        "busybox tunctl -t tap0",
        "busybox brctl addif br0 tap0",
        "ifconfig tap0 up",
        f"ifconfig br0 {ADDRESSES[host]} netmask 255.255.255.0 up",
        f"python3 -m tests.emulated.inside.hopping {host} {HOPS} {cpus} {int(LONG)}",
    ]
    options = [*wire(host, port), *storage(directory / "disk.img")]
    # One processor each: more than this machine may have would only wait for each other.
    return run(" && ".join(commands), here, TIMEOUT_S, *options, cpus=1)


def travel(cpus: int, directory: Path) -> list[Outcome]:
    """What is left of both hosts between which a guest with ``cpus`` processors moved."""
    directory.mkdir()
    port = free_port()
    with (directory / "disk.img").open("wb") as disk:
        disk.truncate(DISK_BYTES)
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda host: start(host, cpus, port, directory), (0, 1)))


@pytest.fixture(scope="module")
def journeys(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Mapping[int, Future[list[Outcome]]]]:
    """What is left of the hosts of each guest that a chosen test asks for, by the number of its processors."""
    top = tmp_path_factory.mktemp("hosts")
    items = [item for item in request.session.items if isinstance(item, pytest.Function) and hasattr(item, "callspec")]
    chosen = [cpus for cpus in GUEST_CPUS if any(item.callspec.params.get("reports") == cpus for item in items)]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        yield {cpus: pool.submit(travel, cpus, top / f"journey{cpus}") for cpus in chosen}


@pytest.fixture(scope="module", params=GUEST_CPUS, ids=[f"cpus={cpus}" for cpus in GUEST_CPUS])
def reports(request: pytest.FixtureRequest, journeys: Mapping[int, Future[list[Outcome]]]) -> list[Mapping[str, Any]]:
    outcomes = journeys[request.param].result()
    for outcome in outcomes:
        assert outcome.status == 0, outcome.console[-8000:]  # None: the host never came to its end
    return [json.loads(outcome.sent) for outcome in outcomes]


def in_order(one: list[Any], other: list[Any]) -> list[Any]:
    """What both hosts tell in turns, the first one first."""
    return [item for pair in zip_longest(one, other) for item in pair if item is not None]


@pytest.fixture
def logs(reports: list[Mapping[str, Any]]) -> list[SerialLog]:
    """What the guest wrote at each of its places; of a long journey the last is where it was restored."""
    texts = in_order(*(report["logs"] for report in reports))
    assert len(texts) == HOPS + 1 + LONG
    # The hosts' clocks are not one: the order of the hops stands for the time.
    return [SerialLog(f"hop {n}", [(float(n), text.encode())]) for n, text in enumerate(texts)]


def test_every_heartbeat_came_once_from_one_host_or_the_other(logs: list[SerialLog]) -> None:
    assert judge(logs[: HOPS + 1]).beats[0] > 5 * HOPS


@pytest.mark.skipif(not LONG, reason="a part of make test-hosts")
def test_a_guest_saved_on_one_host_goes_on_at_the_other(logs: list[SerialLog]) -> None:
    whole = SerialLog("all hops", [chunk for log in logs[:-1] for chunk in log.chunks])
    assert judge_restored(whole, logs[-1]).beats[0] > 5


def test_every_page_and_register_that_left_one_host_arrived_at_the_other(reports: list[Mapping[str, Any]]) -> None:
    outs = in_order(*([d for d in report["digests"] if d["direction"] == "out"] for report in reports))
    # The first host sends first, so the second one receives first.
    ins = in_order(*([d for d in report["digests"] if d["direction"] == "in"] for report in reversed(reports)))
    # One more is of the snapshot, where a new generation is written into memory before the guest goes on.
    assert len(outs) == len(ins) == HOPS + LONG
    for out, into in zip(outs[:HOPS], ins[:HOPS], strict=True):
        assert out["pages"] == into["pages"]
        assert unexplained(out, into) == []
