"""A disk and a network move with Linux: what it wrote is there, its connection lives, and no two hold the disk."""

from __future__ import annotations

import hashlib
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.oracle.heartbeat import judge, require_progress
from tests.oracle.world import MOVED, POWERED_OFF, Process, World, migrate

from .linux import CLOCK, TROUBLE, boot, said, world

__all__ = ["world"]

DISK_MIB = 16
BRIDGE, HOST_ADDRESS, GUEST_ADDRESS = "br0", "10.88.0.1", "10.88.0.2"
TAPS = ("tap0", "tap1")
PORT, NR_LINES = 5000, 300


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    with path.open("wb") as image:
        image.truncate(DISK_MIB << 20)
    return path


@pytest.fixture
def bridge() -> Iterator[None]:
    """A bridge with two taps in it, of this host alone."""
    run = [f"brctl addbr {BRIDGE}", f"ifconfig {BRIDGE} {HOST_ADDRESS} netmask 255.255.255.0 up"]
    for tap in TAPS:
        run += [f"tunctl -t {tap}", f"brctl addif {BRIDGE} {tap}", f"ifconfig {tap} up"]
    for command in run:
        subprocess.run(["busybox", *command.split()], check=True, capture_output=True)
    yield
    for tap in TAPS:
        subprocess.run(["busybox", "tunctl", "-d", tap], check=True, capture_output=True)
    subprocess.run(["busybox", "ifconfig", BRIDGE, "down"], check=True)
    subprocess.run(["busybox", "brctl", "delbr", BRIDGE], check=True)


def move(world: World, guest: Process, *options: str) -> Process:
    """Move ``guest`` to a new process with ``options``."""
    address = world.tcp()
    destination = world.receive(address, *options)
    job = migrate(guest, address)
    assert job["status"] == "completed", job
    assert guest.wait_end() == MOVED, guest.stderr
    require_progress(destination.log, 10, timeout_s=150)
    judge(world.logs)
    return destination


def test_a_disk_keeps_what_was_written_and_changes_hands_once(world: World, disk: Path) -> None:
    attached = ["--disk", f"data={disk}"]
    guest = boot(world, 1, *attached)
    said(guest, "dd if=/dev/urandom of=/tmp/w bs=64k count=32; dd if=/tmp/w of=/dev/vda bs=64k seek=8; sync")
    [wrote] = said(guest, "md5sum < /tmp/w")
    second = world.command("run", "/guest/vmlinuz", *attached, "--name", "second", "--serial", "null")
    assert second.returncode == 2 and "in use" in second.stderr, second.stderr
    destination = move(world, guest, *attached)
    said(destination, "echo 3 > /proc/sys/vm/drop_caches")
    assert said(destination, "dd if=/dev/vda bs=64k skip=8 count=32 2>/dev/null | md5sum") == [wrote]
    destination.log.send("poweroff -f\n")
    assert destination.wait_end() == POWERED_OFF, destination.stderr
    content = disk.read_bytes()[8 * 65536 : 40 * 65536]
    assert hashlib.md5(content).hexdigest() == wrote.split()[0], "it lies in the image where the guest put it"


def lines_from(server: socket.socket, received: list[str]) -> None:
    """Take one connection and all that comes over it."""
    connection, _ = server.accept()
    with connection, connection.makefile() as stream:
        received.extend(line.rstrip() for line in stream)


def test_a_connection_outlives_a_move_with_every_line_in_its_place(bridge: None, world: World) -> None:
    guest = boot(world, 1, "--net", f"lan=tap:{TAPS[0]}")
    received: list[str] = []
    with socket.create_server((HOST_ADDRESS, PORT)) as server:
        server.settimeout(60)
        thread = threading.Thread(target=lines_from, args=(server, received), daemon=True)
        thread.start()
        said(guest, f"ifconfig eth0 {GUEST_ADDRESS} netmask 255.255.255.0 up")
        send = f"i=0; while [ $i -lt {NR_LINES} ]; do echo line $i; i=$((i+1)); usleep 50000; done"
        said(guest, f"({send}) | nc {HOST_ADDRESS} {PORT} > /tmp/nc.log 2>&1 &")
        destination = move(world, guest, "--net", f"lan=tap:{TAPS[1]}")
        at_move = len(received)
        thread.join(120)
    assert 0 < at_move < NR_LINES, "the move was in the middle"
    assert received == [f"line {at}" for at in range(NR_LINES)]
    assert not (trouble := said(destination, TROUBLE)), trouble
    assert said(destination, CLOCK) == ["kvm-clock"]
    destination.log.send("poweroff -f\n")
    assert destination.wait_end() == POWERED_OFF, destination.stderr
