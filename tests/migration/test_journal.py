"""Who owns the guest: the journal, and the custody that decides once and journals it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from kvmigrate.errors import HostError, MigrationError, StreamError
from kvmigrate.migration import wire
from kvmigrate.migration.custody import Custody, answer_of
from kvmigrate.migration.journal import Entry, Journal, Record, Role

RECORD = Record("guest", "u-1", 7, Role.DESTINATION, Entry.RECEIVING, "tcp://h:1", 1)
MINE = wire.Query("u-1", 7)


def test_a_journal_is_read_as_it_was_written_and_leaves_nothing(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "guest")
    assert journal.read() is None
    journal.write(RECORD)
    assert Journal(tmp_path, "guest").read() == RECORD
    assert journal.path.stat().st_mode & 0o777 == 0o600
    journal.advance(Entry.DISCARDED)
    found = journal.read()
    assert found is not None
    assert found.state is Entry.DISCARDED
    journal.stage(RECORD)
    journal.remove()
    journal.remove()
    assert list(tmp_path.iterdir()) == []


def test_a_journal_that_was_replaced_by_a_newer_one_is_neither_changed_nor_removed(tmp_path: Path) -> None:
    older, newer = Journal(tmp_path, "guest"), Journal(tmp_path, "guest")
    older.write(RECORD)
    moved_on = replace(RECORD, role=Role.SOURCE, state=Entry.COMMITTED, epoch=RECORD.epoch + 1)
    newer.write(moved_on)
    with pytest.raises(HostError, match=r"guest\.journal"):
        older.advance(Entry.RUNNING)
    older.remove()
    assert newer.read() == moved_on
    newer.remove()
    assert list(tmp_path.iterdir()) == []


def test_what_was_made_ready_is_written_by_its_own_state_only(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "guest")
    journal.expect(Entry.COMMITTED)
    journal.write(RECORD)
    for ready, state in ((Entry.COMMITTED, Entry.COMMITTED), (Entry.COMMITTED, Entry.RUNNING)):
        journal.expect(ready)
        assert journal.read() != replace(RECORD, state=state)
        journal.advance(state)
        assert journal.read() == replace(RECORD, state=state)
    later = replace(RECORD, epoch=8)
    journal.expect(Entry.DISCARDED)
    journal.write(later)
    journal.advance(Entry.DISCARDED)
    assert journal.read() == replace(later, state=Entry.DISCARDED)


def test_a_staged_record_is_not_yet_the_journal(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "guest")
    journal.stage(RECORD)
    assert journal.read() is None
    journal.publish()
    assert journal.read() == RECORD


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"{}", b"\xff" * 10, b"[" * 5000, b'{"name": 1}', b"x" * (1 << 17)])
def test_a_damaged_journal_is_an_error_that_names_it(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "guest.journal").write_bytes(data)
    with pytest.raises(StreamError, match=r"guest\.journal"):
        Journal(tmp_path, "guest").read()


def test_a_question_before_commit_decides_against_the_guest_and_journals_it_first(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "guest")
    custody = Custody(journal, RECORD)
    assert custody.answer(MINE).state is wire.Ownership.DISCARDED
    found = journal.read()
    assert found is not None
    assert found.state is Entry.DISCARDED
    with pytest.raises(MigrationError, match="given up here before COMMIT came"):
        custody.commit()


def test_a_question_after_commit_is_answered_running(tmp_path: Path) -> None:
    custody = Custody(Journal(tmp_path, "guest"), RECORD)
    custody.commit()
    assert custody.answer(MINE).state is wire.Ownership.RUNNING
    assert not custody.discard("too late")
    with pytest.raises(MigrationError):
        custody.commit()


@pytest.mark.parametrize("query", [wire.Query("u-2", 7), wire.Query("u-1", 8)])
def test_a_question_about_another_attempt_decides_nothing(tmp_path: Path, query: wire.Query) -> None:
    custody = Custody(Journal(tmp_path, "guest"), RECORD)
    assert custody.answer(query).state is wire.Ownership.UNKNOWN
    custody.commit()


def test_committed_is_in_the_journal_before_the_guest_can_run(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "guest")
    Custody(journal, RECORD).commit()
    found = journal.read()
    assert found is not None
    assert found.state is Entry.COMMITTED


@pytest.mark.parametrize(
    ("state", "answer"),
    [
        (Entry.RECEIVING, wire.Ownership.DISCARDED),
        (Entry.DISCARDED, wire.Ownership.DISCARDED),
        (Entry.COMMITTED, wire.Ownership.BROKEN),
        (Entry.RUNNING, wire.Ownership.BROKEN),
    ],
)
def test_what_the_journal_of_a_dead_process_answers(state: Entry, answer: wire.Ownership) -> None:
    record = Record("guest", "u-1", 7, Role.DESTINATION, state, "", 1)
    assert answer_of(record, MINE).state is answer
    assert answer_of(record, wire.Query("u-1", 9)).state is wire.Ownership.UNKNOWN
    assert answer_of(None, MINE).state is wire.Ownership.UNKNOWN

def test_rehearsing_changes_nothing(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "guest")
    journal.rehearse()
    assert list(tmp_path.iterdir()) == []
    journal.write(RECORD)
    journal.expect(Entry.COMMITTED)
    later = replace(RECORD, epoch=8)
    journal.stage(later)
    journal.rehearse()
    assert journal.read() == RECORD
    journal.publish()
    assert journal.read() == later


def test_custody_that_is_rehearsed_decides_nothing(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "guest")
    custody = Custody(journal, RECORD)
    custody.rehearse()
    assert (custody.state, journal.read()) == (Custody.State.HELD, RECORD)
    custody.discard("cancelled")
    custody.rehearse()
    found = journal.read()
    assert found is not None
    assert (custody.state, found.state) == (Custody.State.DISCARDED, Entry.DISCARDED)


def test_a_journal_that_is_gone_is_noticed_before_the_blackout(tmp_path: Path) -> None:
    custody = Custody(Journal(tmp_path, "guest"), RECORD)
    Journal(tmp_path, "guest").write(replace(RECORD, epoch=8))
    with pytest.raises(HostError, match=r"guest\.journal"):
        custody.rehearse()
