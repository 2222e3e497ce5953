"""Suite-wide setting up: the Triton interpreter where there is no GPU, few threads, poisoned memory, the gpu marker."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined, so before anything imports triton

# No table that the user has tuned: what is chosen must not depend on the machine. (The folder is never made.)
os.environ["FASTRANK_CACHE"] = os.path.join(tempfile.gettempdir(), "fastrank-tests-have-no-cache")

# Workers of pytest-xdist share the cores.
torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))))

_slow_ok = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]}
# The same examples every time: a commit passes or fails whatever the day. "nightly" looks for new ones.
settings.register_profile("ci", max_examples=200, derandomize=True, print_blob=True, **_slow_ok)
settings.register_profile("nightly", max_examples=5000, print_blob=True, **_slow_ok)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def pytest_configure(config: pytest.Config) -> None:
    # Triton's interpreter turns one-element arrays into ints, which numpy is about to forbid.
    config.addinivalue_line("filterwarnings", "ignore:Conversion of an array with ndim > 0:DeprecationWarning:triton")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked gpu are skipped, with the reason, where no GPU is visible."""
    if HAS_GPU:
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU is visible"))


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For what is timed: threads of torch that wait for each other on a busy machine take any time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def poison() -> Iterator[None]:
    """Memory from torch.empty and its kin is filled with NaN, so that an output left unwritten shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


@pytest.fixture
def auto_takes() -> Iterator[Callable[[str | Callable[[Any], str]], None]]:
    """auto_takes(backend), or (function of facts -> backend): what `auto` of the factored convolutions takes now."""
    from fastrank import _backends, _tables  # not before the environment is set up

    before = _backends.fastest

    def take(backend: str | Callable[[Any], str]) -> None:
        def fastest(facts: Any) -> _backends.Choice:
            name = backend if isinstance(backend, str) else backend(facts)
            return _backends.Choice(name, _tables.Estimate({name: 1.0}, "made up"))

        _backends.fastest = fastest
        _tables.forget()  # and what was answered before

    yield take
    _backends.fastest = before
    _tables.forget()
