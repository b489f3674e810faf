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
from multiprocessing.synchronize import Barrier
from typing import Any, cast

from kvmigrate._core import ffi, lib
from kvmigrate.memory.region import GuestMemory

BLOCK_BYTES = 16 << 20


def fill(memory: GuestMemory) -> None:
    """Every page of ``memory`` different, none of them compressible."""
    block = bytearray(os.urandom(BLOCK_BYTES))
    for gpa in range(0, memory.size_bytes, BLOCK_BYTES):
        for page in range(0, BLOCK_BYTES, 4096):
            block[page : page + 8] = (gpa + page + 1).to_bytes(8, "little")
        memory.write(gpa, block[: memory.size_bytes - gpa])


def send(size_bytes: int, times: int, port: int, barrier: Barrier, results: Any) -> None:
    """The source process."""
    with GuestMemory(size_bytes) as memory:
        fill(memory)
        for _ in range(times):
            barrier.wait()
            with socket.create_connection(("127.0.0.1", port)) as sock:
                round_ = ffi.new("struct kmig_round *", {"abort_fd": -1, "first": 1, "timeout_ms": 10_000})
                began, cpu = time.monotonic(), time.process_time()
                rc = lib.kmig_stream_send_round(memory.handle, round_, sock.fileno(), ffi.new("uint32_t *"))
                results.put(
                    {"began": began, "source_cpu_s": time.process_time() - cpu, "sent": memory.digest, "rc": rc}
                )


def receive(size_bytes: int, times: int, listener: socket.socket, barrier: Barrier, results: Any) -> None:
    """The destination process: fresh memory every time."""
    for _ in range(times):
        with GuestMemory(size_bytes) as memory:
            barrier.wait()
            sock, _ = listener.accept()
            incoming = ffi.new("struct kmig_incoming *", {"abort_fd": -1, "timeout_ms": 10_000})
            cpu = time.process_time()
            with sock:
                lib.kmig_stream_recv_pages(memory.handle, incoming, sock.fileno())
            ended = time.monotonic()
            results.put({"ended": ended, "destination_cpu_s": time.process_time() - cpu, "received": memory.digest})


def main(size_mib: int = 1024, times: int = 5) -> None:
    """Run it ``times`` times and print each."""
    size_bytes = size_mib << 20
    listener = socket.create_server(("127.0.0.1", 0))
    barrier, results = multiprocessing.Barrier(2), cast(Any, multiprocessing.Queue())
    port = listener.getsockname()[1]
    source = multiprocessing.Process(target=send, args=(size_bytes, times, port, barrier, results))
    destination = multiprocessing.Process(target=receive, args=(size_bytes, times, listener, barrier, results))
    for process in (source, destination):
        process.start()
    for _ in range(times):
        run = results.get(timeout=120) | results.get(timeout=120)
        assert run["rc"] == 0 and run.pop("sent") == run.pop("received"), "the copy is not equal"
        run["total_s"] = run.pop("ended") - run.pop("began")
        run["gb_s"] = size_bytes / 1e9 / run["total_s"]
        print(json.dumps({key: round(value, 3) for key, value in run.items()}))
    for process in (source, destination):
        process.join()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
