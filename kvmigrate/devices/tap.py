"""A tap: the host's end of a guest's network cable (Documentation/networking/tuntap.rst), opened by its name.

It must be there already: one that the kernel made on the way would lead nowhere, and vanish with the VM.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import socket
import struct
from pathlib import Path

from .._core import ffi
from ..errors import HostError

DEVICE = "/dev/net/tun"
HEADER_BYTES = 12
"""Of the virtio_net_hdr before each packet: the device's own, so that offloads pass through untouched."""
IFNAME_BYTES = 16
# <linux/if_tun.h>
TUNSETIFF, TUNSETVNETHDRSZ = 0x400454CA, 0x400454D8
IFF_TAP, IFF_NO_PI, IFF_VNET_HDR = 0x0002, 0x1000, 0x4000
# <linux/sockios.h>, <linux/ethtool.h>, <linux/capability.h>
SIOCGIFINDEX, SIOCETHTOOL = 0x8933, 0x8946
ETHTOOL_GDRVINFO, ETHTOOL_GLINK, DRVINFO_BYTES = 3, 10, 196
CAP_NET_ADMIN = 12
_IFREQ = struct.Struct(f"{IFNAME_BYTES}sH22x")
_IFREQ_INDEX = struct.Struct(f"{IFNAME_BYTES}si20x")


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


def tap_problem(name: str) -> str:
    """Why :func:`open_tap` would fail, or nothing; without opening it, which the network would notice."""
    if not os.access(DEVICE, os.R_OK | os.W_OK):
        return f"{DEVICE} cannot be opened: {_open_hint(errno.EACCES if os.access(DEVICE, os.F_OK) else errno.ENOENT)}"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as query:
        try:
            _index(name)
        except OSError as error:
            return _attach_hint(name, error.errno) or os.strerror(error.errno or errno.EIO)
        if not _is_tap(query, name):
            return _attach_hint(name, errno.EINVAL)
        # A tap that is up has a carrier as long as somebody holds it.
        if _ethtool(query, name, ETHTOOL_GLINK, 8)[4:] != bytes(4):
            return _attach_hint(name, errno.EBUSY)
    return "" if _owner(name) in (-1, os.geteuid()) or _may_administer() else _attach_hint(name, errno.EPERM)


def _index(name: str) -> int:
    """The number of the interface ``name``. Asked through a socket, which belongs to our own network namespace: what is
    mounted at /sys may show another one. Raises :class:`OSError`, ENODEV when there is none."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as query:
        found = fcntl.ioctl(query, SIOCGIFINDEX, _IFREQ_INDEX.pack(name.encode(), 0))
    index: int = _IFREQ_INDEX.unpack(found)[1]
    return index


def _is_tap(query: socket.socket, name: str) -> bool:
    """By what its driver says (struct ethtool_drvinfo), which tells taps (``tap``) from tunnels (``tun``)."""
    info = _ethtool(query, name, ETHTOOL_GDRVINFO, DRVINFO_BYTES)
    driver, bus = (info[at : at + 32].rstrip(b"\0") for at in (4, 100))
    return (driver, bus) == (b"tun", b"tap")


def _ethtool(query: socket.socket, name: str, command: int, size_bytes: int) -> bytes:
    """The answer of SIOCETHTOOL, which is asked by way of a pointer; zeros when there is none."""
    answer = ffi.new("uint8_t[]", size_bytes)
    struct.pack_into("I", ffi.buffer(answer), 0, command)
    at = int(ffi.cast("uintptr_t", answer))
    try:
        fcntl.ioctl(query, SIOCETHTOOL, struct.pack(f"{IFNAME_BYTES}sP16x", name.encode(), at))
    except OSError:
        return bytes(size_bytes)
    return bytes(ffi.buffer(answer))


def _owner(name: str) -> int:
    """The uid that may open the tap, -1 when any may."""
    try:
        return int(Path(f"/sys/class/net/{name}/owner").read_text())
    except (OSError, ValueError):
        return -1


def _may_administer() -> bool:
    found = re.search(r"^CapEff:\s*([0-9a-f]+)$", Path("/proc/self/status").read_text(), re.MULTILINE)
    return found is not None and bool(int(found[1], 16) >> CAP_NET_ADMIN & 1)


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
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as query:
        if _is_tap(query, name):
            return f"it has several queues: delete it, and create it without multi_queue, with {create}"
    return "the interface of that name is no tap"
