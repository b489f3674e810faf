"""The control socket as a client sees it: negotiation, replies, events, refusals; by raw bytes and by ``qemu.qmp``."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import socket
import stat
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from qemu.qmp import ExecuteError, QMPClient

from kvmigrate.config import Address
from kvmigrate.contract import RunState
from kvmigrate.control import commands, schema, server
from kvmigrate.control.client import Client
from kvmigrate.errors import ControlError
from tests.qemu_qmp import ask, next_event

from .fake_vm import FakeVm, serving


@pytest.fixture
def vm() -> FakeVm:
    return FakeVm()


@pytest.fixture
def path(vm: FakeVm, tmp_path: Path) -> Iterator[Path]:
    with serving(vm, tmp_path / "vm.sock"):
        yield tmp_path / "vm.sock"


class Raw:
    """A client that sends bytes and reads lines."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(10)
        self.socket.connect(str(path))
        self.lines = self.socket.makefile("rb")

    def __enter__(self) -> Raw:
        return self

    def __exit__(self, *_: object) -> None:
        self.lines.close()
        self.socket.close()

    def receive(self) -> dict[str, Any]:
        line = self.lines.readline()
        assert line.endswith(b"\r\n"), line
        message: dict[str, Any] = json.loads(line)
        return message

    def ask(self, text: bytes) -> dict[str, Any]:
        self.socket.sendall(text)
        return self.receive()

    def negotiate(self) -> None:
        assert "QMP" in self.receive()
        assert self.ask(b'{"execute": "qmp_capabilities"}') == {"return": {}}


@pytest.fixture
def raw(path: Path) -> Iterator[Raw]:
    with Raw(path) as client:
        yield client


def test_the_socket_is_for_its_owner_alone(path: Path) -> None:
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_greeting_comes_first_and_nothing_works_before_negotiation(raw: Raw) -> None:
    greeting = raw.receive()["QMP"]
    assert greeting["capabilities"] == []
    assert greeting["version"]["qemu"].keys() == {"major", "minor", "micro"}
    assert raw.ask(b'{"execute": "query-status", "id": 1}')["error"]["class"] == "CommandNotFound"
    assert raw.ask(b'{"execute": "qmp_capabilities", "arguments": {"enable": ["oob"]}}')["error"]
    assert raw.ask(b'{"execute": "qmp_capabilities"}') == {"return": {}}
    assert raw.ask(b'{"execute": "qmp_capabilities"}')["error"]["class"] == "CommandNotFound"
    assert raw.ask(b'{"execute": "query-status", "id": [1]}') == {
        "return": {"status": "running", "running": True, "singlestep": False},
        "id": [1],
    }


def test_events_reach_only_those_who_negotiated(path: Path) -> None:
    with Raw(path) as silent, Raw(path) as listener, Client(path, "fake") as actor:
        silent.receive()
        listener.negotiate()
        actor.execute("stop")
        assert listener.receive()["event"] == "STOP"
        assert silent.ask(b'{"execute": "qmp_capabilities"}') == {"return": {}}


@pytest.mark.parametrize(
    ("text", "error_class"),
    [
        (b'{"execute": "no-such"}', "CommandNotFound"),
        (b'{"execute": "stop", "arguments": {"x": 1}}', "GenericError"),
        (b'{"execute": "migrate"}', "GenericError"),
        (b'{"execute": "migrate", "arguments": {"uri": 5}}', "GenericError"),
        (b'{"execute": "migrate", "arguments": {"uri": "exec:rm -rf /"}}', "GenericError"),
        (b'{"execute": "migrate", "arguments": {"uri": "tcp:h:1", "blk": true}}', "GenericError"),
        (b'{"execute": "migrate", "arguments": {"channels": []}}', "GenericError"),
        (b'{"execute": "migrate", "arguments": {"channels": [{"addr": {"transport": "exec"}}]}}', "GenericError"),
        (b'{"execute": "migrate-set-parameters", "arguments": {"downtime-limit": -1}}', "GenericError"),
        (b'{"execute": "migrate-set-parameters", "arguments": {"max-bandwidth": true}}', "GenericError"),
        (b'{"execute": "migrate-set-parameters", "arguments": {"multifd-compression": "rar"}}', "GenericError"),
        (b'{"execute": "migrate-set-capabilities", "arguments": {"capabilities": [1]}}', "GenericError"),
        (
            b'{"execute": "migrate-set-capabilities", "arguments": {"capabilities":'
            b' [{"capability": "postcopy-ram", "state": true}]}}',
            "GenericError",
        ),
        (b'{"execute": "x-kvmigrate-snapshot", "arguments": {"directory": "relative"}}', "GenericError"),
        (b'{"execute": "x-kvmigrate-snapshot", "arguments": {"directory": "/a", "compression": "gz"}}', "GenericError"),
        (b'{"execute": "x-kvmigrate-resolve", "arguments": {"action": "both"}}', "GenericError"),
        (b'{"execute": "system_reset", "arguments": {"hard": true}}', "GenericError"),
        (b'{"execute": "\\ud800"}', "CommandNotFound"),
        (b"nonsense\n", "GenericError"),
        (b'{"execute": "query-status"', None),
    ],
)
def test_hostile_input_gets_an_error_and_the_vm_lives_on(
    raw: Raw, vm: FakeVm, path: Path, text: bytes, error_class: str | None
) -> None:
    raw.negotiate()
    if error_class is not None:
        error = raw.ask(text)["error"]
        assert error["class"] == error_class
        assert "\n" not in error["desc"]
        assert "internal error" not in error["desc"]
    else:
        raw.socket.sendall(text)
        raw.socket.shutdown(socket.SHUT_WR)
        assert raw.lines.readline() == b""
    assert vm.log == []
    with Client(path, "fake") as other:
        assert other.execute("query-name") == {"name": "fake"}


