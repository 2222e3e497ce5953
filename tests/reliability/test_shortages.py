"""Too little memory, caches that a killed process left in pieces, two processes that tune at once."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastrank import _backends, _memory, _native, _tables, ops, tune
from fastrank.budget import _clock
from fastrank.ops import _gram, _linalg_kernels, _resident, polar
from fastrank.ops._entry import Entry
from fastrank.ops._spectra import SUBGRADIENT
from fastrank.tune import _measure

Solve = Callable[[list[Tensor]], list[Tensor]]


class Memory(TorchDispatchMode):
    """An allocator that gives nothing above a limit, as a full GPU does. largest: the bytes that were asked for."""

    def __init__(self, limit: float = math.inf) -> None:
        super().__init__()
        self.limit, self.largest = limit, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        held = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for made in tree_leaves(out):
            if isinstance(made, Tensor) and made.untyped_storage().data_ptr() not in held:
                size = made.untyped_storage().nbytes()
                self.largest = max(self.largest, size)
                if size > self.limit:
                    raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {size} bytes")
        return out


def randn(*size: int, seed: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def by_gram(matrices: list[Tensor]) -> list[Tensor]:
    return _gram.spectral(matrices, SUBGRADIENT, None)[0]


def by_host_kernels(matrices: list[Tensor]) -> list[Tensor]:
    return _linalg_kernels.spectral(matrices, SUBGRADIENT, None, "host")[0]


def by_host_svd(matrices: list[Tensor]) -> list[Tensor]:
    return [part for factors in _linalg_kernels.svd(matrices, "host")[0] for part in factors]


def by_warm_steps(matrices: list[Tensor]) -> list[Tensor]:
    entries = [Entry((12, 20), torch.eye(12)[None]) for _ in matrices]  # any basis will do
    return _resident.step(matrices, entries, SUBGRADIENT, None, 1e-4)[0]


def by_polar(matrices: list[Tensor]) -> list[Tensor]:
    return polar._polar_factors(matrices, 5e-3, "triton")


HOST = pytest.mark.skipif(bool(_native.why_missing("_host")), reason="the host build of the kernels is not there")


@pytest.mark.parametrize(
    ("solve", "count"),
    [
        pytest.param(by_gram, 6, id="gram"),
        pytest.param(by_host_kernels, 6, id="kernels", marks=HOST),
        pytest.param(by_host_svd, 6, id="svd kernels", marks=HOST),
        pytest.param(by_warm_steps, 6, id="warm"),
        pytest.param(by_polar, 2, id="polar"),
    ],
)
def test_what_does_not_fit_at_once_is_solved_in_parts(solve: Solve, count: int, one_thread: None) -> None:
    matrices = [randn(12, 20, seed=seed) for seed in range(count)]
    with Memory() as all_at_once:
        wanted = solve(matrices)
    with Memory() as half:
        solve(matrices[: count // 2])
    # Half of them fit to the byte. Where they are stacked before anything is allocated, that has to fit as well.
    limit = max(half.largest, count * matrices[0].nbytes if solve is by_gram else 0)
    assert limit < all_at_once.largest
    with Memory(limit) as memory:
        found = solve(matrices)
    assert memory.largest == all_at_once.largest, "all at once is tried first"
    for own, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(own, other, rtol=0, atol=1e-5)  # of entries up to 1; a batch may round otherwise


@pytest.mark.parametrize(
    ("solve", "what"),
    [
        pytest.param(by_gram, r"matrices\[0\]", id="gram"),
        pytest.param(by_host_kernels, r"the workspace of [\d,]+ bytes for matrices\[\d\]", id="kernels", marks=HOST),
        pytest.param(by_warm_steps, r"a warm step of matrices\[0\], \(12, 20\),", id="warm"),
        pytest.param(by_polar, r"the workspace for matrices\[0\], \(12, 20\),", id="polar"),
    ],
)
def test_what_does_not_fit_by_itself_is_named(solve: Solve, what: str, one_thread: None) -> None:
    matrices = [randn(12, 20, seed=seed) for seed in range(2)]
    with Memory() as single:
        solve(matrices[:1])
    limit = single.largest - 1
    words = rf"^{what} must fit into the memory of its device by itself, got: CUDA out of memory\. Tried to allocate"
    with Memory(limit), pytest.raises(torch.OutOfMemoryError, match=words):
        solve(matrices[:1] if solve is by_gram else matrices)


def test_nothing_of_a_failed_part_is_held_while_the_next_is_tried() -> None:
    alive: list[Any] = []

    class Workspace:
        def __init__(self) -> None:
            alive.append(self)

        def __del__(self) -> None:
            ended.append(len(tried))

    ended: list[int] = []
    tried: list[int] = []

    def act(items: Any) -> list[int]:
        tried.append(len(items))
        workspace = Workspace()
        alive.clear()
        if len(items) > 1:
            raise torch.OutOfMemoryError("full")
        del workspace
        return list(items)

    assert _memory.in_parts(act, [1, 2, 3], str) == [1, 2, 3]
    assert tried == [3, 1, 2, 1, 1]
    assert ended == [1, 2, 3, 4, 5], "each workspace went before the next try"


def test_candidates_of_a_network_are_timed_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def measure(model: Any, x: Any, places: Any, layers: Any) -> list[list[float]]:
        calls.append(len(places))
        if len(places) > 2:
            raise torch.OutOfMemoryError("full")
        return [[10.0 * int(place.name), *map(float, mine)] for place, mine in zip(places, layers, strict=True)]

    monkeypatch.setattr(_clock, "measure", measure)
    monkeypatch.setattr(_clock.Clock, "_key", lambda self, place, layer: f"{place.name} {layer}")
    clock = _clock.Clock(torch.device("cpu"), torch.float32, remember=False)
    places: Any = [SimpleNamespace(name=str(n)) for n in range(1, 6)]
    model: Any = None
    found = clock.times(model, torch.zeros(1), places, [[n] for n in range(1, 6)])
    assert found == [[10.0 * n, float(n)] for n in range(1, 6)]
    assert calls == [5, 2, 3, 1, 2]


def test_a_kernel_of_a_damaged_cache_says_which_folder_to_delete(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = _native.triton_kernels("polar")

    def launch(act: Callable[[], object]) -> str:
        monkeypatch.setattr(kernels, "polar_factors", lambda *_: act())
        with pytest.raises(RuntimeError) as caught:
            ops.polar_factors([randn(4, 5, seed=0)], backend="triton")
        return str(caught.value)

    for act in (
        lambda: json.loads('{"name": "k'),
        lambda: _fail("Triton Error [CUDA]: device kernel image is invalid"),
    ):
        monkeypatch.setenv("TRITON_CACHE_DIR", "/some/where")
        said = launch(act)
        assert said.startswith("Triton's compile cache is damaged (")
        assert said.endswith("): delete the folder /some/where")
        monkeypatch.delenv("TRITON_CACHE_DIR")
        assert launch(act).endswith(f": delete the folder {Path.home()}/.triton/cache")
    assert launch(lambda: _fail("another one")) == "another one"


def _fail(what: str) -> None:
    raise RuntimeError(what)


def work(number: int) -> _backends.ConvWork:
    return _backends.ConvWork(1, 8, 8, (4, 4), (3, 3), (number, 1), (1, 1), (1, 1), (1, 1), False, "inference")


def key(number: int) -> _tables.Key:
    return _tables.Key("tucker2_conv2d", "float32", 1, work(number))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FASTRANK_CACHE", str(tmp_path / "cache"))
    _tables.forget()
    return tmp_path / "cache"


def test_a_table_cut_anywhere_is_ignored_with_one_warning(cache: Path) -> None:
    path = _tables.save(_tables.Table("x", rows={key(n): {"dense": 1.0} for n in (1, 2, 3)}))
    whole = path.read_bytes()
    for length in range(0, len(whole) - 2, 7):  # the last line's end may be missing
        path.write_bytes(whole[:length])
        _tables.forget()
        with pytest.warns(UserWarning, match=r"^the table .*x\.json is damaged: it is ignored") as caught:
            assert _tables.cached("x") is None
        assert len(caught) == 1
    path.write_bytes(whole)
    _tables.forget()
    assert _tables.cached("x") is not None


def clock_with(**known: float) -> _clock.Clock:
    clock = _clock.Clock(torch.device("cpu"), torch.float32)
    clock.known.update(known)
    clock.measured = len(known)
    return clock


def test_times_cut_anywhere_are_taken_anew_with_one_warning(cache: Path) -> None:
    clock = clock_with(a=1.5, b=2.5)
    clock.save()
    whole = clock.file.read_bytes()
    for content in [whole[:length] for length in range(0, len(whole) - 2, 3)] + [
        b"\xff\xfe",
        b"[]",
        b"null",
        b"[" * 9999,
    ]:
        clock.file.write_bytes(content)
        with pytest.warns(
            UserWarning, match=r"^the measured times in .* cannot be read: they are taken anew"
        ) as caught:
            assert clock_with().known == {}
        assert len(caught) == 1
    with pytest.warns(UserWarning, match="cannot be read"):
        clock_with(c=3.0).save()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert clock_with().known == {"c": 3.0}


def test_what_others_add_meanwhile_stays(cache: Path, tmp_path: Path) -> None:
    device = _tables.device_name("cpu", None)
    mine, theirs = tune.table_of(), tune.table_of()
    mine.rows[key(1)], theirs.rows[key(2)] = {"dense": 1.0}, {"dense": 2.0}
    tune.save(mine)
    tune.save(theirs)
    again, stale = tune.table_of(), tune.table_of()
    assert again.rows == {key(1): {"dense": 1.0}, key(2): {"dense": 2.0}}
    again.rows[key(1)] = {"dense": 3.0}
    stale.rows[key(4)] = {"dense": 4.0}
    stale.validation.append({"dtype": "float32", "channels_last": False, "threads": 1, "p95": 1.0})
    tune.save(again)
    tune.save(stale)
    found = tune.table_of()
    assert found.rows == {key(1): {"dense": 3.0}, key(2): {"dense": 2.0}, key(4): {"dense": 4.0}}, "not the old key 1"
    assert len(found.validation) == 1
    empty = _measure.empty_table()
    tune.save(replace(empty, rows={key(5): {"dense": 5.0}}))
    after = _tables.cached(device)
    assert after is not None
    assert set(after.rows) == {key(5)}, "a table that is no copy of the user's own replaces it"
    other = tmp_path / "other"
    tune.save(after, other / "own.json")
    assert os.listdir(other) == ["own.json"], "no lock besides"


TUNING = """
import sys, time
from pathlib import Path
sys.path[:0] = sys.argv[3].split(":")
import test_shortages as shared
from fastrank import tune
number, ready = int(sys.argv[1]), Path(sys.argv[2])
(ready / str(number)).touch()
while len(list(ready.iterdir())) < 2:
    time.sleep(0.001)
