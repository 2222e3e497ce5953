"""TRP's own table on the digits: accuracy and speed-up right after the decomposition, nothing fine-tuned."""

from __future__ import annotations

from typing import Any

from fastrank import compress, make_plan
from studies.lab import Lab

ENERGY = 0.98
SEEDS = (0, 1, 2)


def run(lab: Lab) -> dict[str, Any]:
    """Plain SVD, TRP and TRP+Nu, channel and spatial, at the training's own energy."""
    rows = []
    for scheme in ("channel", "spatial"):
        for name in ("plain", f"TRP {scheme}", f"TRP+Nu {scheme}"):
            cells = [
                lab.cell(f"trp {name} {scheme} {seed}", lambda n=name, s=scheme, seed=seed: _cell(lab, n, s, seed))
                for seed in SEEDS
            ]
            mean = {key: sum(cell[key] for cell in cells) / len(cells) for key in cells[0]}
            rows.append({"training": name, "scheme": scheme, **mean})
    return {"energy": ENERGY, "rows": rows}


def _cell(lab: Lab, training: str, scheme: str, seed: int) -> dict[str, Any]:
    dense = lab.dense(training, seed)
    small = compress(dense, make_plan(dense, f"trp-{scheme}", example_input=lab.example, energy=ENERGY))
    speed_up = lab.cost(dense)["macs"] / lab.cost(small)["macs"]
    return {"trained": lab.top1(dense), "converted": lab.top1(small), "speed_up": speed_up, **lab.cost(small)}
