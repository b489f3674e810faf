"""One of two hosts between which a Linux guest moves to and fro: ``python3 -m … HOST HOPS``, the first host boots it.

What its guests wrote, and the digests that were taken of them, go out by the host's second serial port.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from pathlib import Path
from typing import Any

from tests.emulated.image import RESULT
from tests.oracle import world as worlds
from tests.oracle.heartbeat import require_progress
from tests.oracle.test_migration import watch
from tests.oracle.world import MOVED, POWERED_OFF, Process, World, migrate, open_world

from .linux import CLOCK, TROUBLE, boot, said

FIRST_PORT = 4400
PATIENCE_S = 240.0
ADDRESSES = ("10.77.0.1", "10.77.0.2")


def hop(world: World, guest: Process | None, here: int, number: int) -> Process | None:
    """The guest's move of that ``number``, as its source when it is here; the guest afterwards, if it is here."""
    address = f"tcp://{ADDRESSES[1 - here]}:{FIRST_PORT + number}"
    if guest is None:
        arrived = world.receive(f"tcp://0.0.0.0:{FIRST_PORT + number}")
        arrived.wait_status("running", timeout_s=PATIENCE_S)
        require_progress(arrived.log, 5, timeout_s=PATIENCE_S)
        return arrived
    send(guest, address)
    assert guest.wait_end() == MOVED, guest.stderr
    return None


def send(guest: Process, address: str) -> None:
    """Move ``guest`` as soon as the other host listens at ``address``."""
    deadline = time.monotonic() + PATIENCE_S
    while (job := migrate(guest, address))["status"] != "completed":
        assert "refused" in str(job) and time.monotonic() < deadline, job
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


def main(here: int, hops: int) -> None:
    """Take part in ``hops`` moves; the guest ends where the last one leads."""
    worlds.READY_S = worlds.END_S = PATIENCE_S
    with open_world() as world:
        digests = watch(world)
        guest = boot(world, 1) if here == 0 else None
        try:
            for number in range(hops):
                guest = hop(world, guest, here, number)
            if guest is not None:
                assert not (trouble := said(guest, TROUBLE)), trouble
                assert said(guest, CLOCK) == ["kvm-clock"]
                guest.log.send("poweroff -f\n")
                assert guest.wait_end() == POWERED_OFF, guest.stderr
        finally:
            Path(RESULT).write_text(json.dumps(report(world, digests)))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
