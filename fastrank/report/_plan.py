"""A plan as a picture: what every layer costs before and after, and what it loses."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from fastrank import _checks
from fastrank.report._plots import COLOURS, figure_of, tidy, write

KINDS = (("latency_us", "time, µs"), ("macs", "multiply-adds"), ("params", "weights"))
FORMS = ("tucker2", "svd-channel", "svd-spatial", "svd-decoupled", "cp", "cp-layer")


def plot_plan(path: str | os.PathLike[str], layers: Mapping[str, Any], *, title: str) -> None:
    """Bars of every layer's cost, dense behind planned, coloured by form, and its error below; written as PNG.

    layers: name -> `LayerPlan`. The cost is time where it was measured, else multiply-adds, else weights. Raises
    ValueError for a plan without estimates, which was not made under a budget of all layers together.
    """
    known = {name: layer.estimate for name, layer in layers.items() if layer.estimate}
    kind, heading = next(
        ((kind, heading) for kind, heading in KINDS if known and all(kind in e for e in known.values())), ("", "")
    )
    if not kind:
        raise _checks.fail("plan", "one with estimates, made under a global budget", "one without")
    names = list(known)
    width = min(max(0.34 * len(names) + 2.2, 6.4), 24)
    figure, axes = figure_of(2, 1, width=width, height=6.2)
    top, bottom = axes[0][0], axes[1][0]
    colours = dict(zip(FORMS, COLOURS, strict=True))
    places = range(len(names))
    top.bar(places, [known[name][f"dense_{kind}"] for name in names], 0.8, color="#D9D9D9", label="dense")
    for form in FORMS:
        mine = [place for place in places if layers[names[place]].method == form]
        if mine:
            top.bar(mine, [known[names[p]][kind] for p in mine], 0.8, color=colours[form], label=form)
            bottom.bar(mine, [known[names[p]].get("error", 0.0) for p in mine], 0.8, color=colours[form])
    kept = [place for place in places if layers[names[place]].method == "dense"]
    if kept:
        top.bar(kept, [known[names[p]][kind] for p in kept], 0.8, color="#8C8C8C", label="kept dense")
    top.set_ylabel(heading)
    top.set_xticks([])
    bottom.set_ylabel("error")
    bottom.set_xticks(list(places), names, rotation=90, fontsize=7)
    for ax in (top, bottom):
        ax.set_xlim(-0.7, len(names) - 0.3)
        tidy(ax)
    handles, labels = top.get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, loc="outside lower center", ncols=min(len(labels), 4))
    write(figure, path, title)
