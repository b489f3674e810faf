"""One of two hosts between which a busy Linux guest moves to and fro: ``python3 -m … HOST HOPS CPUS SAVES``.

The first host boots the guest, serves its download, and in the end, with SAVES, saves it for the second one to restore.
What the guests wrote, and the digests that were taken of them, go out by the host's second serial port.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from kvmigrate.control.client import Client
from tests.emulated.image import RESULT
from tests.oracle import world as worlds
from tests.oracle.heartbeat import require_progress
from tests.oracle.test_migration import watch
from tests.oracle.world import MOVED, POWERED_OFF, STOPPED, Process, World, open_world, wait_job

from .carry import fetch_directory, offer_directory
from .linux import CLOCK, TROUBLE, boot, said
from .load import KINDS, start_load, stop_load, wait_for_rounds

FIRST_PORT, STREAM_PORT, CARRY_PORT = 4400, 5000, 5001
PATIENCE_S = 240.0
ADDRESSES = ("10.77.0.1", "10.77.0.2")
GUEST_ADDRESS = "10.77.0.3"
RESOURCES = ("--net", "lan=tap:tap0", "--disk", "data=/dev/vda")
# At these hops, counted within ten, the link fails for a while, or the destination's process dies in the middle.
CUT, KILLED = 2, 3
CUT_S, SOME_PAGES = 3.0, 1000
# An emulated network carries little, and what counts here is not how long the guest waits.
FAST = {"max-bandwidth": 0, "downtime-limit": 5000, "x-kvmigrate-timeout": 60_000}
SLOW = FAST | {"max-bandwidth": 8 << 20}
"""Makes a migration last long enough for something to happen in its middle."""


def listen(world: World, number: int) -> Process:
    return world.receive(f"tcp://0.0.0.0:{FIRST_PORT + number}", *RESOURCES, name=f"vm{number}-{len(world.processes)}")


def arrive(world: World, number: int) -> Process:
    """Receive the guest's move of that ``number``, on a hop that kills one destination the second time."""
    process = listen(world, number)
    if number % 10 == KILLED:
        process.wait_status("inmigrate", timeout_s=PATIENCE_S)
        await_pages(process)
        process.kill()
        world.processes.remove(process)
        process = listen(world, number)
    process.wait_status("running", timeout_s=PATIENCE_S)
    require_progress(process.log, 5, timeout_s=PATIENCE_S)
    wait_for_rounds(process, tuple(KINDS))
    require_clean(process)
    return process


def await_pages(process: Process) -> None:
    """Return once guest memory arrives at ``process``."""
    deadline = time.monotonic() + PATIENCE_S
    while (found := process.execute("query-migrate")).get("ram", {}).get("normal", 0) < SOME_PAGES:
        assert time.monotonic() < deadline, found
        time.sleep(0.2)


def leave(guest: Process, here: int, number: int) -> None:
    """Move ``guest`` to the other host as soon as that one listens; it goes on here until it could."""
    address = f"tcp://{ADDRESSES[1 - here]}:{FIRST_PORT + number}"
    if number % 10 == KILLED:
        job = send(guest, address, **SLOW)
        assert job["status"] == "failed", job
        wait_for_rounds(guest, tuple(KINDS))
    job = send_through_cut(guest, address) if number % 10 == CUT else send(guest, address, **FAST)
    assert job["status"] == "completed", job
    assert guest.wait_end() == MOVED, guest.stderr


def send(guest: Process, address: str, **parameters: Any) -> Any:
    """Migrate ``guest`` once somebody listens at ``address``; the report of how that ended."""
    with guest.client() as client:
        begin(client, address, **parameters)
        return wait_job(client, PATIENCE_S)


def send_through_cut(guest: Process, address: str) -> Any:
    """As :func:`send`, while nothing gets through between the hosts for some seconds."""
    with guest.client() as client:
        job = begin(client, address, **SLOW)
        assert job["status"] == "active", job
        time.sleep(1.0)
        subprocess.run(["busybox", "ifconfig", "eth0", "down"], check=True)
        time.sleep(CUT_S)
        subprocess.run(["busybox", "ifconfig", "eth0", "up"], check=True)
        return wait_job(client, PATIENCE_S)


