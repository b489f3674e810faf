"""The page stream alone: one round of resident, incompressible memory from one process to another over loopback TCP.

``python -m tests.bench.stream [MIB] [TIMES]`` prints one JSON object a run: the whole time from the first frame to the
last hash, the first touch of the destination's memory included, and the processor time of either side.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.synchronize import Barrier
from typing import Any, cast

from kvmigrate._core import ffi, lib
from kvmigrate.errors import check
from kvmigrate.memory.region import GuestMemory
from kvmigrate.migration.local import unpaced_if_local
from tests.memory.tools import stream_round

BLOCK_BYTES = 16 << 20
PAGE_BYTES = 4096
TIMEOUT_MS = 30_000


def fill(memory: GuestMemory) -> None:
    """Every page of ``memory`` different, none of them compressible."""
    block = bytearray(os.urandom(BLOCK_BYTES))
    for gpa in range(0, memory.size_bytes, BLOCK_BYTES):
        for page in range(0, BLOCK_BYTES, PAGE_BYTES):
            block[page : page + 8] = (gpa + page + 1).to_bytes(8, "little")
        memory.write(gpa, block[: memory.size_bytes - gpa])


def first_round() -> Any:
    """A round over all resident pages, as C takes it."""
    return ffi.new("struct kmig_round *", {"abort_fd": -1, "first": 1, "timeout_ms": TIMEOUT_MS})


def connect(port: int) -> socket.socket:
    """To this host, as kvmigrate does it."""
    sock, target = socket.socket(), ("127.0.0.1", port)
    unpaced_if_local(sock, target)
    sock.connect(target)
    return sock


@contextmanager
def piped_round(fd: int) -> Iterator[Any]:
    """The same as :func:`first_round`, whose pages leave ``fd`` through a pipe."""
    splice, round_ = ffi.new("struct kmig_splice *"), first_round()
    check(lib.kmig_splice_open(splice, fd), "a pipe")
    round_.splice = splice
    try:
        yield round_
    finally:
        lib.kmig_splice_close(splice)


def send(size_bytes: int, port: int, barrier: Barrier, results: Any) -> None:
    """The source process."""
    with GuestMemory(size_bytes) as memory:
        fill(memory)
        barrier.wait()
        with connect(port) as sock, piped_round(sock.fileno()) as round_:
            began, cpu = time.monotonic(), time.process_time()
            rc = stream_round(memory.handle, round_, sock.fileno(), ffi.new("uint32_t *"))
            used = time.process_time() - cpu
            results.put({"began": began, "source_cpu_s": used, "sent": memory.digest, "rc": rc})


def receive(size_bytes: int, touched: bool, listener: socket.socket, barrier: Barrier, results: Any) -> None:
    """The destination process; with ``touched`` its memory takes no fault any more."""
    with GuestMemory(size_bytes) as memory:
        if touched:
            for slot in memory.slots:
                memory.prefault(slot.base_gfn, slot.nr_pages)
        barrier.wait()
        sock, _ = listener.accept()
        incoming = ffi.new("struct kmig_incoming *", {"abort_fd": -1, "timeout_ms": TIMEOUT_MS})
        cpu = time.process_time()
        with sock:
            lib.kmig_stream_recv_pages(memory.handle, incoming, sock.fileno())
        ended = time.monotonic()
        results.put({"ended": ended, "destination_cpu_s": time.process_time() - cpu, "received": memory.digest})


def stream(size_bytes: int, *, touched: bool) -> dict[str, float]:
    """One copy: ``total_s``, ``source_cpu_s``, ``destination_cpu_s``. Raises RuntimeError when it is not equal."""
    barrier, results = multiprocessing.Barrier(2), cast(Any, multiprocessing.Queue())
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        processes = [
            multiprocessing.Process(target=send, args=(size_bytes, port, barrier, results)),
            multiprocessing.Process(target=receive, args=(size_bytes, touched, listener, barrier, results)),
        ]
        for process in processes:
            process.start()
        run = results.get(timeout=120) | results.get(timeout=120)
        for process in processes:
            process.join()
    if run["rc"] != 0 or run["sent"] != run["received"]:
        raise RuntimeError("the copy is not equal")
    seconds = {name: run[name] for name in ("source_cpu_s", "destination_cpu_s")}
    return {"total_s": run["ended"] - run["began"], **seconds}


def main(size_mib: int = 1024, times: int = 5) -> None:
    """Run it ``times`` times and print each."""
    for _ in range(times):
        run = stream(size_mib << 20, touched=False)
        print(json.dumps({key: round(value, 3) for key, value in run.items()}))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
