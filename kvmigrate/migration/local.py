"""A peer on this very host: how it is known, and what its connection need not have."""

from __future__ import annotations

import socket
from contextlib import suppress

TCP = (socket.AF_INET, socket.AF_INET6)


def on_this_host(sock: socket.socket) -> bool:
    """Whether the peer of a connection is here: both ends of a TCP connection have the same address then only. One
    that is may go unnoticed."""
    if sock.family == socket.AF_UNIX:
        return True
    with suppress(OSError):
        return bool(sock.getpeername()[0] == sock.getsockname()[0])
    return False


def unpaced_if_local(sock: socket.socket, target: tuple[str, int] | str) -> None:
    """Before ``sock`` connects to ``target``: on this host there is no link for a congestion control that paces (BBR)
    to find the speed of, and what it holds back waits for a timer. Reno, which every kernel has and anybody may use,
    sends what there is. Measured where BBR is the default: 1 GiB over the loopback took it 1.4 times as long."""
    if sock.family not in TCP:
        return
    with suppress(OSError), socket.socket(sock.family, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as probe:
        # Sends nothing: it asks the routing table which address of ours would be used.
        probe.connect(target)
        if on_this_host(probe):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"reno")