for turn in range(15):
    table = tune.table_of()
    table.rows[shared.key(100 * number + turn + 1)] = {"dense": 1.0}
    clock = shared.clock_with(**{f"{number}-{turn}": 1.0})
    tune.save(table)
    clock.save()
"""


def test_two_processes_that_tune_at_once_lose_nothing(cache: Path, tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    ready.mkdir()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", TUNING]
    processes = [
        subprocess.Popen([*command, str(number), str(ready), ":".join(sys.path)], env=environment) for number in (0, 1)
    ]
    assert [process.wait(300) for process in processes] == [0, 0]
    wanted = {(number, turn) for number in (0, 1) for turn in range(15)}
    assert set(tune.table_of().rows) == {key(100 * number + turn + 1) for number, turn in wanted}
    assert set(clock_with().known) == {f"{number}-{turn}" for number, turn in wanted}
    assert sorted(path.name for path in cache.iterdir() if path.name.endswith(".tmp")) == []


COMPILE = """
import torch
from fastrank.nn import FusedTucker2Conv
torch.set_num_threads(1)
torch.manual_seed(0)
layer = FusedTucker2Conv.from_conv(torch.nn.Conv2d(4, 6, 3), (2, 3))
model = torch.nn.Sequential(layer, torch.nn.ReLU(), torch.nn.Conv2d(6, 2, 1)).eval()
x = torch.randn(2, 4, 8, 8)
with torch.no_grad():
    torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), model(x))
"""


@pytest.mark.slow
def test_a_compilation_killed_midway_spoils_nothing(tmp_path: Path) -> None:
    cache = tmp_path / "inductor"
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1"}
    for files in (2, 5):  # while the first kernel is compiled, and the graph
        process = subprocess.Popen([sys.executable, "-c", COMPILE], env=environment, stderr=subprocess.DEVNULL)
        while process.poll() is None and sum(path.is_file() for path in cache.rglob("*")) < files:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, timeout=500, check=False
    )
    assert done.returncode == 0, done.stderr
