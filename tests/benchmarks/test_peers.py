"""What the peers need, and what they must not leave behind."""

from __future__ import annotations

import pytest

from fastrank import benchmarks
from fastrank.benchmarks._peers import tensorly_kept

tensorly = pytest.importorskip("tensorly", reason="tensorly is not installed")


def test_tensorly_is_as_it_was_after_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """tensorly-torch, once imported, has set it to torch for everybody else in the process."""
    for before in ("numpy", "pytorch"):
        with tensorly_kept():
            tensorly.set_backend(before)
            monkeypatch.setattr(
                "fastrank.benchmarks._run.family", lambda *_, **__: tensorly.set_backend("pytorch") or {}
            )
            with pytest.raises(TypeError, match="NoneType"):
                benchmarks.run(["gates"])
            assert tensorly.get_backend() == before
