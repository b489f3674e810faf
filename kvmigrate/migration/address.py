"""Connecting and listening: TCP and UNIX sockets, with errors that say what to do."""

from __future__ import annotations

# getaddrinfo needs it: a first connect should not wait for that.
import encodings.idna  # noqa: F401
import errno
import os
import select
import socket
import stat
import time
from contextlib import suppress
from pathlib import Path

from ..config import Address
from ..errors import ChannelError, HostError, PeerTimeout
from .abort import Abort
from .local import unpaced_if_local

_HINTS = {
    errno.EADDRINUSE: "the address is in use: take another, or stop what listens there",
    errno.ECONNREFUSED: "nothing listens there: start `kvmigrate receive` first",
    errno.ENOENT: "nothing listens there: start `kvmigrate receive` first",
    errno.EACCES: "no permission for that address",
    errno.EADDRNOTAVAIL: "this host does not have that address",
    errno.EHOSTUNREACH: "the host cannot be reached",
    errno.ENETUNREACH: "the network cannot be reached",
}


def connect(address: Address, abort: Abort, timeout_ms: float) -> socket.socket:
    """A connected socket. Raises :class:`HostError` (refused, unreachable), :class:`PeerTimeout`,
    :class:`ChannelError` (unknown host), or the reason ``abort`` was fired with."""
    last: Exception | None = None
    deadline = time.monotonic() + timeout_ms / 1e3
    for family, target in _resolve(address):
        sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            _connect_one(sock, target, address, abort, deadline)
        except (HostError, PeerTimeout) as error:
            sock.close()
            last = error
        except BaseException:
            sock.close()
            raise
        else:
            return sock
    raise last if last is not None else ChannelError(f"{address}: the host has no address")


def _connect_one(
    sock: socket.socket, target: tuple[str, int] | str, address: Address, abort: Abort, deadline: float
) -> None:
    sock.setblocking(False)
    unpaced_if_local(sock, target)
    rc = sock.connect_ex(target)
    if rc in (errno.EINPROGRESS, errno.EAGAIN):
        poll = select.poll()
        poll.register(sock.fileno(), select.POLLOUT)
        poll.register(abort.fd, select.POLLIN)
        ready = poll.poll(max((deadline - time.monotonic()) * 1e3, 0))
        abort.check()
        if not ready:
            raise PeerTimeout(f"{address} does not answer: is the host up, and the port open in its firewall?")
        rc = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    if rc:
        raise HostError(str(address), rc, _HINTS.get(rc, ""))


def _resolve(address: Address) -> list[tuple[socket.AddressFamily, tuple[str, int] | str]]:
    if address.path:
        return [(socket.AF_UNIX, address.path)]
    try:
        found = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise ChannelError(f"{address}: the host name cannot be looked up ({error})") from None
    return [(family, (str(to[0]), int(to[1]))) for family, _, _, _, to in found]


class Listener:
    """A listening socket. ``address`` is where it really listens: port 0 becomes the port that the kernel chose.

    Raises :class:`HostError` when the address is in use or cannot be had.
    """

    def __init__(self, address: Address) -> None:
        self._unlink: tuple[str, int] | None = None
        family, target = _resolve(address)[0]
        self._sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            if isinstance(target, str):
                self._bind_path(target)
            else:
                self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                self._sock.bind(target)
            self._sock.listen(8)
        except OSError as error:
            self._sock.close()
            number = error.errno or errno.EINVAL
            raise HostError(str(address), number, _HINTS.get(number, "")) from None
        self._sock.setblocking(False)
        self.address = address if address.path else Address(address.host, self._sock.getsockname()[1])

    def _bind_path(self, path: str) -> None:
        if _is_stale(path):
            Path(path).unlink(missing_ok=True)
        # Whoever may connect may hand us a guest: only this user.
        before = os.umask(0o177)
        try:
            self._sock.bind(path)
        finally:
            os.umask(before)
        self._unlink = (path, Path(path).stat().st_ino)

    def fileno(self) -> int:
        return self._sock.fileno()

    def accept(self, abort: Abort, timeout_ms: float | None = None) -> socket.socket | None:
        """The next connection; None after ``timeout_ms``. Raises the reason ``abort`` was fired with."""
        poll = select.poll()
        poll.register(self._sock.fileno(), select.POLLIN)
        poll.register(abort.fd, select.POLLIN)
        while poll.poll(timeout_ms):
            abort.check()
            try:
                return self._sock.accept()[0]
            except (BlockingIOError, ConnectionAbortedError):
                continue
            except OSError as error:
                raise HostError(f"accepting a connection at {self.address}", error.errno or errno.EIO) from None
        return None

    def close(self) -> None:
        """Stop listening; a UNIX socket's path goes too, if it is still ours. Idempotent."""
        self._sock.close()
        if self._unlink is not None:
            path, inode = self._unlink
            self._unlink = None
            with suppress(OSError):
                if Path(path).stat().st_ino == inode:
                    Path(path).unlink()


def _is_stale(path: str) -> bool:
    """Whether a socket lies at ``path`` that nobody listens on."""
    try:
        if not stat.S_ISSOCK(Path(path).lstat().st_mode):
            return False
    except OSError:
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        return probe.connect_ex(path) == errno.ECONNREFUSED
