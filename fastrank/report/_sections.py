"""The sections of the HTML report: each gives HTML, or says in one line why it has nothing to show."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from fastrank.report import _svg
from fastrank.report._runs import Row, Run
from fastrank.report._svg import SERIES, STEPS, Axis, Mark, Point, Series
from fastrank.report._text import short
from fastrank.report._trajectory import BINS, HIGH, LOW, Gates, Moment, Trajectory, histogram, is_number, places

LAYERS = 12
"""Of how many layers, at most, the spectra are drawn: those whose ranks fell most."""
ROWS, COLUMNS = 60, 40
"""The most cells of a heat map of ranks, down and across."""
CURVES = 6
"""Moments that a chart of spectra or gates shows, at most."""
_LOWER = ("loss",)
_SKIPPED = ("epoch", "seconds", "lr", "learning_rate", "grad_norm")


def figure(title: str, chart: str, keys: Sequence[tuple[str, str, bool]] = (), note: str = "") -> str:
    """A chart with its heading, and a legend of (class, name, dashed)."""
    small = f"<small>{escape(note)}</small>" if note else ""
    shown = "".join(
        f'<span><i class="{kind}{" dashed" if dashed else ""}"></i>{escape(name)}</span>' for kind, name, dashed in keys
    )
    legend = f'<div class="keys">{shown}</div>' if shown else ""
    return f"<figure><figcaption>{escape(title)}{small}</figcaption>{chart}{legend}</figure>"


def charts(parts: Iterable[str]) -> str:
    """Figures side by side, as many as fit."""
    return f'<div class="charts">{"".join(parts)}</div>'


def missing(why: str) -> str:
    """The one line in place of what cannot be shown."""
    return f'<p class="why">{escape(why)}</p>'


def histories(run: Run) -> dict[str, list[Row]]:
    """The epochs of each training: those of its checkpoint, else those that its trajectory recorded."""
    found: dict[str, list[Row]] = {
        name: [{"epoch": moment.epoch, **moment.row} for moment in trajectory.moments if moment.row]
        for name, trajectory in run.trajectories.items()
    }
    found.update({name: list(rows) for name, rows in run.history.items() if rows or name not in found})
    return {name: rows for name, rows in found.items() if rows}


def curves(run: Run) -> str:
    """Loss, accuracy and whatever else was measured, over the epochs of each training."""
    trainings = histories(run)
    if not trainings:
        return missing("No training in this folder has finished an epoch, or none kept its history.")
    kinds = {name: (f"s{i % SERIES}", i >= SERIES) for i, name in enumerate(trainings)}
    names = list(dict.fromkeys(key for rows in trainings.values() for row in rows for key in row))
    measured = [
        key
        for key in names
        if key not in _SKIPPED and any(is_number(row.get(key)) for rows in trainings.values() for row in rows)
    ]
    parts = []
    for key in measured:
        series = []
        for training, rows in trainings.items():
            points = [
                (float(row.get("epoch", i + 1)), row[key]) for i, row in enumerate(rows) if is_number(row.get(key))
            ]
            if key == "penalty" and not any(value for _, value in points):
                continue
            series.append(Series(training, points, kinds[training][0], dashed=kinds[training][1]))
        series = [each for each in series if each.points]
        if series:
            parts.append(_curve(key, series))
    return charts(parts)


def _curve(key: str, series: Sequence[Series]) -> str:
    values = [value for each in series for _, value in each.points]
    epochs = [epoch for each in series for epoch, _ in each.points]
    percent = key.startswith(("top", "train_top", "test_top"))
    title = key.replace("_", " ").replace("top1", "accuracy").replace("top5", "top-5 accuracy")
    x = _svg.fitted(epochs, "epoch", whole=True)
    small = [value for value in values if value > 0]
    if any(word in key for word in _LOWER) and len(small) == len(values) and max(values) / min(values) > 30:
        y = _svg.spread(values, f"{title} (log)")
    else:
        y = _svg.fitted(values, f"{title}, %" if percent else title, zero=not percent and min(values) >= 0)
    keys = [(each.kind, each.name, each.dashed) for each in series]
    return figure(title.capitalize(), _svg.lines(title, series, x, y), keys)


def pareto(rows: Sequence[Mapping[str, Any]], score: str) -> str:
    """Accuracy against each cost that is known of at least two networks; rows as `networks` gives them."""
    parts, absent = [], []
    groups = list(dict.fromkeys(row["group"] for row in rows))
    for key, label, title in (
        ("latency_us", "median time, µs", "time"),
        ("macs", "multiply-adds", "multiply-adds"),
        ("params", "parameters", "parameters"),
    ):
        known = [row for row in rows if is_number(row.get(key)) and is_number(row.get("score"))]
        if len(known) < 2:
            absent.append(title)
            continue
        x, y = _svg.spread([row[key] for row in known], label), _svg.fitted([row["score"] for row in known], score)
        marks = [
            Mark(
                row["label"],
                f"{row['name']}: {row['score']:.4g}, {short(row[key])} {title}",
                row[key],
                row["score"],
                f"s{groups.index(row['group']) % SERIES}",
            )
            for row in known
        ]
        front = _front([(mark.x, mark.y) for mark in marks])
        keys = [(f"s{i % SERIES}", name, False) for i, name in enumerate(groups)] if len(groups) > 1 else []
        chart = _svg.scatter(f"Accuracy against {title}", marks, x, y, front)
        parts.append(figure(f"Accuracy against {title}", chart, keys, "dashed: no network here is better in both"))
    told = f"Not known of two networks, so not drawn: {', '.join(absent)}." if absent else ""
    return (charts(parts) if parts else "") + (missing(told) if told else "")


def _front(points: Sequence[Point]) -> list[Point]:
    """The points that no other one beats in both cost and accuracy, by cost."""
    found: list[Point] = []
    for cost, score in sorted(points, key=lambda point: (point[0], -point[1])):
        if not found or score > found[-1][1]:
            found.append((cost, score))
    return found


def _chosen(moments: Sequence[Moment]) -> list[Moment]:
    """At most CURVES of the moments, closer at the start, where most happens, with the first and the last."""
    last = len(moments) - 1
    if last < CURVES:
        return list(moments)
    return [moments[i] for i in sorted({round(last * (k / (CURVES - 1)) ** 2) for k in range(CURVES)})]


def _steps(count: int) -> list[str]:
    """A class for each of `count` moments, from faint to strong."""
    return [f"e{round(i * (STEPS - 1) / max(count - 1, 1)) if count > 1 else STEPS - 1}" for i in range(count)]


def ramp(moments: Sequence[Moment]) -> str:
    """Which colour stands for which epoch."""
    swatches = "".join(f'<i class="{kind}"></i>' for kind in _steps(len(moments)))
    shown = ", ".join(str(moment.epoch) for moment in moments)
    return f'<div class="ramp"><span>{swatches}</span> after epoch {escape(shown)}</div>'


def spectra(trajectories: Mapping[str, Trajectory]) -> str:
    """The singular values of each layer over time, a group of charts a training."""
    parts = []
    for name, trajectory in trajectories.items():
        moments = [moment for moment in trajectory.moments if moment.spectra]
        if not moments:
            continue
        shown = _chosen(moments)
        first, last = moments[0].spectra, moments[-1].spectra
        pairs = [(layer, kind) for layer, group in last.items() for kind in group if kind in first.get(layer, {})]
        pairs = [(layer, kind) for layer, kind in pairs if last[layer][kind].full > 1]
        fell = {
            layer: max(
                1 - last[layer][kind].rank / max(first[layer][kind].rank, 1) for at, kind in pairs if at == layer
            )
            for layer, _ in pairs
        }
        best = sorted(fell, key=lambda layer: -fell[layer])[:LAYERS]
        few = f", the {LAYERS} of {len(fell)} layers whose ranks fell most" if len(fell) > LAYERS else ""
        figures = [_spectrum(layer, kind, shown, trajectory.energy) for layer, kind in pairs if layer in best]
        parts.append(f"<h3>{escape(name)}{escape(few)}</h3>{ramp(shown)}{charts(figures)}")
    if not parts:
        return missing(
            "No trajectory of kernels was recorded (fastrank.report.Recorder, or fastrank train, writes one)."
        )
    return "".join(parts)


def _spectrum(layer: str, kind: str, shown: Sequence[Moment], energy: float) -> str:
    series, ranks = [], []
    for moment, step in zip(shown, _steps(len(shown)), strict=True):
        found = moment.spectra.get(layer, {}).get(kind)
        if found is None:
            continue
        ranks.append(found.rank)
        indices = places(found.full, len(found.sigma))
        points = [(i + 1.0, value) for i, value in zip(indices, found.sigma, strict=True)]
        series.append(Series(f"after epoch {moment.epoch}: rank {found.rank} of {found.full}", points, step))
        full = found.full
    x, y = Axis(1, full, "index i", whole=True), Axis(0, 1, "σᵢ / σ₁")
    note = f"rank at {100 * energy:g} % of the energy: {ranks[0]} → {ranks[-1]} of {full}"
    return figure(f"{layer}, {kind}", _svg.lines(f"{layer} {kind}", series, x, y, notes=[ranks[-1]]), (), note)


def ranks(trajectories: Mapping[str, Trajectory]) -> str:
    """Ranks over the epochs, as shares of full rank: lines for a few matrices, heat maps for many."""
    parts = []
    for name, trajectory in trajectories.items():
        series = _rank_series(trajectory.moments)
        gated = any(moment.gates for moment in trajectory.moments)
        what = "gates that are not 0" if gated else f"ranks at {100 * trajectory.energy:g} % of the energy"
        if len(series) > SERIES:
            for kind in dict.fromkeys(kind for _, kind in series):
                rows = {layer: points for (layer, own), points in series.items() if own == kind}
                parts.append(_rank_map(f"{name}, {kind}", rows, what))
        elif series:
            drawn = [
                Series(f"{layer} {kind}", [(epoch, 100 * share) for epoch, share in points], f"s{i}")
                for i, ((layer, kind), points) in enumerate(series.items())
            ]
            epochs = [epoch for each in drawn for epoch, _ in each.points]
            chart = _svg.lines(name, drawn, _svg.fitted(epochs, "epoch", whole=True), Axis(0, 100, "% of full rank"))
            parts.append(figure(name, chart, [(each.kind, each.name, False) for each in drawn], what))
    return charts(parts) if parts else missing("No trajectory of ranks or gates was recorded.")


def _rank_series(moments: Sequence[Moment]) -> dict[tuple[str, str], list[Point]]:
    """(layer, matricization or kind of gate) -> share of full rank by epoch."""
    series: dict[tuple[str, str], list[Point]] = {}
    for moment in moments:
        for layer, group in moment.spectra.items():
            for kind, found in group.items():
                if found.full > 1:
                    series.setdefault((layer, kind), []).append((float(moment.epoch), found.rank / found.full))
        for gate, counted in moment.gates.items():
            if counted.penalized and counted.total > 1:
                layer, _, kind = gate.rpartition(".")
                share = 1 - counted.zero / counted.total
                series.setdefault((layer, kind), []).append((float(moment.epoch), share))
    return series


def _rank_map(name: str, series: Mapping[str, list[Point]], what: str) -> str:
    layers = [list(series)[i] for i in places(len(series), ROWS)]
    epochs = sorted({int(epoch) for layer in layers for epoch, _ in series[layer]})
    columns = [epochs[i] for i in places(len(epochs), COLUMNS)]
    rows = []
    for layer in layers:
        known = dict(series[layer])
        value, values = 0.0, []
        for column in columns:
            value = known.get(float(column), value)
            values.append(value)
        rows.append((layer, values))
    few = f"; {len(layers)} of {len(series)} layers" if len(layers) < len(series) else ""
    scale = [(f"e{i}", f"from {100 * i / STEPS:.0f} %", False) for i in range(STEPS)]
    return figure(name, _svg.heat(name, rows, columns, "epoch"), scale, what + few)


def gates(run: Run) -> str:
    """Histograms of |gate| by kind, over time where that was recorded, else of the last checkpoint."""
    parts = []
    for name, trajectory in run.trajectories.items():
        moments = [moment for moment in trajectory.moments if moment.gates]
        if moments:
            shown = _chosen(moments)
            kinds = dict.fromkeys(gate.rpartition(".")[2] for gate in shown[0].gates)
            figures = [_histogram(kind, [(m.epoch, _total(m, kind)) for m in shown]) for kind in kinds]
            parts.append(f"<h3>{escape(name)}</h3>{ramp(shown)}{charts(figures)}")
    if not parts and run.gates:
        parts.append(charts(_histogram(kind, [(None, histogram(values))]) for kind, values in run.gates.items()))
    return "".join(parts) or missing("This run has no gated layers (Funnel alone trains with gates).")


def _total(moment: Moment, kind: str) -> Gates:
    """The gates of one kind, all layers together."""
    found = [each for gate, each in moment.gates.items() if gate.rpartition(".")[2] == kind]
    counts = tuple(map(sum, zip(*(each.counts for each in found), strict=True))) if found else (0,) * BINS
    return Gates(sum(each.total for each in found), sum(each.zero for each in found), counts)


def _histogram(kind: str, moments: Sequence[tuple[int | None, Gates]]) -> str:
    width, edge = (HIGH - LOW) / BINS, 2  # two bins make one bar
    heights = [[sum(found.counts[i : i + edge]) for i in range(0, BINS, edge)] for _, found in moments]
    used = [i for row in heights for i, count in enumerate(row) if count] or [0, BINS // edge - 1]
    low, high = max(min(used) - 1, 0), min(max(used) + 2, BINS // edge)
    series = []
    for (epoch, found), row, step in zip(moments, heights, _steps(len(moments)), strict=True):
        outline = [(LOW + low * edge * width, 0.0)]
        for i in range(low, high):
            outline += [(LOW + (i + end) * edge * width, float(row[i])) for end in (0, 1)]
        outline.append((outline[-1][0], 0.0))
        when = "" if epoch is None else f"after epoch {epoch}: "
        name = f"{when}{found.zero:,} of {found.total:,} exactly 0"
        series.append(Series(name, outline, step, area=found is moments[-1][1]))
    x = Axis(LOW + low * edge * width, LOW + high * edge * width, "|gate|", text=lambda value: f"{10**value:.2g}")
    y = _svg.fitted([max(map(max, heights)), 1], "gates", zero=True)
    final = moments[-1][1]
    note = f"{final.zero:,} of {final.total:,} exactly 0 at the end"
    return figure(kind, _svg.lines(kind, series, x, y), (), note)
