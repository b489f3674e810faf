"""A tap: the host's end of a guest's network cable (Documentation/networking/tuntap.rst), opened by its name."""

from __future__ import annotations

import errno
import fcntl
import os
import struct

from ..errors import HostError

DEVICE = "/dev/net/tun"
HEADER_BYTES = 12
"""Of the virtio_net_hdr before each packet: the device's own, so that offloads pass through untouched."""
IFNAME_BYTES = 16
# <linux/if_tun.h>
TUNSETIFF, TUNSETVNETHDRSZ = 0x400454CA, 0x400454D8
IFF_TAP, IFF_NO_PI, IFF_VNET_HDR = 0x0002, 0x1000, 0x4000
_IFREQ = struct.Struct(f"{IFNAME_BYTES}sH22x")


def open_tap(name: str) -> int:
    """A non-blocking file descriptor of the tap ``name``, whose packets have a header of 12 bytes. It is made, and
    vanishes with the descriptor, when there is none of that name and the process may make one.

    Raises :class:`HostError` with what to do about it.
    """
    try:
        fd = os.open(DEVICE, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise HostError(DEVICE, error.errno or errno.EIO, _open_hint(error.errno)) from error
    try:
        fcntl.ioctl(fd, TUNSETIFF, _IFREQ.pack(name.encode(), IFF_TAP | IFF_NO_PI | IFF_VNET_HDR))
        fcntl.ioctl(fd, TUNSETVNETHDRSZ, struct.pack("i", HEADER_BYTES))
    except OSError as error:
        os.close(fd)
        raise HostError(f"tap {name}", error.errno or errno.EIO, _attach_hint(name, error.errno)) from error
    return fd


def _open_hint(number: int | None) -> str:
    if number in (errno.ENOENT, errno.ENODEV, errno.ENXIO):
        return "load the module with modprobe tun"
    if number in (errno.EPERM, errno.EACCES):
        return "this user may not open it: ask for read and write access"
    return ""


def _attach_hint(name: str, number: int | None) -> str:
    if number in (errno.EPERM, errno.EACCES):
        return f"you may not open it: create it for this user with ip tuntap add {name} mode tap user $USER"
    if number == errno.EBUSY:
        return "it is in use by another VM"
    if number == errno.EINVAL:
        return "the interface of that name is no tap, or one with several queues"
    return ""
