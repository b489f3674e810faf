"""Every error that kvmigrate raises, in one tree.

::

    KvmigrateError
    ├─ ConfigError           what was asked for cannot be meant: an option, a size, an image
    ├─ HostError             the host refused: an ioctl, a path, a port (carries errno)
    │  └─ UnsupportedError   this host lacks something that is needed, named
    ├─ StateError            the right command at the wrong time
    ├─ GuestError            the guest stopped by itself in a way that no guest intends
    ├─ StreamError           bytes from a peer or a file are wrong
    │  ├─ BadMagic           not ours at all
    │  ├─ BadVersion         ours, but newer than this program reads
    │  ├─ BadChecksum        ours, but damaged
    │  ├─ TooLarge           a size that is over its limit
    │  ├─ BadField           a field whose value cannot be right, by itself or beside another
    │  └─ UnexpectedFrame    a valid frame where it may not come
    ├─ ChannelError          the transport died
    │  ├─ PeerClosed         the other side closed the connection
    │  └─ PeerTimeout        the other side said nothing for too long
    ├─ MigrationError        a migration failed for a reason of its own
    │  ├─ NotConverged       the guest writes faster than the link carries
    │  ├─ Cancelled          the operator stopped it
    │  ├─ PeerFailed         the other side reported an error
    │  └─ CommitUnknown      ownership is in doubt: the guest stays paused here
    ├─ RestoreRefused        an item of state cannot be restored on this host
    ├─ SnapshotError         a snapshot directory is damaged or cannot be written
    └─ ControlError          a running VM's control socket: not there, taken, or it said no

The text of each is one line that says what is wrong, where, and what to do about it.
"""

import os


class KvmigrateError(Exception):
    """Base of every error that kvmigrate raises on purpose; ``str()`` is one line for a person."""


class ConfigError(KvmigrateError):
    """What was asked for cannot be meant: an option, a size or an image."""


class HostError(KvmigrateError):
    """The host refused ``what`` (an ioctl's name, a path, an address) with ``errno``."""

    def __init__(self, what: str, errno: int, hint: str = "") -> None:
        self.what = what
        self.errno = errno
        super().__init__(f"{what}: {os.strerror(errno)}" + (f" ({hint})" if hint else ""))


class UnsupportedError(HostError):
    """This host lacks something that is needed; ``what`` names it."""

    def __init__(self, what: str, hint: str = "") -> None:
        self.what = what
        self.errno = 0
        KvmigrateError.__init__(self, f"this host lacks {what}" + (f": {hint}" if hint else ""))


class StateError(KvmigrateError):
    """The right command at the wrong time: the machine is ``actual`` and would have to be ``required``."""

    def __init__(self, actual: str, required: str) -> None:
        self.actual = actual
        self.required = required
        super().__init__(f"the machine is {actual}, but this needs it to be {required}")


class GuestError(KvmigrateError):
    """The guest stopped by itself in a way that no guest intends (a triple fault, an emulation failure)."""


class StreamError(KvmigrateError):
    """Bytes from a peer or a file are wrong."""


class BadMagic(StreamError):
    """The bytes are not kvmigrate's at all."""


class BadVersion(StreamError):
    """The bytes are kvmigrate's, but of a version that this program does not read."""


class BadChecksum(StreamError):
    """The bytes were damaged on their way."""


class TooLarge(StreamError):
    """A size in the bytes is over its limit."""


class BadField(StreamError):
    """A field of a decoded value cannot be right, by itself or beside another."""


class UnexpectedFrame(StreamError):
    """A valid frame where it may not come."""


class ChannelError(KvmigrateError):
    """The transport died."""


class PeerClosed(ChannelError):
    """The other side closed the connection."""


class PeerTimeout(ChannelError):
    """The other side said nothing for too long."""


class MigrationError(KvmigrateError):
    """A migration failed for a reason of its own."""


class NotConverged(MigrationError):
    """The guest writes memory faster than the link carries it, within the limits that were set."""


class Cancelled(MigrationError):
    """The operator stopped the migration."""


class PeerFailed(MigrationError):
    """The other side reported an error."""


class CommitUnknown(MigrationError):
    """COMMIT was sent and no answer came: the guest stays paused here until its ownership is resolved."""


class RestoreRefused(KvmigrateError):
    """An item of state cannot be restored on this host.

    ``item`` is its name, ``wanted`` what was saved, ``got`` what the host made of it, ``why`` a hint or nothing.
    """

    def __init__(self, item: str, wanted: object, got: object, why: str = "") -> None:
        self.item = item
        self.wanted = wanted
        self.got = got
        self.why = why
        super().__init__(f"{item}: saved {wanted}, this host has {got}" + (f" ({why})" if why else ""))


class SnapshotError(KvmigrateError):
    """A snapshot directory is damaged, or cannot be written."""


class ControlError(KvmigrateError):
    """A VM's control socket is not there, is taken, or refused a command (``qmp_class`` names QMP's class)."""

    def __init__(self, text: str, qmp_class: str = "GenericError") -> None:
        self.qmp_class = qmp_class
        super().__init__(text)


def check(rc: int, what: str, hint: str = "") -> int:
    """Return ``rc`` when it is a count; raise :class:`HostError` when it is ``-errno``.

    The only place where a result of the C core becomes an exception.
    """
    if rc < 0:
        raise HostError(what, -rc, hint)
    return rc
