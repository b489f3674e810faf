"""A TCP proxy between a source and a destination that cuts the link at a chosen frame of the destination's."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress

from kvmigrate.state.frame import HEADER, FrameKind


class Cutter:
    """Passes one connection on to ``port`` until the destination sends a frame of ``kind``, which never arrives.

    From then on nobody listens at :attr:`port` any more.
    """

    def __init__(self, port: int, kind: FrameKind) -> None:
        self._target = port
        self._kind = kind
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.cut = threading.Event()
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        source, _ = self._listener.accept()
        with source, socket.create_connection(("127.0.0.1", self._target)) as destination:
            threading.Thread(target=_pass_on, args=(source, destination), daemon=True).start()
            with suppress(OSError), destination.makefile("rb") as frames:
                while header := frames.read(HEADER.size):
                    _, kind, _, length, *_ = HEADER.unpack(header)
                    payload = frames.read(length)
                    if kind == self._kind:
                        break
                    source.sendall(header + payload)
            self._listener.close()
            for end in (source, destination):
                with suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
        self.cut.set()


def _pass_on(source: socket.socket, destination: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(1 << 16):
            destination.sendall(data)
