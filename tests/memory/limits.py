"""A thread that may lock little memory, whose sockets may keep little on their error queues, or that may not splice."""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import shutil
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

_Result = TypeVar("_Result")
CLONE_NEWNET = 0x40000000
CAP_IPC_LOCK = 14
NR_VMSPLICE = 278
PR_SET_NO_NEW_PRIVS = 38
PR_SET_SECCOMP = 22
SECCOMP_MODE_FILTER = 2
CAPABILITY_VERSION = 0x20080522
OPTMEM = Path("/proc/sys/net/core/optmem_max")


def in_thread(work: Callable[[], _Result]) -> _Result:
    """What ``work`` returns or raises in a thread of its own, with which capabilities and namespaces go away."""
    results: list[_Result] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


def _libc(name: str, *arguments: object) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(*arguments) != 0:
        raise OSError(ctypes.get_errno(), name)


def drop_ipc_lock() -> None:
    """This thread may not lock more than RLIMIT_MEMLOCK from now on (capget(2), version 3)."""
    header = ctypes.create_string_buffer(struct.pack("<Ii", CAPABILITY_VERSION, 0), 8)
    data = ctypes.create_string_buffer(24)
    _libc("capget", header, data)
    words = list(struct.unpack("<6I", data.raw))
    words[0] &= ~(1 << CAP_IPC_LOCK)
    _libc("capset", header, ctypes.create_string_buffer(struct.pack("<6I", *words), 24))


@contextmanager
def lockable(size_bytes: int) -> Iterator[None]:
    """This process may lock so much memory, but for threads with CAP_IPC_LOCK."""
    soft, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (size_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (soft, hard))


def can_have_own_network() -> bool:
    """Whether a thread may have a network namespace here."""
    return os.geteuid() == 0 and bool(shutil.which("ip"))


def enter_own_network(optmem_bytes: int) -> bool:
    """Have this thread's sockets in a new network namespace with that ``net.core.optmem_max``. False where the kernel
    has only one for all namespaces."""
    _libc("unshare", CLONE_NEWNET)
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True, timeout=20)
    if not OPTMEM.exists():
        return False
    OPTMEM.write_text(str(optmem_bytes))
    return True


def forbid_vmsplice() -> None:
    """This thread's calls of vmsplice fail with EPERM from now on, as in a container that filters system calls
    (seccomp(2), for x86-64 only)."""
    load_number, equal, permit, refuse = 0x20, 0x15, 0x7FFF0000, 0x00050000 | errno.EPERM
    filters = [(load_number, 0, 0, 0), (equal, 0, 1, NR_VMSPLICE), (0x06, 0, 0, refuse), (0x06, 0, 0, permit)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("<HBBI", *one) for one in filters))
    program = ctypes.create_string_buffer(struct.pack("<HxxxxxxQ", len(filters), ctypes.addressof(code)))
    _libc("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    _libc("prctl", PR_SET_SECCOMP, SECCOMP_MODE_FILTER, program, 0, 0)
