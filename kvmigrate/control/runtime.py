"""The runtime directory: the names of the running VMs, their locks, control sockets and journals.

A VM called NAME owns these files, all in one directory of mode 0700::

    NAME.lock      held by flock(2) for as long as the process lives: the lock, not the file, is the claim
    NAME.sock      the QMP socket, mode 0600
    NAME.tty       the console's socket, mode 0600
    NAME.journal   who owns a guest that is changing hands; outlives the process when that is in doubt
                   (.NAME.journal.tmp while it is being written)
    NAME.lease     the snapshot that the guest was restored from: device and inode of its file ``state``

A killed process leaves its files behind but not its lock, so that the next claim of the name, or the next
``kvmigrate list``, cleans up after it.
"""

from __future__ import annotations

import fcntl
import os
import socket
import stat
import time
from contextlib import suppress
from pathlib import Path

from ..config import is_name
from ..errors import ConfigError, ControlError, HostError
from ..record import dataclass

MAX_SOCKET_PATH_BYTES = 107
"""What ``sun_path`` holds beside its final zero (unix(7))."""
LOCK_TRIES, LOCK_RETRY_S = 5, 0.01


def runtime_dir() -> Path:
    """Where the runtime directory is or would be. Raises :class:`ConfigError` when the environment does not say."""
    base = os.environ.get("XDG_RUNTIME_DIR")
    if base:
        if not Path(base).is_absolute():
            raise ConfigError(f"XDG_RUNTIME_DIR is {base!r}: it must be an absolute path")
        return Path(base) / "kvmigrate"
    if os.geteuid() == 0:
        return Path("/run/kvmigrate")
    raise ConfigError("XDG_RUNTIME_DIR is not set: set it to a directory that is yours alone, such as /run/user/UID")


def open_runtime_dir() -> Path:
    """The runtime directory, made when it is missing and checked when it is not.

    Raises :class:`HostError` when it cannot be made and :class:`ControlError` when somebody else could write to it.
    """
    path = runtime_dir()
    try:
        path.mkdir(mode=0o700, exist_ok=True)
        found = path.lstat()
    except FileExistsError:
        raise ControlError(f"{path} is not a directory: remove it") from None
    except OSError as error:
        raise HostError(str(path), error.errno or 0, "running VMs are kept there: see XDG_RUNTIME_DIR") from None
    if not stat.S_ISDIR(found.st_mode):
        raise ControlError(f"{path} is a symbolic link or no directory: remove it")
    if found.st_uid != os.geteuid() or found.st_mode & 0o077:
        raise ControlError(f"{path} is open to other users: make it yours with mode 0700, or remove it")
    return path


@dataclass(slots=True)
class Claim:
    """A name that this process holds; give it back with :meth:`release`."""

    name: str
    directory: Path
    lock_fd: int
    listeners: tuple[socket.socket, ...] = ()
    """For the control socket and the console, once :meth:`listen` was called."""

    def listen(self) -> None:
        """Let clients of the control socket and of the console come; they wait until somebody accepts them."""
        for path in (self.socket_path, self.console_path):
            self.listeners += (listen(path),)

    @property
    def lock_path(self) -> Path:
        return self.directory / f"{self.name}.lock"

    @property
    def socket_path(self) -> Path:
        return self.directory / f"{self.name}.sock"

    @property
    def console_path(self) -> Path:
        return self.directory / f"{self.name}.tty"

    @property
    def lease_path(self) -> Path:
        return self.directory / f"{self.name}.lease"

    def release(self) -> None:
        """Remove the sockets, then the lock: while the lock is held, no one else may make a socket here."""
        if self.lock_fd < 0:
            return
        for listener in self.listeners:
            listener.close()
        self.socket_path.unlink(missing_ok=True)
        self.console_path.unlink(missing_ok=True)
        self.lease_path.unlink(missing_ok=True)
        self.lock_path.unlink(missing_ok=True)
        os.close(self.lock_fd)
        self.lock_fd = -1