def test_a_handler_that_breaks_is_an_error_reply_of_one_line(raw: Raw, vm: FakeVm) -> None:
    raw.negotiate()
    vm.runstate = RunState.PAUSED
    reply = raw.ask(b'{"execute": "x-digest", "id": 3}')
    assert reply["id"] == 3
    assert reply["error"]["desc"] == "internal error: RuntimeError: the hash machine is broken"
    assert raw.ask(b'{"execute": "query-name"}')["return"] == {"name": "fake"}


def test_a_client_that_reads_nothing_is_cut_off(path: Path, vm: FakeVm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "MAX_UNREAD_BYTES", 16 << 10)
    with Raw(path) as lazy:
        lazy.negotiate()
        lazy.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        assert vm.server is not None
        with Client(path, "fake") as actor:
            for _ in range(12_000):
                actor.execute("cont")
                if vm.server.nr_clients == 1:
                    break
            assert vm.server.nr_clients == 1


def test_too_many_clients_are_turned_away(path: Path) -> None:
    clients = [Client(path, "fake") for _ in range(server.MAX_CLIENTS)]
    with pytest.raises(ControlError):
        Client(path, "fake")
    for client in clients:
        client.close()
    deadline = time.monotonic() + 10
    while True:
        try:
            Client(path, "fake").close()
            break
        except ControlError:
            assert time.monotonic() < deadline


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_another_user_is_turned_away_even_through_an_open_door(path: Path, tmp_path: Path) -> None:
    for directory in [tmp_path, *tmp_path.parents]:
        if directory.stat().st_mode & 0o005 != 0o005:
            directory.chmod(directory.stat().st_mode | 0o055)
    path.chmod(0o666)
    pid = os.fork()
    if pid == 0:
        try:
            os.setuid(65534)
            with socket.socket(socket.AF_UNIX) as stranger:
                stranger.settimeout(10)
                stranger.connect(str(path))
                os._exit(0 if stranger.recv(10) == b"" else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_commands_are_refused_by_state_with_the_reason(path: Path, vm: FakeVm) -> None:
    with Client(path, "fake") as client:
        with pytest.raises(ControlError, match="the VM is running, but x-digest needs it to be"):
            client.execute("x-digest")
        client.execute("migrate", {"uri": "tcp:localhost:1"})
        for command, arguments in [("stop", {}), ("cont", {}), ("migrate", {"uri": "tcp:localhost:1"})]:
            with pytest.raises(ControlError, match=f"{command} has to wait for the job under way"):
                client.execute(command, arguments)
        client.execute("migrate_cancel")
        client.execute("migrate_cancel")
        assert vm.log == [Address("localhost", 1), "cancel"]
        vm.runstate = RunState.POSTMIGRATE
        with pytest.raises(ControlError, match="the VM is postmigrate"):
            client.execute("cont")


@pytest.mark.parametrize(
    ("arguments", "address"),
    [
        ({"uri": "tcp:host:5"}, Address("host", 5)),
        ({"uri": "tcp://[::1]:5", "detach": True}, Address("::1", 5)),
        ({"uri": "unix:/a/b"}, Address(path="/a/b")),
        (
            {"channels": [{"channel-type": "main", "addr": {
                "transport": "socket", "type": "inet", "host": "::1", "port": "7"}}]},
            Address("::1", 7),
        ),
        (
            {"channels": [{"channel-type": "main", "addr": {"transport": "socket", "type": "unix", "path": "/s"}}]},
            Address(path="/s"),
        ),
    ],
)  # fmt: skip
def test_every_way_to_name_a_destination_is_understood(
    path: Path, vm: FakeVm, arguments: dict[str, Any], address: Address
) -> None:
    with Client(path, "fake") as client:
        client.execute("migrate", arguments)
    assert vm.log == [address]


def test_parameters_are_set_and_told_in_qemus_units(path: Path, vm: FakeVm) -> None:
    with Client(path, "fake") as client:
        client.execute("migrate-set-parameters", {"downtime-limit": 50, "max-bandwidth": 1 << 30})
        client.execute("migrate-set-parameters", {"multifd-compression": "zstd", "multifd-zstd-level": 7})
        client.execute("migrate-set-parameters", {"x-kvmigrate-max-rounds": 9})
        told = client.execute("query-migrate-parameters")
    assert (told["downtime-limit"], told["max-bandwidth"], told["multifd-compression"]) == (50, 1 << 30, "zstd")
    assert vm.parameters.compression.level == 7
    assert vm.parameters.max_rounds == 9
    assert vm.parameters.downtime_limit_ms == 50


def test_zero_copy_is_switched_as_qemus_capability(path: Path, vm: FakeVm) -> None:
    def on(client: Client) -> set[str]:
        return {one["capability"] for one in client.execute("query-migrate-capabilities") if one["state"]}

    with Client(path, "fake") as client:
        assert on(client) == {"multifd", "return-path", "validate-uuid"}
        wanted = [{"capability": name, "state": True} for name in ("zero-copy-send", "events")]
        client.execute("migrate-set-capabilities", {"capabilities": wanted})
        assert on(client) >= {"zero-copy-send", "events"}
        assert vm.parameters.zero_copy and vm.events_on
        client.execute("migrate-set-parameters", {"downtime-limit": 50})
        assert vm.parameters.zero_copy
        off = [{"capability": "zero-copy-send", "state": False}]
        client.execute("migrate-set-capabilities", {"capabilities": off})
        assert not vm.parameters.zero_copy and vm.events_on


def test_every_command_of_the_table_is_listed_and_reachable(path: Path) -> None:
    with Client(path, "fake") as client:
        listed = {entry["name"] for entry in client.execute("query-commands")}
        for name in listed - {"x-digest"}:
            try:
                client.execute(name)
            except ControlError as error:
                assert error.qmp_class == "GenericError", name
                assert "internal error" not in str(error), name
    assert listed == set(commands.COMMANDS)


def test_the_document_shows_the_table_that_the_server_obeys() -> None:
    document = Path(__file__).parents[2] / "docs" / "qmp.md"
    assert schema.table_as_markdown(commands.COMMANDS) in document.read_text()


async def _drive(path: Path) -> list[str]:
    """What a script for QEMU does, with QEMU's own library."""
    client = QMPClient("script")
    seen: list[str] = []
    await client.connect(str(path))
    with client.listener() as listener:
        assert (await ask(client, "query-status"))["status"] == "running"
        await client.execute("stop")
        await client.execute("cont")
        for _ in range(2):
            seen.append((await next_event(listener, 10))["event"])
    with pytest.raises(ExecuteError, match="has not been found") as caught:
        await client.execute("device_add", {"driver": "virtio-net-pci"})
    assert caught.value.error_class == "CommandNotFound"
    await client.disconnect()
    return seen


def test_qemus_own_client_library_drives_it(path: Path) -> None:
    assert asyncio.run(_drive(path)) == ["STOP", "RESUME"]


def test_a_client_that_comes_in_the_last_moment_leaves_no_traceback(vm: FakeVm) -> None:
    told: list[object] = []

    async def live() -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: told.append(context))
        transport, _ = await loop.create_unix_connection(asyncio.Protocol, sock=ours)
        accepting = asyncio.StreamReaderProtocol(asyncio.StreamReader(), server.Server(vm)._accept)
        # In the last round of the loop, so that nothing of the client's task has been done when it is cancelled.
        loop.call_soon(accepting.connection_made, transport)

    ours, client = socket.socketpair()
    with client, warnings.catch_warnings():
        # What was on its way in is closed by the end of the process.
        warnings.simplefilter("ignore", ResourceWarning)
        asyncio.run(live())
        gc.collect()
    assert told == []