def begin(client: Client, address: str, **parameters: Any) -> Any:
    """Start a migration; its report once the first pages go, or it has ended."""
    client.execute("migrate-set-parameters", parameters)
    deadline = time.monotonic() + PATIENCE_S
    while True:
        client.execute("migrate", {"uri": address})
        while (job := client.execute("x-kvmigrate-job"))["status"] in ("none", "setup"):
            time.sleep(0.1)
        if job["status"] != "failed" or "refused" not in str(job["error"]):
            return job
        assert time.monotonic() < deadline, job
        time.sleep(0.5)


def report(world: World, digests: Path) -> dict[str, Any]:
    """All that this host saw, in the order in which it happened here."""
    logs = [process.log.text for process in world.processes]
    found = []
    for path in sorted(digests.glob("*.json")):
        digest = json.loads(path.read_text())
        pages = hashlib.sha256(json.dumps(digest["slots"]).encode()).hexdigest()
        found.append({"direction": path.name.split(".")[1], "pages": pages, "state": digest["state"]})
    return {"logs": logs, "digests": found}


def depart(world: World, cpus: int) -> Process:
    """The guest, booted and at work."""
    subprocess.Popen(["load", "/tmp/served", "serve", str(STREAM_PORT)])
    guest = boot(world, cpus, *RESOURCES)
    said(guest, f"ifconfig eth0 {GUEST_ADDRESS} netmask 255.255.255.0 up")
    start_load(guest, ADDRESSES[0], STREAM_PORT)
    return guest


def require_clean(guest: Process) -> None:
    """Its kernel has nothing to complain of, and goes by the clock it booted with."""
    assert not (trouble := said(guest, TROUBLE)), trouble
    assert said(guest, CLOCK) == ["kvm-clock"]


def save_for_the_other(world: World, guest: Process) -> None:
    """Snapshot the running ``guest``, end it, and let the other host have what was saved."""
    # What the disk and the far end of a connection go on to must not be ahead of the guest that is restored.
    stop_load(guest, ("file", "stream"))
    said(guest, "sync")
    done = world.command("snapshot", guest.name, str(world.directory / "saved"), timeout_s=PATIENCE_S)
    assert done.returncode == 0, done.stderr
    wait_for_rounds(guest, ("memory",))
    guest.execute("quit")
    assert guest.wait_end() == STOPPED, guest.stderr
    offer_directory(world.directory / "saved", (ADDRESSES[0], CARRY_PORT), PATIENCE_S)


def restore_from_the_other(world: World) -> None:
    """Restore what the other host saved: it goes on with its work, its disk and its network."""
    fetch_directory(world.directory / "saved", (ADDRESSES[0], CARRY_PORT), PATIENCE_S)
    guest = world.restore(world.directory / "saved", *RESOURCES)
    require_progress(guest.log, 5, timeout_s=PATIENCE_S)
    wait_for_rounds(guest, ("memory",))
    assert said(guest, f"ping -c 1 -W 30 {ADDRESSES[1]} > /tmp/ping && echo reached") == ["reached"]
    said(guest, "load /tmp/file file 1 /dev/vda &")
    wait_for_rounds(guest, ("memory", "file"))
    switch_off(guest)


def switch_off(guest: Process) -> None:
    """End a guest whose kernel has nothing to complain of."""
    require_clean(guest)
    guest.log.send("poweroff -f\n")
    assert guest.wait_end() == POWERED_OFF, guest.stderr


def main(here: int, hops: int, cpus: int, saves: int) -> None:
    """Take part in ``hops`` moves, an even number: the guest ends or is saved where it was booted."""
    worlds.POLL_S = 0.1
    worlds.READY_S = worlds.END_S = PATIENCE_S
    with open_world() as world:
        digests = watch(world)
        try:
            guest = depart(world, cpus) if here == 0 else None
            for number in range(hops):
                began = time.monotonic()
                if guest is None:
                    guest = arrive(world, number)
                else:
                    leave(guest, here, number)
                    guest = None
                print(f"hop {number} on host {here}: {time.monotonic() - began:.1f} s", flush=True)
            if saves and guest is not None:
                save_for_the_other(world, guest)
            elif saves:
                restore_from_the_other(world)
            elif guest is not None:
                switch_off(guest)
        finally:
            Path(RESULT).write_text(json.dumps(report(world, digests)))


if __name__ == "__main__":
    main(*(int(argument) for argument in sys.argv[1:]))
