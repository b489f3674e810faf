"""The control socket: QMP for any number of local clients of the same user."""

from __future__ import annotations

import asyncio
import os
import socket
import struct
import sys
import traceback
from collections.abc import Mapping

from ..errors import KvmigrateError
from . import commands, qmp

MAX_CLIENTS = 64
MAX_UNREAD_BYTES = 1 << 20
"""A client that lets so much of our output lie is cut off rather than paid for with memory."""
_CREDENTIALS = struct.Struct("3i")


class Server:
    """Serves ``vm`` on a UNIX socket until :meth:`close`. All methods belong to the control loop's thread."""

    def __init__(self, vm: commands.Vm) -> None:
        self._vm = vm
        self._clients: set[_Client] = set()
        self._server: asyncio.Server | None = None
        self._idle = asyncio.Event()

    async def start(self, listener: socket.socket) -> None:
        """Accept the clients of ``listener``, a UNIX socket that this owns from now on."""
        self._server = await asyncio.start_unix_server(self._accept, sock=listener)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """No coroutine: asyncio writes a traceback about one of its own that is cancelled before it has begun, which
        happens to a client that comes in the last moment of the process."""
        if len(self._clients) >= MAX_CLIENTS or not same_user(writer.get_extra_info("socket")):
            writer.close()
            return
        client = _Client(self._vm, reader, writer)
        self._clients.add(client)
        self._idle.clear()
        client.task = asyncio.get_running_loop().create_task(self._attend(client))

    async def _attend(self, client: _Client) -> None:
        try:
            await client.serve()
        except (ConnectionError, asyncio.CancelledError):
            pass
        finally:
            self._clients.discard(client)
            if not self._clients:
                self._idle.set()
            client.close()

    def emit(self, name: str, data: Mapping[str, object] | None = None, time_ns: int = 0) -> None:
        """Send an event to every client that has negotiated; ``time_ns`` since 1970 is when it was, 0 is now."""
        message = qmp.event(name, data, time_ns)
        for client in self._clients:
            if client.negotiated:
                client.send(message)

    @property
    def nr_clients(self) -> int:
        return len(self._clients)

    async def wait_idle(self, timeout_s: float) -> None:
        """Until no client is connected, at most ``timeout_s``."""
        if self._clients:
            try:
                await asyncio.wait_for(self._idle.wait(), timeout_s)
            except TimeoutError:
                pass

    async def close(self) -> None:
        """Stop accepting and hang up on everyone, once what was sent to them is on its way."""
        if self._server is not None:
            self._server.close()
        clients = list(self._clients)
        for client in clients:
            await client.hang_up()
        # A task must not outlive its loop.
        await asyncio.gather(*(client.task for client in clients if client.task), return_exceptions=True)


class _Client:
    """One connection: negotiation, then one command after the other."""

    def __init__(self, vm: commands.Vm, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.task: asyncio.Task[None] | None = None
        self._vm = vm
        self._reader = reader
        self._writer = writer
        self._splitter = qmp.Splitter()
        self._answered = asyncio.Event()
        self._answered.set()
        self.negotiated = False

    def send(self, message: Mapping[str, object]) -> None:
        if self._writer.transport.get_write_buffer_size() > MAX_UNREAD_BYTES:
            self._writer.transport.abort()
            return
        self._writer.write(qmp.encode(message))

    async def hang_up(self) -> None:
        """Close it; the command in hand, which may be what ended the guest, is answered first."""
        try:
            await asyncio.wait_for(self._answered.wait(), 1.0)
            await asyncio.wait_for(self._writer.drain(), 1.0)
        except (OSError, TimeoutError):
            pass
        self.close()

    def close(self) -> None:
        """Close it, once what was sent has gone. Idempotent."""
        self._writer.close()

    async def serve(self) -> None:
        self.send(qmp.greeting(self._vm.package))
        while data := await self._reader.read(1 << 16):
            for item in self._splitter.feed(data):
                self._answered.clear()
                self.send(qmp.error_reply(item) if isinstance(item, qmp.QmpError) else await self._answer(item))
                self._answered.set()
                await self._writer.drain()

    async def _answer(self, text: bytes) -> dict[str, object]:
        """The reply to one JSON text: whatever happens, the client gets one and the VM lives on."""
        request = None
        try:
            request = qmp.decode_request(text)
            return request.reply(await self._execute(request))
        except qmp.QmpError as error:
            return qmp.error_reply(error, request)
        except KvmigrateError as error:
            return qmp.error_reply(qmp.QmpError(str(error)), request)
        except Exception as error:
            if os.environ.get("KVMIGRATE_TRACEBACK"):
                traceback.print_exc(file=sys.stderr)
            return qmp.error_reply(qmp.QmpError(f"internal error: {type(error).__name__}: {error}"), request)

    async def _execute(self, request: qmp.Request) -> object:
        if request.command == "qmp_capabilities":
            return self._negotiate(request)
        if not self.negotiated:
            raise qmp.QmpError("Expecting capabilities negotiation with 'qmp_capabilities'", "CommandNotFound")
        return await commands.execute(self._vm, request.command, request.arguments)

    def _negotiate(self, request: qmp.Request) -> object:
        if self.negotiated:
            text = "Capabilities negotiation is already complete, command ignored"
            raise qmp.QmpError(text, "CommandNotFound")
        for name in request.arguments:
            if name != "enable":
                raise qmp.QmpError(f"Parameter '{name}' is unexpected")
        if request.arguments.get("enable", []) != []:
            raise qmp.QmpError("Parameter 'enable' must be an empty array: kvmigrate offers no QMP capabilities")
        self.negotiated = True
        return {}


def same_user(connection: socket.socket) -> bool:
    """Whether the peer is root or runs under our own uid; the kernel says so (SO_PEERCRED, unix(7))."""
    packed = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    _pid, uid, _gid = _CREDENTIALS.unpack(packed)
    return uid in (0, os.geteuid())
