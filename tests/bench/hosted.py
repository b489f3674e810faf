"""Inside the emulated host: a Linux guest under kvmigrate and under QEMU's microvm. ``python3 -m … RUNS SECONDS``.

What it measured goes out by the host's second serial port, as JSON. It imports nothing but the standard library and
what the bench itself is made of.
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.oracle.recorder import Recorder, SerialLog

from .qmp import Qmp, QmpError
from .samples import Sample, Series, interleave
from .scratch import scratch

SITE = os.environ.get("PYTHONPATH", "")
KERNEL, INITRD, WORK = "/guest/vmlinuz", "/guest/initrd", "/bench/work.cpio"
QEMU = "/usr/bin/qemu-system-x86_64"  # it looks for its firmware in ../share/qemu
RESULT = Path("/tmp/result.xml")
APPEND = "console=ttyS0 quiet panic=-1"
MEMORY_MIB, DISK_MIB = 128, 128
CPU_ROUNDS, READ_MIB, SEND_MIB, BEAT_US = 6000, 128, 32, 10_000
START_S, BOOT_S, WORK_S = 120.0, 240.0, 240.0
FIRST_LINE = re.compile(rb"^cpus \d+, clock", re.MULTILINE)
TAPS, HOST, GUEST, PORT = ("tap0", "tap1"), "10.88.0.1", "10.88.0.2", 5000
EXITS = ("exits", "io_exits", "mmio_exits", "halt_exits", "irq_injections")


@dataclass(frozen=True)
class Place:
    """Where a process runs: its files, its serial port, its tap, and the address at which it waits for a guest."""

    directory: Path
    initrd: Path
    disk: Path
    serial: str
    tap: str
    incoming: str | None = None


def kvmigrate(place: Place) -> tuple[list[str], Path]:
    """The command, and where its monitor will be."""
    common = ["--name", "vm", "--serial", place.serial, "--disk", f"data={place.disk}", "--net", f"lan=tap:{place.tap}"]
    monitor = place.directory / "kvmigrate" / "vm.sock"
    if place.incoming:
        return ["kvmigrate", "receive", f"unix://{place.incoming}", *common], monitor
    guest = ["--memory", f"{MEMORY_MIB}M", "--initrd", str(place.initrd), "--append", APPEND]
    return ["kvmigrate", "run", KERNEL, *guest, *common], monitor


def qemu(machine: str, place: Place) -> tuple[list[str], Path]:
    """The same guest on the same devices; modern virtio, as kvmigrate's."""
    monitor = place.directory / "qmp"
    command = [QEMU, "-M", *machine.split(), "-accel", "kvm", "-cpu", "host", "-m", f"{MEMORY_MIB}M"]
    command += ["-nodefaults", "-no-user-config", "-display", "none", "-global", "virtio-mmio.force-legacy=false"]
    command += ["-kernel", KERNEL, "-initrd", str(place.initrd), "-append", APPEND, "-serial", place.serial]
    command += ["-drive", f"file={place.disk},format=raw,if=none,id=data", "-device", "virtio-blk-device,drive=data"]
    command += ["-netdev", f"tap,id=lan,ifname={place.tap},script=no,downscript=no"]
    command += ["-device", "virtio-net-device,netdev=lan,mac=52:54:00:00:00:07"]
    command += ["-qmp", f"unix:{monitor},server=on,wait=off"]
    return [*command, *(["-incoming", f"unix:{place.incoming}"] if place.incoming else [])], monitor


# The quickest dress: qboot, and an RTC, which microvm leaves out under KVM: Linux would look for it all the time.
SYSTEMS: dict[str, Callable[[Place], tuple[list[str], Path]]] = {
    "kvmigrate": kvmigrate,
    "QEMU microvm": lambda place: qemu("microvm,acpi=on,rtc=on,pit=off,x-option-roms=off -bios qboot.rom", place),
}


