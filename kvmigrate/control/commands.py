"""The command table: every QMP command, its arguments, when it may come, and the handler that carries it out.

The table is the only place that knows the commands: the server checks by it, ``query-commands`` lists it and
docs/qmp.md prints it. Handlers run in the control loop and never block it: what takes long is a thread's.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from ..config import Address, Compression, MigrationParameters, SnapshotParameters
from ..contract import RunState
from ..errors import ConfigError
from ..record import replace
from . import parameters as params
from .qmp import COMPATIBLE_QEMU, QmpError
from .schema import LIVE, Argument, Command, Kind

Arguments = Mapping[str, Any]


class Vm(Protocol):
    """What the commands ask of the process that they control; see ``session.Session``."""

    name: str
    parameters: MigrationParameters
    events_on: bool

    @property
    def package(self) -> str: ...

    @property
    def runstate(self) -> RunState: ...

    @property
    def job(self) -> str:
        """The job under way: ``migration``, ``snapshot`` or, when there is none, nothing."""
        ...

    def facts(self) -> Mapping[str, Any]:
        """``uuid``, ``memory_bytes`` and ``thread_ids`` (one of each vCPU); zeros while there is no machine."""
        ...

    async def pause(self) -> None: ...
    async def resume(self) -> None: ...
    async def reset(self) -> None: ...
    async def digest(self) -> Mapping[str, Any]: ...
    def press_power_button(self) -> None: ...
    def resize(self, keep_bytes: int) -> None: ...
    def balloon_info(self) -> Mapping[str, Any]: ...
    def quit(self) -> None: ...
    def start_migration(self, address: Address) -> None: ...
    def start_check(self, address: Address) -> None: ...
    def cancel_job(self) -> None: ...
    def start_snapshot(self, directory: Path, parameters: SnapshotParameters) -> None: ...
    def migration_info(self) -> Mapping[str, Any]: ...
    def job_info(self) -> Mapping[str, Any]: ...
    def resolve(self, action: str) -> Mapping[str, Any]: ...


async def _query_version(vm: Vm, _: Arguments) -> object:
    return {"qemu": COMPATIBLE_QEMU, "package": vm.package}


async def _query_name(vm: Vm, _: Arguments) -> object:
    return {"name": vm.name}


async def _query_uuid(vm: Vm, _: Arguments) -> object:
    return {"UUID": vm.facts()["uuid"]}


async def _query_kvm(_vm: Vm, _: Arguments) -> object:
    return {"enabled": True, "present": True}


async def _query_status(vm: Vm, _: Arguments) -> object:
    state = vm.runstate
    return {"status": state.value, "running": state is RunState.RUNNING, "singlestep": False}


async def _query_commands(_vm: Vm, _: Arguments) -> object:
    return [{"name": name} for name in COMMANDS]


async def _query_cpus_fast(vm: Vm, _: Arguments) -> object:
    return [
        {"cpu-index": i, "thread-id": tid, "target": "x86_64", "qom-path": f"/machine/cpu[{i}]"}
        for i, tid in enumerate(vm.facts()["thread_ids"])
    ]


async def _query_memory(vm: Vm, _: Arguments) -> object:
    return {"base-memory": vm.facts()["memory_bytes"]}


async def _balloon(vm: Vm, arguments: Arguments) -> object:
    vm.resize(arguments["value"])
    return {}


async def _query_balloon(vm: Vm, _: Arguments) -> object:
    return vm.balloon_info()


async def _stop(vm: Vm, _: Arguments) -> object:
    await vm.pause()
    return {}


async def _cont(vm: Vm, _: Arguments) -> object:
    await vm.resume()
    return {}


async def _quit(vm: Vm, _: Arguments) -> object:
    vm.quit()
    return {}


async def _system_powerdown(vm: Vm, _: Arguments) -> object:
    vm.press_power_button()
    return {}


async def _system_reset(vm: Vm, _: Arguments) -> object:
    await vm.reset()
    return {}


async def _migrate(vm: Vm, arguments: Arguments) -> object:
    if any(arguments.get(flag) for flag in ("blk", "inc", "resume")):
        raise QmpError("kvmigrate has neither disk migration nor a migration to resume: leave blk, inc and resume out")
    vm.start_migration(params.destination(arguments))
    return {}


async def _check(vm: Vm, arguments: Arguments) -> object:
    vm.start_check(params.destination(arguments))
    return {}


async def _migrate_cancel(vm: Vm, _: Arguments) -> object:
    if vm.job == "migration":
        vm.cancel_job()
    return {}


async def _query_migrate(vm: Vm, _: Arguments) -> object:
    return vm.migration_info()


async def _set_parameters(vm: Vm, arguments: Arguments) -> object:
    vm.parameters = params.changed(vm.parameters, arguments)
    return {}


async def _query_parameters(vm: Vm, _: Arguments) -> object:
    return params.to_qmp(vm.parameters)


async def _set_capabilities(vm: Vm, arguments: Arguments) -> object:
    on = params.switched(_switched_on(vm), arguments["capabilities"])
    vm.events_on = "events" in on
    vm.parameters = replace(vm.parameters, zero_copy="zero-copy-send" in on)
    return {}


async def _query_capabilities(vm: Vm, _: Arguments) -> object:
    return params.capabilities_to_qmp(_switched_on(vm))


def _switched_on(vm: Vm) -> set[str]:
    return {name for name, on in (("events", vm.events_on), ("zero-copy-send", vm.parameters.zero_copy)) if on}


async def _snapshot(vm: Vm, arguments: Arguments) -> object:
    directory = Path(arguments["directory"])
    if not directory.is_absolute():
        raise ConfigError(f"{str(directory)!r} is not an absolute path")
    wanted = SnapshotParameters(
        paused=arguments.get("paused", False),
        compression=Compression.parse(arguments.get("compression", "none")),
    )
    vm.start_snapshot(directory, wanted)
    return {}


async def _cancel(vm: Vm, _: Arguments) -> object:
    if vm.job:
        vm.cancel_job()
    return {}


async def _job(vm: Vm, _: Arguments) -> object:
    return vm.job_info()


async def _resolve(vm: Vm, arguments: Arguments) -> object:
    if arguments["action"] not in ("run", "discard"):
        raise QmpError("Parameter 'action' expects 'run' or 'discard'")
    return vm.resolve(arguments["action"])


async def _digest(vm: Vm, _: Arguments) -> object:
    return await vm.digest()


_STOPPABLE = frozenset({RunState.RUNNING, RunState.PAUSED})
_DIGESTIBLE = LIVE | {RunState.POSTMIGRATE}
_CAPABILITIES = Argument("capabilities", Kind.ARRAY, "objects {capability, state}", required=True)
_MIGRATE = (
    Argument("uri", Kind.STRING, "`tcp:HOST:PORT`, `tcp://HOST:PORT`, `unix:PATH` or `unix:///PATH`"),
    Argument("channels", Kind.ARRAY, "one channel, in place of `uri`"),
    Argument("detach", Kind.BOOLEAN, "ignored, as by QEMU"),
    Argument("blk", Kind.BOOLEAN, "only false"),
    Argument("inc", Kind.BOOLEAN, "only false"),
    Argument("resume", Kind.BOOLEAN, "only false"),
)
_SNAPSHOT = (
    Argument("directory", Kind.STRING, "absolute path, must not exist yet", required=True),
    Argument("paused", Kind.BOOLEAN, "stop the guest for all of it"),
    Argument("compression", Kind.STRING, "none, zstd or zstd:LEVEL"),
)

_ROWS: tuple[Command[Vm], ...] = (
    Command("query-version", _query_version, "the QEMU whose QMP is followed, and this program's version"),
    Command("query-commands", _query_commands, "the names of all commands"),
    Command("query-name", _query_name, "the VM's name"),
    Command("query-uuid", _query_uuid, "the guest's UUID, which stays with it wherever it moves"),
    Command("query-kvm", _query_kvm, "always enabled"),
    Command("query-status", _query_status, "the run state"),
    Command("query-cpus-fast", _query_cpus_fast, "the vCPUs and their threads"),
    Command("query-memory-size-summary", _query_memory, "the size of guest RAM in bytes"),
    Command("balloon", _balloon, "ask the guest to give memory up, or to take it again",
            (Argument("value", Kind.INTEGER, "how many bytes the guest is to keep", required=True, low=1),),
            _STOPPABLE, with_job=False),
    Command("query-balloon", _query_balloon, "`actual`: how many bytes the guest has, as its driver says;"
            " `x-kvmigrate-target`: how many it is to keep; `x-kvmigrate-driver`: whether there is a driver"),
    Command("stop", _stop, "pause the guest", states=_STOPPABLE, with_job=False),
    Command("cont", _cont, "let it run (again)", states=LIVE, with_job=False),
    Command("quit", _quit, "end the guest and the process; its exit status is 8"),
    Command("system_powerdown", _system_powerdown, "press the power button; the guest's system decides what it does",
            states=frozenset({RunState.RUNNING})),
    Command("system_reset", _system_reset, "press the reset button: the guest boots anew, or ends with `--no-reboot`",
            states=LIVE),
    Command("migrate", _migrate, "start a live migration", _MIGRATE, LIVE, with_job=False),
    Command("migrate_cancel", _migrate_cancel, "stop it; succeeds even when none is under way"),
    Command("query-migrate", _query_migrate, "its status and figures; with no fields before the first"),
    Command("migrate-set-parameters", _set_parameters, "change some of them", params.PARAMETERS, with_job=False),
    Command("query-migrate-parameters", _query_parameters, "all of them"),
    Command("migrate-set-capabilities", _set_capabilities, "switch `events` or `zero-copy-send` on or off",
            (_CAPABILITIES,)),
    Command("query-migrate-capabilities", _query_capabilities, "all of QEMU 7.2's, and whether each is on"),
    Command("x-kvmigrate-snapshot", _snapshot, "start a snapshot", _SNAPSHOT, LIVE, with_job=False),
    Command("x-kvmigrate-check", _check, "have a destination try the guest's state, which stays here", (_MIGRATE[0],),
            LIVE, with_job=False),
    Command("x-kvmigrate-cancel", _cancel, "stop the migration, snapshot or check under way"),
    Command("x-kvmigrate-job", _job, "the last migration, snapshot or check: status, progress, result or error"),
    Command(
        "x-kvmigrate-resolve",
        _resolve,
        "settle a migration whose outcome is unknown: run the guest here, or discard it here",
        (Argument("action", Kind.STRING, "run or discard", required=True),),
    ),
    Command("x-digest", _digest, "hashes of every page and of the state of a guest that does not run, for tests",
            states=_DIGESTIBLE - {RunState.RUNNING}, with_job=False),
)  # fmt: skip

COMMANDS: dict[str, Command[Vm]] = {command.name: command for command in _ROWS}


async def execute(vm: Vm, name: str, arguments: Arguments) -> object:
    """Carry out one command of a client that has negotiated. Raises :class:`QmpError` or a :class:`KvmigrateError`."""
    command = COMMANDS.get(name)
    if command is None:
        raise QmpError(f"The command {name} has not been found", "CommandNotFound")
    command.check_arguments(arguments)
    command.check_state(vm.runstate, vm.job)
    return await command.handler(vm, arguments)


if __name__ == "__main__":
    from .schema import table_as_markdown

    print(table_as_markdown(COMMANDS), end="")
