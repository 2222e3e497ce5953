"""The long run of soak.py in small: the same figures are taken and judged, but for resident memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import soak


@pytest.mark.slow
def test_sixty_steps_neither_grow_nor_drift(tmp_path: Path, one_thread: None) -> None:
    found = soak.soak(60, tmp_path)
    assert found["bad"] == []
    assert found["looks"] == 20
    assert found["decompositions"]["norm"]["warm"] >= 60, "a third of those that could start warm"
    assert found["ranks"]["warm"] == found["ranks"]["exact"]


def test_a_leak_shows_in_the_slope() -> None:
    noise = [37 * step % 11 for step in range(0, 2000, 10)]
    for leak in (0.0, 800.0):
        steps = range(0, 2000, 10)
        points = [(step, int(leak * step) + 4096 * jitter) for step, jitter in zip(steps, noise, strict=True)]
        rate, error = soak.slope(points)
        assert abs(rate - leak) <= 3 * error
        assert error < 5
