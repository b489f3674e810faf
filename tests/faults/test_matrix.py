"""The fault matrix: at every step of the handshake, every kind of fault, with one guest that goes through all of it.

After each cell the guest runs in one place or is known to be lost with its host, never in two; and where it survived,
the same guest then migrates as if nothing had been.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from kvmigrate.errors import ControlError
from kvmigrate.state.frame import FrameKind

from ..oracle.heartbeat import require_progress, require_silence
from ..oracle.world import MOVED, World, free_port, migrate, open_world
from .cells import Attempt, Traveller, attempt, before, in_doubt
from .proxy import Action, Strike

pytestmark = pytest.mark.timeout(300)
NAMES = "HELLO CONFIG ACCEPT CHECK CHECKED JOIN PAGES ROUND SECTION END READY COMMIT RUNNING DONE"
HELLO, CONFIG, ACCEPT, CHECK, CHECKED, JOIN, PAGES, ROUND, SECTION, END, READY, COMMIT, RUNNING, DONE = (
    FrameKind[name] for name in NAMES.split()
)
SETUP = (HELLO, CONFIG, ACCEPT, CHECK, CHECKED)
FILLED = range(512, 2048)
"""Pages that the guest filled and does not write any more: none of them is sent again, which would mend it."""


@pytest.fixture(scope="module")
def traveller() -> Iterator[Traveller]:
    with open_world() as world:
        yield Traveller(world)


@pytest.fixture(autouse=True)
def forget_after_failure(traveller: Traveller, request: pytest.FixtureRequest) -> Iterator[None]:
    """A cell that fails must not fail the next one too: that one starts with a guest of its own."""
    failed = request.session.testsfailed
    yield
    if request.session.testsfailed != failed:
        traveller.forget()


def after_of(kind: FrameKind) -> FrameKind | None:
    """The sections of the check come by first; those that count come with the guest paused."""
    return FrameKind.ROUND if kind is SECTION else None


def strike_link(traveller: Traveller, kind: FrameKind, action: Action) -> Attempt:
    return attempt(traveller, Strike(kind, action, FILLED, after=after_of(kind)))


@pytest.mark.parametrize("kind", [*SETUP, PAGES, SECTION, END, READY, COMMIT, RUNNING, DONE])
def test_link_is_cut(traveller: Traveller, kind: FrameKind) -> None:
    cell = strike_link(traveller, kind, Action.CUT)
    if kind in (RUNNING, DONE):
        cell.require_moved()
    else:
        # Also at COMMIT: asked over a new connection, a destination that has not seen it gives the guest up.
        cell.require_source_goes_on()


@pytest.mark.parametrize(
    ("kind", "action"),
    [
        (JOIN, Action.RESET),
        (PAGES, Action.CUT),
        (PAGES, Action.STALL),
        (PAGES, Action.CORRUPT),
        (ROUND, Action.STALL),
        (ROUND, Action.CUT),
    ],
)
def test_one_of_several_connections_is_hurt(traveller: Traveller, kind: FrameKind, action: Action) -> None:
    attempt(traveller, Strike(kind, action, FILLED, further=True), connections=3).require_source_goes_on()


@pytest.mark.parametrize("kind", [PAGES, READY, COMMIT, RUNNING])
def test_link_is_reset(traveller: Traveller, kind: FrameKind) -> None:
    cell = strike_link(traveller, kind, Action.RESET)
    if kind is RUNNING:
        cell.require_moved()
    else:
        cell.require_source_goes_on()


@pytest.mark.parametrize("kind", [HELLO, CHECK, CHECKED, PAGES, END, READY, COMMIT, RUNNING])
def test_link_stalls(traveller: Traveller, kind: FrameKind) -> None:
    cell = strike_link(traveller, kind, Action.STALL)
    if kind is RUNNING:
        cell.require_moved()
    else:
        cell.require_source_goes_on()


@pytest.mark.parametrize("kind", [*SETUP, PAGES, SECTION, END, READY, COMMIT, RUNNING])
def test_a_bit_is_flipped(traveller: Traveller, kind: FrameKind) -> None:
    cell = strike_link(traveller, kind, Action.CORRUPT)
    if kind is RUNNING:
        cell.require_moved()
    else:
        cell.require_source_goes_on()


@pytest.mark.parametrize("kind", [CONFIG, CHECK, CHECKED, PAGES, SECTION, END])
def test_destination_dies_before_ready(traveller: Traveller, kind: FrameKind) -> None:
    cell = attempt(traveller, Strike(kind, Action.CALL, FILLED, after=after_of(kind), victim="kill-destination"))
    assert cell.settled_job()["status"] == "failed"
    assert cell.source.status() == "running"
    require_progress(cell.source.log, 3)
    traveller.hop()


@pytest.mark.parametrize("kind", [READY, COMMIT])
def test_destination_dies_before_it_runs(traveller: Traveller, kind: FrameKind) -> None:
    """The source cannot know whether it ran: the guest stays paused until the operator says that it did not."""
    cell = attempt(traveller, Strike(kind, Action.CALL, victim="kill-destination"))
    cell.require_in_doubt()
    require_silence(cell.source.log)
    done = traveller.world.command("resolve", cell.source.name, "--run")
    assert done.returncode == 0, done.stderr
    cell.source.wait_status("running")
    require_progress(cell.source.log, 3)
    traveller.hop()


def test_destination_dies_as_it_runs(traveller: Traveller) -> None:
    """The guest is lost with its host; the source says so, and gives it up on the operator's word."""
    cell = attempt(traveller, Strike(RUNNING, Action.CUT, down=True))
    cell.require_in_doubt()
    require_progress(cell.destination.log, 3)
    cell.destination.kill()
    cell.proxy.mend()
    cell.require_in_doubt()
    done = traveller.world.command("resolve", cell.source.name, "--discard")
    assert done.returncode == 0, done.stderr
    assert cell.source.wait_end(30) == MOVED, cell.source.stderr
    traveller.lost()


