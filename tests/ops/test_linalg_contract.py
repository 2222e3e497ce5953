"""What the spectral operators promise beside their values: gradients, compilation, precision, errors."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import generator, l2_relative, randn

from fastrank import ops, reference
from fastrank.ops.linalg import Ranks

pytestmark = pytest.mark.usefixtures("poison")


def test_nuclear_norm_has_the_subgradient_as_its_gradient():
    matrices = [
        randn(3, 5, dtype=torch.float64).requires_grad_(),
        randn(4, 2, seed=1, dtype=torch.float64).requires_grad_(),
    ]
    assert torch.autograd.gradcheck(lambda *m: ops.nuclear_norm(m), matrices)
    mixed = [randn(3, 5).requires_grad_(), randn(4, 4), randn(2, 3, seed=2).half().requires_grad_()]
    (2 * ops.nuclear_norm(mixed)).backward()
    for w, g in zip(mixed, ops.nuclear_subgradient(mixed), strict=True):
        if w.requires_grad:
            assert w.grad.dtype == w.dtype
            torch.testing.assert_close(w.grad, 2 * g)
    assert mixed[1].grad is None


def test_nuclear_norm_refuses_a_second_derivative():
    w = randn(3, 3).requires_grad_()
    with pytest.raises(RuntimeError, match="nuclear_norm is differentiable once: call backward without create_graph"):
        torch.autograd.grad(ops.nuclear_norm([w]), w, create_graph=True)


@pytest.mark.parametrize("needs", [True, False])
def test_opcheck(needs):
    matrices = [randn(3, 5).requires_grad_(needs), randn(5, 4, seed=1).T.detach().requires_grad_(needs), randn(1, 1)]
    torch.library.opcheck(torch.ops.fastrank.nuclear_norm.default, (matrices, "auto", "raise"))
    if not needs:
        torch.library.opcheck(torch.ops.fastrank.nuclear_norm.default, ([], "auto", "raise"))
        torch.library.opcheck(torch.ops.fastrank.nuclear_subgradient.default, (matrices, 0.5, "auto", "raise"))


def test_autocast_does_not_lower_the_precision():
    """TRP's rule for mixed precision: the SVD and what is rebuilt from it stay in float32."""
    a = randn(20, 30)
    outside = [ops.project_energy([a], 0.9)[0][0], ops.nuclear_subgradient([a])[0], ops.nuclear_norm([a])]
    with torch.autocast("cpu", torch.bfloat16):
        inside = [ops.project_energy([a], 0.9)[0][0], ops.nuclear_subgradient([a])[0], ops.nuclear_norm([a])]
    for found, wanted in zip(inside, outside, strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("told", ["highest", "high", "medium"])
@pytest.mark.parametrize("backend", ["reference", "gram"])
def test_products_are_float32s_whatever_torch_was_told(backend, told):
    """TF32 on a GPU and bfloat16 tiles on a CPU leave 2e-3; the settings are as before afterwards."""
    matrices = [randn(120, 500), randn(300, 40, seed=1)]
    state = ops.SpectralState()
    kinds = (
        lambda: ops.nuclear_subgradient(matrices, backend=backend),
        lambda: ops.nuclear_subgradient(matrices, energy=0.9, state=state),
        lambda: ops.project_energy(matrices, 0.9, backend=backend)[0],
        lambda: [u for u, _, _ in ops.svd(matrices, backend=backend)],
        lambda: [ops.nuclear_norm(matrices, backend=backend)],
    )
    wanted = [kind() for kind in kinds]
    torch.set_float32_matmul_precision(told)
    settings = torch.backends.mkldnn.matmul.fp32_precision, torch.backends.cuda.matmul.fp32_precision
    try:
        found = [kind() for kind in kinds]
        assert settings == (torch.backends.mkldnn.matmul.fp32_precision, torch.backends.cuda.matmul.fp32_precision)
        assert torch.get_float32_matmul_precision() == told
    finally:
        torch.set_float32_matmul_precision("highest")
    for some, others in zip(found, wanted, strict=True):
        for x, y in zip(some, others, strict=True):
            assert l2_relative(x, y) <= 1e-5


def test_inputs_are_left_alone_and_outputs_are_fresh():
    a = randn(4, 4)
    before = a.clone()
    for made in (ops.project_energy([a], 1.0)[0][0], ops.nuclear_subgradient([a])[0], ops.svd([a])[0][0]):
        made.zero_()
    assert torch.equal(a, before)


GOOD = torch.eye(3)
NAN, INF = GOOD * math.nan, GOOD / 0


@pytest.mark.parametrize(
    "call", [ops.svd, ops.nuclear_norm, ops.nuclear_subgradient, lambda m, **o: ops.project_energy(m, 0.5, **o)]
)
@pytest.mark.parametrize(
    ("matrices", "options", "error", "message"),
    [
        ([GOOD, NAN], {}, ValueError, r"matrices\[1\] must be finite, got 9 NaN or infinite values out of 9"),
        ([GOOD, GOOD, INF], {}, ValueError, r"matrices\[2\] must be finite"),
        ([GOOD[0]], {}, ValueError, r"matrices\[0\] must be of shape \(any, any\) = \(m, n\), got \(3,\)"),
        ([GOOD.long()], {}, TypeError, r"matrices\[0\] must be a floating-point tensor"),
        ([GOOD, [1.0]], {}, TypeError, r"matrices\[1\] must be a torch.Tensor, got list"),
        (GOOD, {}, TypeError, r"matrices must be a list of 2-D tensors, got Tensor"),
        ({"a": GOOD}, {}, TypeError, r"matrices must be a list of 2-D tensors, got dict"),
        (
            [GOOD],
            {"backend": "sequence"},
            ValueError,
            r"backend='sequence' cannot run \w+ here: \w+ has no sequence backend",
        ),
        ([], {"backend": "nonsense"}, ValueError, r"backend must be one of"),
    ],
)
def test_bad_input_is_refused_with_the_index(call, matrices, options, error, message):
    with pytest.raises(error, match=f"^{message}"):
        call(matrices, **options)


@pytest.mark.parametrize(
    ("energy", "error"),
    [
        (0.0, ValueError),
        (-0.1, ValueError),
        (1.1, ValueError),
        (math.nan, ValueError),
        (True, TypeError),
        ("1", TypeError),
    ],
)
def test_bad_energies_are_refused(energy, error):
    for call in (lambda: ops.project_energy([GOOD], energy), lambda: ops.nuclear_subgradient([GOOD], energy=energy)):
        with pytest.raises(error, match=r"^energy must be a"):
            call()


@pytest.mark.parametrize("call", [ops.nuclear_subgradient, lambda m, **o: ops.project_energy(m, 0.5, **o)])
def test_what_is_no_state_and_no_policy_is_refused(call):
    with pytest.raises(TypeError, match=r"^state must be a SpectralState or None, got dict"):
        call([GOOD], state={})
    with pytest.raises(ValueError, match=r"^on_nonfinite must be one of"):
        call([GOOD], on_nonfinite="ignore")


def test_polar_takes_neither_energy_nor_state_and_exact_no_tolerance():
    for options in ({"energy": 0.5}, {"state": ops.SpectralState()}):
        with pytest.raises(ValueError, match=r'^method must be "exact" where energy or state is given, got polar'):
            ops.nuclear_subgradient([GOOD], method="polar", **options)
    with pytest.raises(ValueError, match=r'^tolerance must be None unless method is "polar"'):
        ops.nuclear_subgradient([GOOD], tolerance=1e-3)


@pytest.mark.parametrize("method", ["exact", "polar"])
def test_the_polar_method_is_a_subgradient_of_a_well_conditioned_matrix(method):
    w = randn(12, 40)
    (g,) = ops.nuclear_subgradient([w], method=method)
    assert float((g * w).sum()) == pytest.approx(float(ops.nuclear_norm([w])), rel=1e-4)


@pytest.mark.parametrize("backend", ["reference", "gram", "host"])
def test_results_are_written_where_they_are_wanted(backend):
    matrices = [randn(5, 7), randn(9, 4, seed=1), randn(120, 130, seed=2), randn(130, 120, seed=3), torch.zeros(0, 3)]
    matrices += [randn(100, 20, seed=4).bfloat16()]
    wanted = ops.nuclear_subgradient(matrices, backend=backend)
    views = [torch.full((*w.shape, 2), math.nan, dtype=w.dtype)[..., 0] for w in matrices]
    for out in ([torch.full_like(w, math.nan) for w in matrices], views):
        for state in (None, ops.SpectralState()):
            for _ in range(2):
                found = ops.nuclear_subgradient(matrices, backend=backend, out=out, state=state)
                for target, x, y in zip(out, found, wanted, strict=True):
                    assert x is target
                    assert l2_relative(x, y) <= (1e-2 if x.dtype == torch.bfloat16 else 1e-4)


@pytest.mark.parametrize(
    ("out", "error", "message"),
    [
        (torch.zeros(3, 3), TypeError, r"^out must be a list of tensors, got Tensor"),
        ([], ValueError, r"^out must be a list of 1 tensors, got 0"),
        ([torch.zeros(3, 2)], ValueError, r"^out\[0\] must be of shape \(3, 3\)"),
        ([torch.zeros(3, 3).double()], TypeError, r"^out\[0\] must"),
        ([torch.zeros(3, 3, requires_grad=True)], ValueError, r"^out\[0\] must be a tensor that does not require"),
    ],
)
def test_places_that_do_not_fit_are_refused(out, error, message):
    with pytest.raises(error, match=message):
        ops.nuclear_subgradient([GOOD], out=out)
    with pytest.raises(ValueError, match=r"^out\[0\] must be memory of its own, got memory of a matrix or of another"):
        ops.nuclear_subgradient([GOOD], out=[GOOD.T])
    same = torch.zeros(3, 3)
    with pytest.raises(ValueError, match=r"^out\[1\] must be memory of its own"):
        ops.nuclear_subgradient([GOOD, GOOD], out=[same, same])
    with pytest.raises(ValueError, match=r'^out must be None where method is "polar"'):
        ops.nuclear_subgradient([GOOD], out=[GOOD.clone()], method="polar")


@pytest.mark.parametrize("backend", ["reference", "gram", "host"])
def test_what_is_not_finite_can_be_skipped_counted_and_warned_of(backend):
    a, b = randn(5, 7), randn(6, 4, seed=1)
    matrices = [a, NAN, b, INF, torch.full((70, 80), 3e38)]
    before = ops.spectral_counts()["nonfinite_skipped"]
    options = {"on_nonfinite": "skip", "backend": backend}
    message = r"^2 matrices with NaN or infinite values were skipped, the first of them matrices\[1\]"
    with pytest.warns(RuntimeWarning, match=message):
        g = ops.nuclear_subgradient(matrices, **options)
    with pytest.warns(RuntimeWarning, match=message):
        projected, ranks = ops.project_energy(matrices, 0.9, **options)
    with pytest.warns(RuntimeWarning, match=message):
        norm = ops.nuclear_norm([*matrices[:4], b], **options)
    assert ops.spectral_counts()["nonfinite_skipped"] == before + 6
    for i in (1, 3):
        assert not g[i].any()
        torch.testing.assert_close(projected[i], matrices[i], equal_nan=True)
        assert projected[i].data_ptr() != matrices[i].data_ptr()
        assert ranks[i] == 0
    finite = [a, b, matrices[4]]
    for found, wanted in zip([g[0], g[2], g[4]], ops.nuclear_subgradient(finite, backend=backend), strict=True):
        assert l2_relative(found, wanted) <= 1e-5
    assert [ranks[i] for i in (0, 2, 4)] == list(ops.project_energy(finite, 0.9, backend=backend)[1])
    exact = float(ops.nuclear_norm([a, b, b], backend="reference"))
    assert float(norm) == pytest.approx(exact, rel=1e-5)


def test_a_gradient_skips_what_the_norm_skipped():
    a, bad = randn(3, 4).requires_grad_(), NAN.clone().requires_grad_()
    with pytest.warns(RuntimeWarning, match="were skipped"):
        ops.nuclear_norm([a, bad], on_nonfinite="skip").backward()
    assert not bad.grad.any()
    assert l2_relative(a.grad, ops.nuclear_subgradient([a])[0]) <= 1e-5


def test_an_eigensolver_that_gives_up_is_replaced_and_counted(monkeypatch):
    matrices = [randn(5, 9), randn(70, 200)]
    wanted = ops.nuclear_subgradient(matrices, backend="reference")

    def gives_up(_):
        raise torch.linalg.LinAlgError("linalg.eigh: The algorithm failed to converge")

    monkeypatch.setattr(torch.linalg, "eigh", gives_up)
    before = ops.spectral_counts()["not_converged"]
    for found, exact in zip(ops.nuclear_subgradient(matrices, backend="gram"), wanted, strict=True):
        assert l2_relative(found, exact) <= 1e-4
    assert ops.spectral_counts()["not_converged"] == before + 2


def test_ranks_on_a_device_are_read_once_and_only_when_asked_for():
    class Counted:
        """Stands for an int64 tensor on a GPU."""

        reads = 0

        def __len__(self) -> int:
            return 3

        def tolist(self) -> list[int]:
            self.reads += 1
            return [4, 1, 2]

    held = Counted()
    ranks = Ranks(held)
    assert len(ranks) == 3
    assert held.reads == 0
    assert (ranks[0], ranks[1:], list(ranks), max(ranks)) == (4, [1, 2], [4, 1, 2], 4)
    assert ranks == [4, 1, 2]
    assert ranks != [4, 1]
    assert repr(ranks) == "[4, 1, 2]"
    assert held.reads == 1


def test_random_numbers_are_not_drawn():
    before = torch.get_rng_state()
    ops.project_energy([torch.randn(3, 4, generator=generator(1))], 0.5)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_matrix_on_which_lapack_gives_up_is_decomposed_in_another_rounding(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LAPACK fails on some projected kernels, which ones depending on its build and threads: here it always does."""
    matrix = randn(12, 30, dtype=torch.float64).to(dtype)
    first = reference.linalg.working(matrix)
    svd, svdvals, refused = torch.linalg.svd, torch.linalg.svdvals, []

    def fails_once(function):
        def call(a, *args, **kwargs):
            if a.dtype == first.dtype and a.shape == first.shape:
                refused.append(a)
                raise torch.linalg.LinAlgError("linalg.svd: The algorithm failed to converge")
            return function(a, *args, **kwargs)

        return call

    want = svdvals(first.double())
    monkeypatch.setattr(torch.linalg, "svd", fails_once(svd))
    monkeypatch.setattr(torch.linalg, "svdvals", fails_once(svdvals))
    ((u, s, vh),) = ops.svd([matrix], backend="reference")
    norm = ops.nuclear_norm([matrix], backend="reference")
    assert len(refused) == 3
    assert u.dtype == s.dtype == vh.dtype == norm.dtype == first.dtype
    eps = torch.finfo(first.dtype).eps
    assert (s.double() - want).abs().max() <= 10 * eps * want[0]
    assert ((u * s @ vh).double() - first.double()).norm() <= 10 * eps * 12**0.5 * want[0]
    assert abs(float(norm) - float(want.sum())) <= 12 * 10 * eps * float(want[0])
