"""The tables that a migration or a snapshot ends with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from . import show

if TYPE_CHECKING:
    from ..state.fidelity import Fidelity

_PARTS = (
    ("stop", "source", "every vCPU parked"),
    ("state", "source", "saved and packed"),
    ("last-pages", "source", "last sync and last round"),
    ("send", "source", "frames on their way, both directions"),
    ("load", "destination", "state set and read back"),
    ("resume", "destination", "vCPUs let go"),
)


def job(value: Mapping[str, Any], *, verbose: bool) -> None:
    """Print what is known of a migration or snapshot; nothing when there was none."""
    if value["kind"] == "none":
        return
    result = value.get("result") or {}
    if result and value["kind"] == "check":
        check(value, verbose=verbose)
        return
    if "rounds" in result:
        rounds(result["rounds"])
    if "downtime-parts" in result:
        downtime(result["downtime-parts"])
    if verbose and result.get("fidelity"):
        fidelity(result["fidelity"])
    if "zero-copy" in result:
        print(zero_copy(result["zero-copy"]))
    if "rounds" in result and value["status"] == "completed":
        print(summary(value))
        return
    # What is under way, has failed, or comes in: the rounds of that are told at the source.
    where = "at" if value["kind"].startswith("incoming") else "to"
    print(f"{value['kind']} {where} {value['target']}: {value['status']}")
    if "error" in value:
        print(f"  {value['error']['desc']}")


def rounds(records: Sequence[Mapping[str, Any]]) -> None:
    """One line for each round, and their sum."""
    rows = [[_round_name(record), *_round_cells(record)] for record in records]
    if len(records) > 1:
        keys = ("pages-dirty", "pages-zero", "pages-cleared", "pages-sent", "bytes", "time")
        total: dict[str, Any] = {key: sum(record.get(key, 0) for record in records) for key in keys}
        total["rate"] = total["bytes"] / (total["time"] / 1e3) if total["time"] else 0
        rows.append(["total", *_round_cells(total)])
    columns = ["round", "pages dirty", "zero", "sent", "bytes", "time", "rate"]
    if any(record.get("compression") for record in records):
        columns += ["sent as", "why"]
        for row, record in zip(rows, records, strict=False):
            row += [_sent_as(record), record.get("compression-why", "")]
    show.table("", columns, [[*row, *[""] * (len(columns) - len(row))] for row in rows], right=range(1, 7))
    print()


def _sent_as(record: Mapping[str, Any]) -> str:
    """The codec, and over how many connections if not over one."""
    connections = record.get("connections", 1)
    return str(record.get("compression", "")) + (f" over {connections}" if connections > 1 else "")


def _round_name(record: Mapping[str, Any]) -> str:
    return f"{record['round']} (paused)" if record.get("last") else str(record["round"])


def _round_cells(record: Mapping[str, Any]) -> list[str]:
    return [
        f"{record['pages-dirty']:,}",
        f"{record['pages-zero'] + record.get('pages-cleared', 0):,}",
        f"{record['pages-sent']:,}",
        show.size(record["bytes"]),
        show.duration(record["time"]),
        show.rate(record["rate"]),
    ]


def downtime(parts: Mapping[str, float]) -> None:
    """The blackout in its parts, each on the clock of the side that did it."""
    rows = [[name.replace("-", " "), side, show.duration(parts[name]), text] for name, side, text in _PARTS]
    rows.append(["total", "", show.duration(sum(parts[name] for name, _, _ in _PARTS)), ""])
    show.table("downtime", ["part", "clock", "time", "what"], rows, right=(2,))
    print()


def fidelity(value: Mapping[str, Any], *, stderr: bool = False) -> None:
    """What became of every item of state: the counts, and each item that is not exact."""
    counts = value["counts"]
    title = "state: " + ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
    rows = [[str(cell) for cell in item] for item in value["items"]]
    show.table(title, ["item", "verdict", "saved", "read back", "why"], rows, stderr=stderr)


def restored(found: Fidelity) -> None:
    """The same of a guest that was just restored here; on standard error, for the guest may have the output."""
    fidelity(found.to_value(), stderr=True)


def check(value: Mapping[str, Any], *, verbose: bool) -> None:
    """What a destination refused of a guest's state, or all items that are not exact, and one line that sums it up."""
    result = value["result"]
    shown = {**result, "items": [item for item in result["items"] if verbose or item[1] in ("refused", "dropped")]}
    if shown["items"]:
        fidelity(shown)
        print()
    refused, target = result["counts"]["refused"], value["target"]
    word = "can go on" if result["fits"] else f"cannot go on: {refused} item{'s' * (refused != 1)} would be lost"
    pause = show.duration(result["pause-time"])
    print(f"at {target} this guest {word} (tried in {show.duration(result['total-time'])}, it was held up for {pause})")


def zero_copy(counts: Mapping[str, int]) -> str:
    """What became of the sends by reference that were asked for."""
    sends, copied, refused = counts["sends"], counts["copied"], counts["refused"]
    told = [f"{sends:,} sends without a copy"]
    if copied:
        told = [f"copied by the kernel anyway: {copied:,} of {sends:,} sends"]
        told[0] += " (nothing is gained by it on this link)" if copied == sends else ""
    if refused:
        told.append(f"{refused:,} went as a copy, since too many were under way or no more memory may be locked")
    return f"zero-copy: {'; '.join(told)}"


def summary(value: Mapping[str, Any]) -> str:
    """One line that says what was done."""
    result = value["result"]
    total = show.duration(result["total-time"])
    if value["kind"] == "snapshot":
        return f"saved in {value['target']}: {total}, the guest was paused for {show.duration(result['pause-time'])}"
    # Unknown when the answer to COMMIT was lost, and the destination had to be asked what became of the guest.
    still = f", the guest stood still for {show.duration(result['downtime'])}" if "downtime" in result else ""
    return f"moved to {value['target']}: {total}{still}"
