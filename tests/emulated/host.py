"""Boots the emulated host and waits until its command is done."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

MEMORY = "3G"
# A host whose kernel finds a processor that does nothing else any more ends at once, and says so on its console.
APPEND = (
    "console=ttyS0 quiet mitigations=off random.trust_cpu=on rdinit=/init "
    "panic=-1 oops=panic softlockup_panic=1 watchdog_thresh=30"
)
# An emulator is slowest at page tables of five levels and at copies byte by byte; guests have no use for either.
CPU = "max,-la57,-erms,-fsrm"
MONITOR_S = 10.0
# QEMU 7.2 loses an interrupt that a device raises in the moment of a VMRUN with a virtual one pending: helper_vmrun
# writes the processor's pending interrupts without the lock under which the device does. Was it the host's timer, then
# nothing happens any more, and KVM's guests wait too. Any other interrupt brings the lost one along, so there is one.
PULSE_S = 1.0
VECTORS = re.compile(r"(YMM|XMM|FPR|ZMM)\d")


@dataclass(frozen=True)
class Outcome:
    """What a run of the host left: its console, what it sent out, and its command's exit status (None: no end)."""

    status: int | None
    console: str
    sent: str


def qemu() -> str:
    """The emulator. Raises RuntimeError when it is not installed."""
    found = shutil.which("qemu-system-x86_64")
    if found is None:
        raise RuntimeError("qemu-system-x86_64 is not installed: run make deps-test")
    return found


def boot(image: Path, archives: list[Path], directory: Path, timeout_s: float, *more: str, cpus: int) -> Outcome:
    """Run the host to its end, or until ``timeout_s``; ``directory`` takes what it sends, ``more`` goes to QEMU."""
    initramfs, sent, console = directory / "initramfs", directory / "sent", directory / "console"
    with initramfs.open("wb") as out:
        for archive in archives:
            out.write(archive.read_bytes())
    command = [qemu(), "-accel", "tcg,thread=multi", "-cpu", CPU, "-smp", str(cpus), "-m", MEMORY, "-nodefaults"]
    command += ["-no-user-config", "-display", "none", "-no-reboot", "-serial", "stdio", "-serial", f"file:{sent}"]
    command += ["-kernel", str(image), "-initrd", str(initramfs), "-append", APPEND, *more]
    with console.open("wb") as out:
        _run(command, out, timeout_s, cpus)
    text = console.read_text(errors="replace").replace("\r", "")
    status = re.search(r"^host: exit status (\d+)$", text, re.MULTILINE)
    # A terminal line: what was sent as a line feed comes as carriage return and line feed.
    return Outcome(int(status[1]) if status else None, text, sent.read_text(errors="replace").replace("\r", ""))


def _run(command: Sequence[str], console: BinaryIO, timeout_s: float, cpus: int) -> None:
    """Run the emulator until it ends, or is ended with what its processors did then written on the ``console``."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        monitor = ["-chardev", f"socket,id=monitor,fd={theirs.fileno()}", "-mon", "chardev=monitor,mode=control"]
        emulator = subprocess.Popen(
            [*command, *monitor], bufsize=0, stdin=subprocess.PIPE, stdout=console, stderr=subprocess.STDOUT,
            pass_fds=[theirs.fileno()],
        )  # fmt: skip
        try:
            _wait_with_pulse(emulator, timeout_s)
        except subprocess.TimeoutExpired:
            questions = ["info registers -a", *(f"info lapic {cpu}" for cpu in range(cpus))]
            console.write(f"\nhost: switched off after {timeout_s:g} s\n{_ask(ours, questions)}".encode())
        finally:
            emulator.kill()
            emulator.wait()


def _wait_with_pulse(emulator: subprocess.Popen[bytes], timeout_s: float) -> None:
    """Type a line feed on the host's console now and then, until the emulator ends. Raises TimeoutExpired."""
    assert emulator.stdin is not None
    deadline = time.monotonic() + timeout_s
    with emulator.stdin as keyboard:
        while emulator.poll() is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(emulator.args, timeout_s)
            with suppress(BrokenPipeError):
                keyboard.write(b"\n")
            with suppress(subprocess.TimeoutExpired):
                emulator.wait(PULSE_S)


def _ask(monitor: socket.socket, questions: Sequence[str]) -> str:
    """What the emulator's monitor answers, as far as it answers."""
    commands: list[dict[str, Any]] = [{"execute": "qmp_capabilities"}]
    commands += [{"execute": "human-monitor-command", "arguments": {"command-line": one}} for one in questions]
    answers: list[str] = []
    monitor.settimeout(MONITOR_S)
    try:
        with monitor.makefile("rw") as stream:
            for command in commands:
                stream.write(f"{json.dumps(command)}\n")
                stream.flush()
                while "return" not in (answer := json.loads(stream.readline())):
                    pass
                answers.append(str(answer["return"]))
    except (OSError, ValueError) as error:
        answers += ["", f"the emulator does not answer: {error}"]
    lines = "\n".join(answers[1:]).splitlines()
    return "\n".join(line for line in lines if line and not VECTORS.match(line))
