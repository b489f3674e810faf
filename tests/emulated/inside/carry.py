"""Carries a directory from one host to the other."""

from __future__ import annotations

import socket
import tarfile
import time
from pathlib import Path

Peer = tuple[str, int]


def offer_directory(directory: Path, here: Peer, timeout_s: float) -> None:
    """Give ``directory`` to the first who comes."""
    with socket.create_server(here) as server:
        server.settimeout(timeout_s)
        connection, _ = server.accept()
        with connection, connection.makefile("wb") as out, tarfile.open(fileobj=out, mode="w|") as archive:
            connection.settimeout(timeout_s)
            archive.add(directory, ".")


def fetch_directory(directory: Path, there: Peer, timeout_s: float) -> None:
    """Take what :func:`offer_directory` offers ``there``, now or soon."""
    with (
        _dial(there, timeout_s) as connection,
        connection.makefile("rb") as source,
        tarfile.open(fileobj=source, mode="r|") as archive,
    ):
        archive.extractall(directory, filter="data")


def _dial(there: Peer, timeout_s: float) -> socket.socket:
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            return socket.create_connection(there, timeout_s)
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)
