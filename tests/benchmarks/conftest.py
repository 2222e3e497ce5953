"""What benchmarks would leave behind in a process of the suite."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fastrank.benchmarks._peers import tensorly_kept


@pytest.fixture(autouse=True)
def _tensorly_kept() -> Iterator[None]:
    with tensorly_kept():
        yield