def test_link_stays_down_after_commit_and_comes_back(traveller: Traveller) -> None:
    cell = attempt(traveller, Strike(RUNNING, Action.CUT, down=True))
    cell.require_in_doubt()
    require_progress(cell.destination.log, 3)
    require_silence(cell.source.log)
    cell.proxy.mend()
    assert cell.source.wait_end(30) == MOVED, cell.source.stderr
    traveller.moved_to(cell.destination)


@pytest.mark.parametrize("kind", [CONFIG, CHECK, CHECKED, PAGES, SECTION, END])
def test_source_dies_before_ready(traveller: Traveller, kind: FrameKind) -> None:
    """The guest is lost with its host, and the destination must not run what it has of it."""
    cell = attempt(traveller, Strike(kind, Action.CALL, FILLED, after=after_of(kind), victim="kill-source"))
    cell.proxy.drop()
    cell.end_destination()
    assert not cell.destination.log.chunks
    traveller.lost()


def test_source_dies_between_ready_and_commit(traveller: Traveller) -> None:
    """The destination has all of the guest and may not run it, until the operator says that the source is dead."""
    cell = attempt(traveller, Strike(READY, Action.CALL, victim="kill-source"))
    cell.proxy.drop()
    assert in_doubt(cell.destination), cell.destination.stderr
    assert not cell.destination.log.chunks
    done = traveller.world.command("resolve", cell.destination.name, "--run")
    assert done.returncode == 0, done.stderr
    traveller.moved_to(cell.destination)


@pytest.mark.parametrize("kind", [COMMIT, RUNNING])
def test_source_dies_after_commit(traveller: Traveller, kind: FrameKind) -> None:
    cell = attempt(traveller, Strike(kind, Action.CALL, victim="kill-source"))
    traveller.moved_to(cell.destination)


@pytest.mark.parametrize("kind", [CONFIG, CHECK, CHECKED, PAGES, SECTION, END, READY])
def test_cancelled_before_commit(traveller: Traveller, kind: FrameKind) -> None:
    assert before(kind)
    cell = attempt(traveller, Strike(kind, Action.CALL, FILLED, after=after_of(kind), victim="cancel"))
    assert cell.job is not None and cell.job["status"] == "cancelled"
    cell.require_source_goes_on()


@pytest.mark.parametrize("kind", [COMMIT, RUNNING])
def test_cancel_after_commit_is_refused(traveller: Traveller, kind: FrameKind) -> None:
    attempt(traveller, Strike(kind, Action.CALL, victim="cancel")).require_moved()


def test_nobody_listens(traveller: Traveller) -> None:
    source = traveller.source()
    done = traveller.world.command("send", source.name, f"tcp://127.0.0.1:{free_port()}")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert source.status() == "running"
    require_progress(source.log, 3)


def test_a_second_migration_while_one_is_under_way_is_refused(traveller: Traveller) -> None:
    source = traveller.source()
    refused: list[str] = []

    def again() -> None:
        try:
            source.execute("migrate", uri=f"tcp://127.0.0.1:{free_port()}")
        except ControlError as error:
            refused.append(str(error))

    strike = Strike(PAGES, Action.CALL, victim="second")
    strike.call = again
    cell = attempt(traveller, strike)
    assert len(refused) == 1
    cell.require_moved()


def test_nothing_is_left_behind(traveller: Traveller, world: World) -> None:
    """After a failed attempt and a good one: the runtime directory holds the files of the one that lives."""
    source = world.run("ledger", "beat=10 pages=200", memory="16M")
    migrate(source, f"tcp://127.0.0.1:{free_port()}")
    destination = world.hop(source, world.tcp())
    require_progress(destination.log, 3)
    left = {path.name for path in (world.directory / "kvmigrate").iterdir()}
    assert left <= {f"{destination.name}{end}" for end in (".lock", ".sock", ".tty", ".journal")}, left
    destination.execute("quit")
    assert destination.wait_end() == 8
    assert not list((world.directory / "kvmigrate").iterdir())
