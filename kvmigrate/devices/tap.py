"""A tap: the host's end of a guest's network cable (Documentation/networking/tuntap.rst), opened by its name.

It must be there already: one that the kernel made on the way would lead nowhere, and vanish with the VM.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import socket
import struct

from ..errors import HostError

DEVICE = "/dev/net/tun"
HEADER_BYTES = 12
"""Of the virtio_net_hdr before each packet: the device's own, so that offloads pass through untouched."""
IFNAME_BYTES = 16
# <linux/if_tun.h>
TUNSETIFF, TUNSETVNETHDRSZ = 0x400454CA, 0x400454D8
IFF_TAP, IFF_NO_PI, IFF_VNET_HDR = 0x0002, 0x1000, 0x4000
# <linux/sockios.h>, <linux/ethtool.h>
SIOCGIFINDEX, SIOCETHTOOL, ETHTOOL_GDRVINFO = 0x8933, 0x8946, 3
DRVINFO_BYTES, DRVINFO_BUS = 196, slice(100, 132)
_IFREQ = struct.Struct(f"{IFNAME_BYTES}sH22x")
_IFREQ_INDEX = struct.Struct(f"{IFNAME_BYTES}si20x")
_IFREQ_POINTER = struct.Struct(f"{IFNAME_BYTES}sP16x")


def open_tap(name: str) -> int:
    """A non-blocking file descriptor of the tap ``name`` of this network namespace, whose packets have a header of 12
    bytes. None is made.

    Raises :class:`HostError` with what to do about it.
    """
    try:
        fd = os.open(DEVICE, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise HostError(DEVICE, error.errno or errno.EIO, _open_hint(error.errno)) from error
    try:
        index = _index(name)
        fcntl.ioctl(fd, TUNSETIFF, _IFREQ.pack(name.encode(), IFF_TAP | IFF_NO_PI | IFF_VNET_HDR))
        if index != _index(name):
            # It went away after the first look, and the kernel has made another one for us.
            raise OSError(errno.ENODEV, "")
        fcntl.ioctl(fd, TUNSETVNETHDRSZ, struct.pack("i", HEADER_BYTES))
    except OSError as error:
        os.close(fd)
        raise HostError(f"tap {name}", error.errno or errno.EIO, _attach_hint(name, error.errno)) from error
    return fd


def _index(name: str) -> int:
    """The number of the interface ``name``. Asked through a socket, which belongs to our own network namespace: what is
    mounted at /sys may show another one. Raises :class:`OSError`, ENODEV when there is none."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as any_socket:
        found = fcntl.ioctl(any_socket, SIOCGIFINDEX, _IFREQ_INDEX.pack(name.encode(), 0))
    index: int = _IFREQ_INDEX.unpack(found)[1]
    return index


def _bus(name: str) -> str:
    """What the driver of the interface ``name`` says of its bus: ``tap`` or ``tun`` if it is that one's."""
    info = ctypes.create_string_buffer(struct.pack("I", ETHTOOL_GDRVINFO), DRVINFO_BYTES)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as any_socket:
        try:
            fcntl.ioctl(any_socket, SIOCETHTOOL, _IFREQ_POINTER.pack(name.encode(), ctypes.addressof(info)))
        except OSError:
            return ""
    return info.raw[DRVINFO_BUS].split(b"\0")[0].decode(errors="replace")


def _open_hint(number: int | None) -> str:
    if number in (errno.ENOENT, errno.ENODEV, errno.ENXIO):
        return "load the module with modprobe tun"
    if number in (errno.EPERM, errno.EACCES):
        return "this user may not open it: ask for read and write access"
    return ""


def _attach_hint(name: str, number: int | None) -> str:
    create = f"ip tuntap add dev {name} mode tap user $USER"
    if number == errno.ENODEV:
        return f"it does not exist: create it with {create}"
    if number in (errno.EPERM, errno.EACCES):
        return f"it is another user's: make one for this user with {create}"
    if number == errno.EBUSY:
        return "it is in use by another VM"
    if number != errno.EINVAL:
        return ""
    if _bus(name) == "tap":
        return f"it has several queues: delete it, and create it without multi_queue, with {create}"
    return "the interface of that name is no tap"