class Machine:
    """One process and what its guest wrote; it was started at ``started_s``, its monitor answered at ``ready_s``."""

    def __init__(self, system: str, place: Place, log: SerialLog) -> None:
        place.directory.mkdir()
        command, monitor = SYSTEMS[system](place)
        self.log = log
        self._errors = place.directory / "log"
        self.started_s = time.monotonic()
        with self._errors.open("wb") as errors:
            environment = os.environ | {"XDG_RUNTIME_DIR": str(place.directory)}
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=errors, stderr=errors, env=environment
            )
        try:
            self.qmp = Qmp(monitor, START_S)
        except (OSError, QmpError) as error:
            self.process.kill()
            self.process.wait()
            raise QmpError(f"{error}: {self._errors.read_text()[-300:].strip()}") from None
        self.ready_s = time.monotonic()

    def close(self) -> None:
        """End it."""
        self.process.kill()
        self.process.wait()
        self.qmp.close()

    def after(self, at: int, pattern: bytes, timeout_s: float) -> tuple[float, int]:
        """When ``pattern`` came to its end on the serial port past offset ``at``, and at which offset."""
        deadline = time.monotonic() + timeout_s
        while True:
            end, data = 0, self.log.data
            match = re.compile(pattern, re.MULTILINE).search(data, at)
            for came_s, chunk in list(self.log.chunks):
                end += len(chunk)
                if match and match.end() <= end:
                    return came_s, match.end()
            if time.monotonic() > deadline or self.process.poll() is not None:
                said = self._errors.read_text()[-200:]
                raise TimeoutError(f"no {pattern!r}; the guest wrote {data[-200:]!r}, the process {said!r}")
            time.sleep(0.02)

    def work(self, words: str) -> float:
        """How long the guest takes for it, in milliseconds, from its first word to its last."""
        at = len(self.log.data)
        self.log.send(f"work {words}\n")
        began_s, at = self.after(at, b"^WORK$", WORK_S)
        ended_s, _ = self.after(at, b"^DONE$", WORK_S)
        return (ended_s - began_s) * 1000

    def exits(self) -> dict[str, float]:
        """How often the guest has left its vCPU, by cause, as KVM counts it."""
        directories = list(Path("/sys/kernel/debug/kvm").glob(f"{self.process.pid}-*"))
        return {name: float((directories[0] / name).read_text()) for name in EXITS} if directories else {}

    def cpu_ms(self) -> dict[str, float]:
        """The process's processor time so far: user's, system's and the guest's, and by thread without the guest's."""
        spent: dict[str, float] = {}
        tick_ms = 1000 / os.sysconf("SC_CLK_TCK")
        tasks = sorted(Path(f"/proc/{self.process.pid}/task").iterdir(), key=lambda one: int(one.name))
        for number, task in enumerate(tasks):
            name, _, rest = (task / "stat").read_text().partition("(")[2].rpartition(") ")
            words = [int(word) * tick_ms if word.isdigit() else 0.0 for word in rest.split()]
            user, system, guest = words[11], words[12], words[40]
            for kind, value in (("user", user - guest), ("system", system), ("guest", guest)):
                spent[kind] = spent.get(kind, 0.0) + value
            spent[f"thread {number} {name}, its own"] = user + system - guest
        return spent


def boot(machine: Machine) -> Iterator[dict[str, float]]:
    """From the start of the process to the first line of the guest's init."""
    first_s, at = machine.after(0, FIRST_LINE.pattern, BOOT_S)
    yield {
        "boot ms": (first_s - machine.started_s) * 1000,
        "until the monitor answers ms": (machine.ready_s - machine.started_s) * 1000,
    }
    yield {f"boot {name}": value for name, value in machine.exits().items()}
    yield {f"boot {name} ms": value for name, value in machine.cpu_ms().items()}
    machine.after(at, b"^READY$", BOOT_S)
    machine.log.send("kill $!\n")


def received(server: socket.socket) -> None:
    """Take all that one connection sends, then close it."""
    connection, _ = server.accept()
    buffer = bytearray(1 << 20)
    with connection:
        while connection.recv_into(buffer):
            pass


