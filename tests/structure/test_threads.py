"""A thread of a machine's part: nobody waits for its start, and whoever waits for its end does."""

from __future__ import annotations

import _thread
import sys
import threading
from collections.abc import Iterator

import pytest

from kvmigrate.threads import Thread

WAIT_S = 30


@pytest.fixture
def undisturbed() -> Iterator[None]:
    """Nobody takes the interpreter from who has it."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(WAIT_S)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("undisturbed")
def test_who_starts_a_thread_does_not_wait_until_it_runs() -> None:
    ran: list[int] = []
    thread = Thread(lambda: ran.append(1))
    thread.start()
    before = list(ran)
    thread.join()
    assert (before, ran) == ([], [1])


def test_a_thread_is_alive_until_it_has_ended_and_who_joins_waits_for_that() -> None:
    go_on, ids = threading.Event(), list[int]()

    def body() -> None:
        ids.append(threading.get_native_id())
        go_on.wait(WAIT_S)

    thread = Thread(body)
    assert not thread.is_alive()
    thread.start()
    assert thread.native_id != threading.get_native_id()
    thread.join(0.01)
    assert thread.is_alive()
    go_on.set()
    thread.join()
    assert not thread.is_alive()
    assert ids == [thread.native_id]


def test_a_thread_that_the_host_has_no_room_for_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    thread = Thread(lambda: None)
    monkeypatch.setattr(_thread, "start_new_thread", refuse)
    with pytest.raises(RuntimeError):
        thread.start()
    assert not thread.is_alive()
    thread.join()
