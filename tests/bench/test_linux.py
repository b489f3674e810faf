"""The page on Debian beside QEMU says what was measured, and what failed."""

from __future__ import annotations

from .linux import FIGURES, page
from .samples import Sample, Series


def row(name: str, *values: float, ours: bool = False, failures: list[str] | None = None) -> Series:
    samples = [Sample({FIGURES[0]: value, "boot exits": value * 2}) for value in values]
    return Series(name, lambda: samples[0], ours, 0, samples, failures or [])


def test_a_figure_is_told_by_its_spread_and_beside_the_best_of_the_others() -> None:
    text = page([row("kvmigrate", 30, 20, 40, ours=True), row("QEMU a", 90), row("QEMU b", 50, 70, 60)])
    assert f"| {FIGURES[0]} | 30.0 (20.0 to 40.0) | 90.0 (90.0 to 90.0) | 60.0 (50.0 to 70.0) | 0.50 |" in text
    assert "| boot exits | 60.0 (40.0 to 80.0) |" in text


def test_a_system_that_failed_is_named_and_no_rival() -> None:
    text = page([row("kvmigrate", 30, ours=True), row("QEMU", failures=["TimeoutError: no line"])])
    assert f"| {FIGURES[0]} | 30.0 (30.0 to 30.0) |  |  |" in text
    assert "- QEMU: TimeoutError: no line" in text