def works(machine: Machine) -> Iterator[dict[str, float]]:
    """Processor, disk, network."""
    yield {"cpu ms": machine.work(f"cpu {CPU_ROUNDS}")}
    before = machine.exits()
    yield {"disk ms": machine.work(f"read {READ_MIB} /dev/vda")}
    yield {f"disk {name}": value - before[name] for name, value in machine.exits().items()}
    machine.log.send(f"ifconfig eth0 {GUEST} netmask 255.255.255.0 up\n")
    with socket.create_server((HOST, PORT)) as server:
        server.settimeout(WORK_S)
        threading.Thread(target=received, args=(server,), daemon=True).start()
        before = machine.exits()
        yield {"tcp ms": machine.work(f"send {SEND_MIB} {HOST} {PORT}")}
        yield {f"tcp {name}": value - before[name] for name, value in machine.exits().items()}


def move(source: Machine, destination: Machine, address: str) -> Iterator[dict[str, float]]:
    """The idle guest's silence over a live move to a second process, as its heartbeats tell."""
    source.log.send(f"work beat {BEAT_US} &\n")
    source.after(0, b"^H 0 100$", WORK_S)
    began_s = time.monotonic()
    source.qmp.execute("migrate", uri=f"unix:{address}")
    destination.after(0, rb"\nH 0 \d+\n(.*\n){20}", WORK_S)
    silence_ms = (destination.log.first_s - source.log.last_s) * 1000
    yield {"blackout ms": silence_ms, "move ms": (destination.log.first_s - began_s) * 1000}
    yield {"own downtime ms": float(source.qmp.execute("query-migrate").get("downtime", 0))}


def measure(system: str, recorder: Recorder, files: Path, failures: list[str]) -> Sample:
    """One guest's life: it boots, works and moves. What failed is noted; what was measured before it is kept."""
    figures: dict[str, float] = {}
    machines: list[Machine] = []
    with scratch(files) as directory:
        try:
            for part in _life(system, recorder, directory, files, machines):
                figures.update(part)
        except (OSError, RuntimeError, AssertionError) as error:
            failures.append(f"{type(error).__name__}: {error}")
            print(f"  {failures[-1]}", flush=True)
        finally:
            for machine in machines:
                machine.close()
    print(f"  {json.dumps(figures)}", flush=True)
    return Sample(figures)


def _life(
    system: str, recorder: Recorder, directory: Path, files: Path, machines: list[Machine]
) -> Iterator[dict[str, float]]:
    incoming = str(directory / "in")
    for tap, address in zip(TAPS, (None, incoming), strict=True):
        log, serial = recorder.listen(system)
        place = Place(directory / tap, files / "initrd", files / "disk", serial, tap, address)
        machines.append(Machine(system, place, log))
        if address is None:
            yield from boot(machines[0])
            yield from works(machines[0])
    source, destination = machines
    yield from move(source, destination, incoming)


@contextmanager
def bridge() -> Iterator[None]:
    """A bridge of this host alone, with both taps in it."""
    commands = ["brctl addbr br0", f"ifconfig br0 {HOST} netmask 255.255.255.0 up"]
    for tap in TAPS:
        commands += [f"tunctl -t {tap}", f"brctl addif br0 {tap}", f"ifconfig {tap} up"]
    for command in commands:
        subprocess.run(["busybox", *command.split()], check=True, capture_output=True)
    yield


def main(runs: int, seconds: float) -> None:
    """Measure all systems in turn and leave what they yielded where the host sends it from."""
    subprocess.run(["busybox", "mount", "-t", "debugfs", "debug", "/sys/kernel/debug"], check=False)
    # As pip does when it installs; the first run would compile, the others not.
    subprocess.run([sys.executable, "-m", "compileall", "-q", SITE], check=False, stdout=subprocess.DEVNULL)
    with scratch(Path("/tmp")) as files, Recorder(files) as recorder, bridge():
        (files / "initrd").write_bytes(Path(INITRD).read_bytes() + Path(WORK).read_bytes())
        with (files / "disk").open("wb") as disk:
            for _ in range(DISK_MIB):
                disk.write(os.urandom(4096) * 256)
        rows = [Series(name, lambda: Sample({}), name == "kvmigrate") for name in SYSTEMS]
        for row in rows:
            row.run = lambda row=row: measure(row.name, recorder, files, row.failures)  # type: ignore[misc]
        interleave(rows, runs, time.monotonic() + seconds, lambda text: print(f"  {text}", flush=True))
    RESULT.write_text(json.dumps({row.name: row.to_value() for row in rows}))


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]))
