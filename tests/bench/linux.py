"""A group for Debian under kvmigrate and under QEMU's microvm, side by side in one emulated host (tests/emulated)."""

from __future__ import annotations

import json
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from tests.emulated import bed
from tests.emulated.cpio import Archive
from tests.emulated.image import ROOT, TESTS

from .goals import Goal, Group
from .hosted import QEMU, READ_MIB, SEND_MIB, SYSTEMS, WORK
from .qemu import qemu_binary
from .report import markdown, number
from .samples import Sample, Series

RUNS = int(os.environ.get("KVMIGRATE_BENCH_LINUX_RUNS", "3"))
SECONDS = 240
"""After that no further turn begins."""
FIRMWARE = ("bios-microvm.bin", "qboot.rom", "linuxboot_dma.bin", "kvmvapic.bin")
FIRMWARE_PLACES = (Path("/usr/share/qemu"), Path("/usr/share/seabios"))
FIGURES = ["boot ms", "cpu ms", "disk ms", "tcp ms", "blackout ms"]
GOALS = [
    Goal("Debian to init, from the start of the process", "boot ms", 1.1),
    Goal("guest CPU work: time", "cpu ms", 1 / 0.98),
    Goal("sequential virtio-blk read: time", "disk ms", 1 / 0.5),
    Goal("TCP through tap: time", "tcp ms", 1 / 0.4),
    Goal("blackout of an idle Debian", "blackout ms", 1),
]
NOTE = f"""One emulated host with two processors, the same kernel, initrd, memory (128 MiB), disk and bridge for both. \
QEMU is `-M microvm,acpi=on,rtc=on,pit=off,x-option-roms=off -bios qboot.rom -accel kvm -cpu host` with modern \
virtio-mmio devices; without an RTC, as microvm is by default, Linux looks for one for most of the boot. Each guest \
boots (from the start of the process to the first line of its init), computes, reads {READ_MIB} MiB of its disk past \
its cache, sends {SEND_MIB} MiB by TCP to the host through a tap, and moves to a second process in the same host while \
it sends a heartbeat every 10 ms. Times in an emulated host say nothing but how they compare: all of it is emulated, \
instruction by instruction."""


@contextmanager
def linux(files: Path) -> Iterator[Group]:
    """All runs happen in one life of the host, in turn; the rows come with their samples."""
    directory = files / "linux"
    directory.mkdir()
    command = f"python3 -m tests.bench.hosted {RUNS} {SECONDS}"
    outcome = bed.run(command, directory, SECONDS * 2, laid_over=[_archive(directory)])
    if outcome.status != 0 or not outcome.sent:
        raise OSError(f"the emulated host ended with {outcome.status}: {outcome.console[-2000:]}")
    measured = json.loads(outcome.sent)
    whole = [_series(name, measured[name]) for name in SYSTEMS]
    rows = [_only(row, FIGURES) for row in whole]
    group = Group("Debian in an emulated host", rows, FIGURES, GOALS, NOTE, texts={"linux.md": page(whole)})
    yield group


def page(rows: Sequence[Series]) -> str:
    """Every figure of every system: median, least and most, and the ratio of kvmigrate's to the least of the others."""
    names = dict.fromkeys(name for row in rows for sample in row.samples for name in sample.figures)
    headings = ["", *(row.name for row in rows), "ratio"]
    texts = ["# Debian under kvmigrate and under QEMU", NOTE, "Median (least to most) of each figure:"]
    texts += [markdown(headings, [_line(name, rows) for name in FIGURES])]
    texts += ["What KVM counted, and where the processor time went:"]
    texts += [markdown(headings, [_line(name, rows) for name in names if name not in FIGURES])]
    failures = [f"- {row.name}: {failure}" for row in rows for failure in dict.fromkeys(row.failures)]
    texts += ["Failed runs:\n\n" + "\n".join(failures)] if failures else []
    return "\n\n".join(texts) + "\n"


def _line(name: str, rows: Sequence[Series]) -> list[str]:
    ours = [median(row.values(name)) for row in rows if row.ours and row.values(name)]
    others = [median(row.values(name)) for row in rows if not row.ours and row.values(name)]
    least = min(others, default=0.0)
    ratio = number(ours[0] / least) if ours and least else ""
    return [name, *(_spread(row.values(name)) for row in rows), ratio]


def _spread(values: Sequence[float]) -> str:
    return f"{number(median(values))} ({number(min(values))} to {number(max(values))})" if values else ""


def _only(row: Series, figures: Sequence[str]) -> Series:
    samples = [
        Sample({name: sample.figures[name] for name in figures if name in sample.figures}) for sample in row.samples
    ]
    return Series(row.name, row.run, row.ours, row.most_runs, samples, row.failures)


def _series(name: str, value: Mapping[str, Any]) -> Series:
    samples = [Sample(figures) for figures in value["samples"]]
    return Series(name, lambda: Sample({}), name == "kvmigrate", 0, samples, list(value["failures"]))


def _archive(directory: Path) -> Path:
    """What is laid over the host's file system: QEMU, its firmware and libraries, the bench, the guest's work."""
    path = directory / "bench.cpio"
    with path.open("wb") as out:
        archive = Archive(out)
        binary = Path(qemu_binary())
        archive.add(binary.resolve(), QEMU)
        listed = subprocess.run(["ldd", str(binary)], check=True, capture_output=True, text=True).stdout
        for name in sorted(set(re.findall(r"(/\S+) \(0x", listed))):
            archive.add_resolved(Path(name))
        for name in FIRMWARE:
            found = [place / name for place in FIRMWARE_PLACES if (place / name).exists()]
            archive.add(found[0].resolve(), f"/usr/share/qemu/{name}") if found else None
        for file in sorted((ROOT / "tests/bench").glob("*.py")):
            archive.add(file, f"{TESTS}/tests/bench/{file.name}")
        archive.add_bytes(WORK, _work())
        archive.close()
    return path


def _work() -> bytes:
    """An archive to be laid over the guest's own initramfs."""
    with tempfile.TemporaryDirectory() as directory, (Path(directory) / "cpio").open("w+b") as out:
        program = Path(directory) / "work"
        source = Path(__file__).with_name("work.c")
        command = ["gcc", "-static", "-O2", "-s", "-Wall", "-Wextra", "-Werror", "-o", str(program), str(source)]
        subprocess.run(command, check=True)
        archive = Archive(out)
        archive.add(program, "/bin/work")
        archive.close()
        out.seek(0)
        return out.read()