def listen(path: Path) -> socket.socket:
    """A UNIX socket that listens at ``path``, mode 0600. The directory is private, so that no one comes earlier."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(str(path))
        path.chmod(0o600)
        listener.listen()
    except BaseException:
        listener.close()
        raise
    return listener


def claim(name: str) -> Claim:
    """Take ``name`` for this process, cleaning up after a killed owner.

    Raises :class:`ConfigError` for what is no name and :class:`ControlError` when the name is taken.
    """
    check_name(name)
    held = Claim(name, open_runtime_dir(), -1)
    if len(os.fsencode(held.socket_path)) > MAX_SOCKET_PATH_BYTES:
        raise ConfigError(f"{held.socket_path} is too long for a socket: take a shorter name or XDG_RUNTIME_DIR")
    held.lock_fd = _lock(held.lock_path)
    held.socket_path.unlink(missing_ok=True)
    held.console_path.unlink(missing_ok=True)
    held.lease_path.unlink(missing_ok=True)
    (held.directory / f".{name}.journal.tmp").unlink(missing_ok=True)
    return held


def check_name(name: str) -> None:
    """Raise :class:`ConfigError` unless ``name`` can be a VM's name (and so a file's)."""
    if not is_name(name):
        raise ConfigError(f"{name!r} is not a name: use letters, digits, dot, dash and underscore, at most 63")


def _lock(path: Path) -> int:
    """An open, locked descriptor of ``path``. Tried a few times: a listing of the VMs locks a free one for a moment."""
    for _ in range(LOCK_TRIES - 1):
        with suppress(ControlError):
            if (fd := _try_lock(path)) >= 0:
                return fd
        time.sleep(LOCK_RETRY_S)
    while (fd := _try_lock(path)) < 0:
        continue
    return fd


def _try_lock(path: Path) -> int:
    """An open, locked descriptor of ``path``; -1 when its last owner removed it under our hands, to be tried again."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if path.stat().st_ino == os.fstat(fd).st_ino:
            os.truncate(fd, 0)
            os.write(fd, f"{os.getpid()}\n".encode())
            return fd
    except BlockingIOError:
        os.close(fd)
        raise ControlError(
            f"a VM named {path.stem} is running already: take another --name, or end it with kvmigrate stop {path.stem}"
        ) from None
    except FileNotFoundError:
        pass
    os.close(fd)
    return -1


def is_running(name: str) -> bool:
    """Whether a live process holds ``name``."""
    try:
        fd = os.open(runtime_dir() / f"{name}.lock", os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def owner_pid(name: str) -> int:
    """The pid of the process that holds ``name``; 0 when there is none."""
    if not is_running(name):
        return 0
    try:
        return int((runtime_dir() / f"{name}.lock").read_text() or 0)
    except (OSError, ValueError):
        return 0


def lease_of(name: str) -> str:
    """The snapshot that the VM ``name`` holds, as its NAME.lease says; nothing when it holds none."""
    try:
        return (runtime_dir() / f"{name}.lease").read_text().strip()
    except OSError:
        return ""


def running_names() -> list[str]:
    """The names that live processes hold, sorted. Files of killed processes are removed on the way."""
    directory = runtime_dir()
    try:
        names = sorted(path.stem for path in directory.glob("*.lock"))
    except OSError:
        return []
    found = []
    for name in names:
        if is_running(name):
            found.append(name)
        else:
            _sweep(name)
    return found


def _sweep(name: str) -> None:
    """Remove what a killed process left behind, unless the name is being claimed at this moment."""
    try:
        claim(name).release()
    except (ConfigError, ControlError, OSError):
        pass


def socket_path(name: str) -> Path:
    """The control socket of the running VM ``name``. Raises :class:`ControlError` when there is none."""
    require_running(name)
    return runtime_dir() / f"{name}.sock"


def console_path(name: str) -> Path:
    """The console's socket of the running VM ``name``. Raises :class:`ControlError` when there is none."""
    require_running(name)
    return runtime_dir() / f"{name}.tty"


def require_running(name: str) -> None:
    """Raise :class:`ControlError` unless a VM ``name`` is running here."""
    check_name(name)
    if is_running(name):
        return
    others = running_names()
    running = f"running are {', '.join(others)}" if others else "none is running"
    raise ControlError(f"no VM named {name} is running here: {running}")
