"""What the plan of the fused Tucker-2 convolution predicts for an H200, layer by layer, beside the floor.

    python bench/tucker2_model.py

No GPU is needed: a model, not a measurement. Clocks are taken at 1.755 GHz.
"""

from __future__ import annotations

from fastrank import _backends, _native
from fastrank.benchmarks.layers import PEAKS, RESNET18, floor_us

CARD = (True, 132, 227 * 1024)
CLOCKS_A_US = 1755.0


def table() -> str:
    """A row a layer and batch: the floor, the plan, what the plan's model predicts."""
    lines = [
        "| layer | ranks | N | floor, µs | tile | blocks a tile | weights | shared memory | predicted, µs |",
        "|---|---|---:|---:|---|---:|---|---:|---:|",
    ]
    for layer in RESNET18:
        for batch in (1, 32, 128):
            sizes = _backends.tucker2_sizes(layer.work(batch, True, "inference"))
            split, _ = _backends.tucker2_choice(sizes, CARD)
            plan = _native.host().tucker2_plan(sizes, split, *CARD)
            images = f"{plan['images']} × " if plan["images"] > 1 else ""
            cells = (
                layer.name,
                f"{layer.ranks[0]}/{layer.ranks[1]}",
                f"{batch}",
                f"{floor_us(layer, batch, 2, False, PEAKS['H200']):.1f}",
                f"{images}{plan['tile'][0]}×{plan['tile'][1]}",
                f"{split}",
                "resident" if plan["resident"] else f"{plan['slots']} slots, {plan['ring']} at a time",
                f"{plan['shared_bytes'] // 1024} KB",
                f"{plan['clocks'] / CLOCKS_A_US:.1f}",
            )
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
