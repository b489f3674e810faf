"""What of a local APIC may differ after a load, and that all else may not."""

from __future__ import annotations

from kvmigrate.kvm.lapic import compare_lapic
from kvmigrate.state.fidelity import Fidelity, Verdict

COUNT, DIVIDE, LVT_ERROR = 0x390, 0x3E0, 0x370
PAGE = bytes(range(256)) * 4


def with_word(at: int, page: bytes = PAGE) -> bytes:
    """``page`` with another word at ``at``."""
    return page[:at] + bytes(byte ^ 0xFF for byte in page[at : at + 4]) + page[at + 4 :]


def verdicts(read_back: bytes) -> dict[str, Verdict]:
    fidelity = Fidelity()
    compare_lapic(PAGE, read_back, fidelity, "lapic")
    return {item.name: item.verdict for item in fidelity}


def test_a_page_that_came_as_it_was_is_exact() -> None:
    assert verdicts(PAGE) == {}


def test_a_count_that_goes_on_is_no_loss() -> None:
    assert verdicts(with_word(COUNT)) == {"lapic.0x390": Verdict.ADJUSTED}


def test_a_register_before_or_behind_the_count_is_none_of_it() -> None:
    for at in (LVT_ERROR, DIVIDE):
        assert verdicts(with_word(at)) == {f"lapic.{at:#x}": Verdict.REFUSED}
        both = with_word(at, with_word(COUNT))
        assert verdicts(both) == {"lapic.0x390": Verdict.ADJUSTED, f"lapic.{at:#x}": Verdict.REFUSED}
