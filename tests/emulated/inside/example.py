"""The examples with a Linux do what they say: on a host with taps and a bridge, and for a user who may make none."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.emulated.guest import INITRD, KERNEL
from tests.oracle.recorder import Recorder
from tests.oracle.world import Process

from .linux import ANSWER_S, APPEND, BOOT_S, MEMORY_MIB, said
from .storage import TAPS, bridge

__all__ = ["bridge"]
NOBODY = 65534
UPLINK, HOST_ADDRESS, GATEWAY, PORT = "up0", "192.0.2.2", "192.0.2.1", 5001


def test_the_example_boots_checks_and_moves_a_linux(bridge: None) -> None:
    command = ["sh", "examples/linux_guest.sh", KERNEL, INITRD, *TAPS]
    environment = os.environ | {"READY": "READY"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "can go on" in done.stdout
    wrote = re.search(r"the guest wrote (\d+) bytes here and (\d+) there$", done.stdout, re.MULTILINE)
    assert wrote is not None and int(wrote[1]) > 0 and int(wrote[2]) > 0, done.stdout


@pytest.fixture
def uplink() -> Iterator[None]:
    """Where a host's network begins: an interface with the default route. This one leads nowhere."""
    for command in (
        f"link add {UPLINK} type bridge",
        f"addr add {HOST_ADDRESS}/24 dev {UPLINK}",
        f"link set {UPLINK} up",
        f"route add default via {GATEWAY}",
    ):
        subprocess.run(["ip", *command.split()], check=True, capture_output=True)
    yield
    subprocess.run(["ip", "link", "del", UPLINK], check=True)


@pytest.fixture
def home() -> Iterator[Path]:
    """A directory of nobody's own, who may use KVM and the host's taps here."""
    for device in ("/dev/kvm", "/dev/net/tun"):
        Path(device).chmod(0o666)
    with tempfile.TemporaryDirectory() as name:
        os.chown(name, NOBODY, NOBODY)
        yield Path(name)


def test_a_guest_of_a_user_who_is_not_root_reaches_the_network(uplink: None, home: Path) -> None:
    command = ["sh", "examples/rootless_network.sh", "kvmigrate", "run", KERNEL, "--initrd", INITRD, "--name", "vm0"]
    command += ["--memory", f"{MEMORY_MIB}M", "--append", APPEND, "--net", "lan=tap:tap0", "--serial"]
    environment = os.environ | {"XDG_RUNTIME_DIR": str(home)}
    with Recorder(home) as recorder, socket.create_server(("127.0.0.1", PORT)) as server:
        log, serial = recorder.listen("vm0")
        os.chown(serial.removeprefix("unix:"), NOBODY, NOBODY)
        with (home / "vm0.stderr").open("w") as errors:
            popen = subprocess.Popen(
                [*command, serial], env=environment, user=NOBODY, group=NOBODY, extra_groups=[],
                stdin=subprocess.DEVNULL, stderr=errors, text=True,
            )  # fmt: skip
        guest = Process("vm0", popen, log, home)
        try:
            log.wait_for("READY", BOOT_S)
            leases = said(guest, "ifconfig eth0 up; udhcpc -i eth0 -n -q -f -s /bin/echo 2>&1 | grep lease")
            assert re.search(f"lease of {HOST_ADDRESS} obtained from {GATEWAY}", " ".join(leases)), leases
            said(guest, f"ifconfig eth0 {HOST_ADDRESS} netmask 255.255.255.0")
            # The guest's end stays open until it has its answer: pasta was seen to lose what came right before a FIN.
            said(guest, f"(echo here I am; sleep {ANSWER_S:.0f}) | nc {GATEWAY} {PORT} &")
            server.settimeout(ANSWER_S)
            connection, _ = server.accept()
            with connection:
                connection.settimeout(ANSWER_S)
                assert connection.recv(100) == b"here I am\n"
                connection.sendall(b"and here is your host\n")
                log.wait_for("and here is your host", ANSWER_S)
            outside = ["kvmigrate", "query", "vm0"]
            subprocess.run(outside, env=environment, user=NOBODY, group=NOBODY, extra_groups=[], check=True)
            log.send("poweroff -f\n")
            assert popen.wait(ANSWER_S) == 0
        finally:
            popen.kill()
            popen.wait()
            print(guest.stderr)
