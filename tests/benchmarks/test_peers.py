"""What the peers need, and what they must not leave behind."""

from __future__ import annotations

import sys

import pytest

from fastrank import benchmarks
from fastrank.benchmarks._peers import tensorly_kept

tensorly = pytest.importorskip("tensorly", reason="tensorly is not installed")


def test_tensorly_is_as_it_was_after_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """tensorly-torch, once imported, has set it to torch for everybody else in the process."""

    def work(*_: object) -> object:
        assert "tltorch" not in sys.modules or tensorly.get_backend() == "pytorch"
        tensorly.set_backend("pytorch")
        raise InterruptedError

    monkeypatch.setattr("fastrank.benchmarks._run.prepare", work)
    for before in ("numpy", "pytorch"):
        with tensorly_kept():
            tensorly.set_backend(before)
            with pytest.raises(InterruptedError):
                benchmarks.run(["gates"])
            assert tensorly.get_backend() == before
