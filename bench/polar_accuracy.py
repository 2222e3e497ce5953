"""The accuracy of the polar factor's schedules, by the twin that rounds as the kernel does, on a CPU.

python bench/polar_accuracy.py            # computes anew: bench/results/polar-accuracy.json, docs/kernels/polar.md
python bench/polar_accuracy.py --table    # writes the page's table from the committed result
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastrank.reference import polar

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "bench" / "results" / "polar-accuracy.json"
PAGE = ROOT / "docs" / "kernels" / "polar.md"
SIZES = ((256, 2304), (512, 4608))
SPECTRA = {
    "Gaussian matrix": None,
    "i^-0.7": lambda i: i**-0.7,
    "1 to 1e-3, exponential": lambda i: 10 ** (-3 * (i - 1) / (len(i) - 1)),
    "an eighth i^-0.5, a tail of 1/6000": lambda i: torch.where(i <= len(i) / 8, i**-0.5, 1 / 6000),
    "an eighth 1, then 0": lambda i: torch.where(i <= len(i) / 8, 1.0, 0.0).double(),
}
MUON = (3.4445, -4.7750, 2.0315)


def matrix(spectrum: str, n: int, m: int) -> tuple[Tensor, Tensor, Tensor]:
    """A matrix in float32, its singular values, and U Vᵀ over those that are not 0, in float64."""
    random = torch.Generator().manual_seed(0)
    made = torch.randn(n, m, generator=random, dtype=torch.float64)
    rule = SPECTRA[spectrum]
    if rule is not None:
        u = torch.linalg.qr(torch.randn(n, n, generator=random, dtype=torch.float64))[0]
        sigma = rule(torch.arange(1, n + 1, dtype=torch.float64))
        made = (u * sigma) @ torch.linalg.qr(made.T)[0].T
    w = made.float()
    squares, u = torch.linalg.eigh(w.double() @ w.double().T)
    kept = squares > 1e-12 * squares[-1]
    sigma = squares.clamp(min=0).sqrt()
    return w, sigma, (u[:, kept] / sigma[kept]) @ (u[:, kept].T @ w.double())


def muon(w: Tensor, steps: int = 5) -> Tensor:
    """The Newton–Schulz iteration of the Muon optimiser in float32."""
    x = w / w.norm()
    for _ in range(steps):
        gram = x @ x.T
        x = MUON[0] * x + (MUON[1] * gram + MUON[2] * gram @ gram) @ x
    return x


def quality(w: Tensor, sigma: Tensor, truth: Tensor, x: Tensor) -> dict[str, float]:
    """Relative Frobenius error, dual gap 1 - ⟨X, W⟩/‖W‖₊, and how far the largest singular value is from 1."""
    x = x.double()
    over = float(torch.linalg.eigvalsh(x @ x.T)[-1].sqrt()) - 1
    return {
        "error": float((x - truth).norm() / truth.norm()),
        "gap": float(1 - (x * w.double()).sum() / sigma.sum()),
        "over": over,
    }


def measure(n: int, m: int, spectrum: str) -> dict[str, Any]:
    """All methods on one matrix."""
    w, sigma, truth = matrix(spectrum, n, m)
    found = {f"{plan.tolerance:g}": polar.polar_factor(w, plan) for plan in polar.SCHEDULES}
    methods = {"muon": muon(w), **found}
    rows = {name: quality(w, sigma, truth, x) for name, x in methods.items()}
    return {"n": n, "m": m, "spectrum": spectrum, "methods": rows}


def table(result: list[dict[str, Any]]) -> str:
    """Markdown: Frobenius error / dual gap of every method; the longest factor of the schedules below."""
    names = list(result[0]["methods"])
    heads = ["matrix", "singular values", *("Muon's 5 steps" if n == "muon" else f"tolerance {n}" for n in names)]
    lines = [heads, ["---", "---", *["---:"] * len(names)]]
    for row in result:
        cells = [f"{row['methods'][n]['error']:.0e} / {row['methods'][n]['gap']:.0e}" for n in names]
        lines.append([f"{row['n']}×{row['m']}", row["spectrum"], *cells])
    longest = max(row["methods"][n]["over"] for row in result for n in names if n != "muon")
    text = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    return f"{text}\n\nNo factor of a schedule has a singular value above 1 + {longest:.0e}."


def filled(page: str, result: list[dict[str, Any]]) -> str:
    """The page with the table between its markers written anew."""
    pattern = r"(<!-- accuracy: [^>]*-->\n).*?(<!-- /accuracy -->)"
    return re.sub(pattern, lambda match: f"{match[1]}{table(result)}\n{match[2]}", page, flags=re.DOTALL)


def main() -> None:
    if "--table" not in sys.argv[1:]:
        result = [measure(n, m, spectrum) for n, m in SIZES for spectrum in SPECTRA]
        RESULT.write_text(json.dumps({"torch": torch.__version__, "rows": result}, indent=1) + "\n", encoding="utf-8")
    rows = json.loads(RESULT.read_text(encoding="utf-8"))["rows"]
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8"), rows), encoding="utf-8")


if __name__ == "__main__":
    main()
