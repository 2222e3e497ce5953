"""Tables and plots: numbers are formatted as a reader expects, pictures hold every curve."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from fastrank import report


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (7, "7"), (999, "999"), (1234, "1.23K"), (448_666, "449K"), (6_120_000, "6.12M"), (4.1e9, "4.1G")],
)
def test_short(value: float, text: str) -> None:
    assert report.short(value) == text


def test_ranks_text() -> None:
    assert report.ranks_text((144, 141)) == "144×141"
    assert report.ranks_text((7,)) == "7"
    assert report.ranks_text(()) == "dense"


def test_tables_hold_their_cells_and_leave_none_empty() -> None:
    console = Console(width=60)
    with console.capture() as captured:
        console.print(
            report.table(["layer", "weights"], [["conv1", report.thousands(1234567)], ["conv2", None]], title="T")
        )
    text = captured.get()
    assert "1,234,567" in text
    assert "None" not in text


def test_plots_are_pngs_of_what_they_were_given(tmp_path: Path) -> None:
    report.plot_spectra(tmp_path / "a.png", {"one": {"x": [3.0, 1.0], "y": [2.0, 1.9]}, "two": {"x": [1.0]}}, title="σ")
    panels = {f"p{i}": {"x": [1, 2], "y": [2, 2]} for i in range(4)}
    report.plot_ranks(tmp_path / "b.png", panels, ["r", "s"], dict.fromkeys(panels, 3), title="ranks")
    for name in ("a.png", "b.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_a_zero_spectrum_can_be_drawn(tmp_path: Path) -> None:
    report.plot_spectra(tmp_path / "zero.png", {"dead layer": {"x": [0.0, 0.0]}}, title="σ")
    assert (tmp_path / "zero.png").stat().st_size > 0
