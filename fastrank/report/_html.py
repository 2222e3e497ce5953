"""A run as one HTML page: no script, nothing fetched, light and dark."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from fastrank import _atomic, _checks
from fastrank.report import _sections
from fastrank.report._layers import layer_rows
from fastrank.report._runs import Run, published, read_run
from fastrank.report._style import CSS
from fastrank.report._text import by, ranks_text, short, thousands
from fastrank.report._trajectory import is_number

FILE = "report.html"
MAX_ROWS = 400
NEAR = 0.5
"""Points of accuracy within which a network counts as good as the dense one."""


def write_html(folder: str | os.PathLike[str], path: str | os.PathLike[str] | None = None) -> Path:
    """Write what the run in `folder` left as one self-contained page, ``folder/report.html`` unless `path` says else.

    It shows what was run, the networks that were measured, accuracy against cost, training curves, spectra and ranks
    over time, gates, and every layer of the plan; where something was not recorded, why. Returns the path.
    Raises FileNotFoundError where there is no run, ValueError for damaged files, OSError where it cannot write.
    """
    target = Path(folder) / FILE if path is None else Path(path)
    page = render(read_run(folder), Path(folder))
    if target.exists() and not target.is_file():
        raise _checks.fail("path", "a file", f"{target}, which is none")
    _atomic.write_atomically(target, page.encode())
    return target


def render(run: Run, folder: Path) -> str:
    """The page."""
    rows, score = networks(run.summary, run.stages)
    layers, unknown = layer_rows(folder, run.summary)
    name = folder.resolve().name
    sections = [
        ("Networks", _networks(rows, score)),
        ("Accuracy against cost", _sections.pareto(rows, score) if rows else _nothing("network")),
        ("Training", _sections.curves(run)),
        ("Spectra over time", _sections.spectra(run.trajectories)),
        ("Ranks over time", _sections.ranks(run.trajectories)),
        ("Gates", _sections.gates(run)),
        ("Layers", _layers(layers) + (_sections.missing(unknown) if unknown else "")),
    ]
    body = "".join(f"<section><h2>{title}</h2>{content}</section>" for title, content in sections)
    told = published(run.summary) if isinstance(run.summary.get("experiment") or {}, dict) else ""
    foot = f"<p>{escape(told)}</p>" if told else ""
    head = f"<h1>{escape(name)}</h1>{_head(run, folder)}{_cards(rows)}"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(name)} · fastrank report</title><style>{CSS}</style></head>"
        f'<body><main>{head}{body}{_settings(folder)}<div class="foot">{foot}'
        f"<p>Written by <code>fastrank report</code>.</p></div></main></body></html>\n"
    )


def networks(summary: Mapping[str, Any], stages: Mapping[str, Mapping[str, Any]]) -> tuple[list[dict[str, Any]], str]:
    """A row for every network that the run measured, the dense one first, and what its score is called.

    A row has name, label (short, for charts), group, score, params, macs and, where it was measured, latency_us.
    """
    rows: list[dict[str, Any]] = []
    dense = summary.get("dense")
    if isinstance(summary.get("rows"), list) and isinstance(dense, dict):
        timed = _latency(summary.get("dense_latency"))
        for name, found in dense.items():
            if isinstance(found, dict):
                cost = {**found, "score": found.get("accuracy"), "latency_us": timed}
                rows.append({**cost, "name": f"{name}, dense", "label": "dense", "group": name})
        for found in summary["rows"]:
            if isinstance(found, dict):
                group, rule = str(found.get("training", "")), str(found.get("rule", ""))
                cost = {**found, "score": found.get("accuracy_finetuned"), "latency_us": _latency(found.get("latency"))}
                rows.append({**cost, "name": f"{group}, {rule}", "label": rule, "group": group})
        return rows, "accuracy, %"
    key = next((key for found in stages.values() for key, value in found.items() if isinstance(value, float)), "")
    for name, found in stages.items():
        own = {"score": found.get(key), "latency_us": _latency(found.get("latency"))}
        rows.append({**found, **own, "name": name, "label": name, "group": "stages"})
    return rows, "accuracy, %" if key.startswith("top") else key.replace("_", " ")


def _latency(found: Any) -> Any:
    return found.get("p50_us") if isinstance(found, dict) else None


def _head(run: Run, folder: Path) -> str:
    """What was run on what, when, and with which versions."""
    summary = run.summary
    recipe = _recipe(folder)
    data, model = summary.get("data", recipe.get("data")), summary.get("model", recipe.get("model"))
    compress = recipe.get("compress")
    machine = summary.get("machine")
    machine = machine if isinstance(machine, dict) else {}
    stamp = folder / "summary.json"
    facts = {
        "network": model.get("name") if isinstance(model, dict) else None,
        "data": _data(data),
        "method": compress.get("method") if isinstance(compress, dict) else None,
        "input": by(summary["input_size"]) if isinstance(summary.get("input_size"), list) else None,
        "fastrank": summary.get("fastrank"),
        "torch": machine.get("torch"),
        "machine": machine.get("gpu") or machine.get("platform"),
        "finished": time.strftime("%Y-%m-%d %H:%M", time.localtime(stamp.stat().st_mtime)) if stamp.exists() else None,
        "took": f"{summary['seconds']:,.0f} s" if is_number(summary.get("seconds")) else None,
    }
    shown = "".join(f"<li><b>{name}</b> {escape(str(value)[:120])}</li>" for name, value in facts.items() if value)
    state = "" if summary else _sections.missing("The run has no summary.json yet: it is not finished.")
    return f'<ul class="facts">{shown}</ul>{state}'


def _data(section: Any) -> str:
    if not isinstance(section, dict):
        return ""
    counts = [
        f"{section[key]:,} {key.replace('_', ' ')}" for key in ("train", "held_out") if is_number(section.get(key))
    ]
    return ", ".join([str(section["name"])] if "name" in section else counts)


def _cards(rows: Sequence[Mapping[str, Any]]) -> str:
    """The smallest network that is as good as the dense one, or the last, in a few large numbers."""
    if len(rows) < 2:
        return ""
    base = rows[0]
    good = [
        row
        for row in rows[1:]
        if all(is_number(row.get(key)) and is_number(base.get(key)) for key in ("score", "macs", "params"))
    ]
    if not good:
        return ""
    near = [row for row in good if row["score"] >= base["score"] - NEAR]
    best = min(near, key=lambda row: float(row["macs"])) if near and base["group"] != "stages" else good[-1]
    cards = [
        (f"{best['score']:.2f}", f"accuracy, dense {base['score']:.2f}"),
        (_fewer(base["params"], best["params"]), f"fewer parameters: {short(best['params'])}"),
        (_fewer(base["macs"], best["macs"]), f"fewer multiply-adds: {short(best['macs'])}"),
    ]
    if is_number(best.get("latency_us")) and is_number(base.get("latency_us")):
        cards.append((_fewer(base["latency_us"], best["latency_us"]), "the dense one's speed, measured"))
    shown = "".join(f'<div class="card"><b>{number}</b><span>{text}</span></div>' for number, text in cards)
    nearest = f", the smallest network within {NEAR} points of the dense one"
    why = " against dense" if base["group"] == "stages" else nearest
    return f'<div class="cards">{shown}</div><p class="lead">{escape(best["name"])}{why}.</p>'


def _networks(rows: Sequence[Mapping[str, Any]], score: str) -> str:
    if not rows:
        return _nothing("network")
    base = rows[0]
    kinds = [key for key in ("params", "macs", "latency_us") if any(is_number(row.get(key)) for row in rows)]
    titles = {
        "params": ("parameters", "fewer"),
        "macs": ("multiply-adds", "fewer"),
        "latency_us": ("time, ms", "speed"),
    }
    before = any("accuracy_before" in row for row in rows)
    heads = [("network", True), *([("trained", False), ("converted", False)] if before else []), (score, False)]
    heads += [(title, False) for kind in kinds for title in titles[kind]]
    cells = []
    for row in rows:
        line = [escape(str(row["name"]))]
        if before:
            line += [_fixed(row.get("accuracy_before")), _fixed(row.get("accuracy_converted"))]
        line.append(_fixed(row.get("score")))
        for kind in kinds:
            value = row.get(kind)
            line.append(_fixed(value / 1000) if kind == "latency_us" and is_number(value) else _whole(value))
            line.append("" if row is base else _fewer(base.get(kind), value))
        cells.append(line)
    return _table(heads, cells)


def _layers(rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return ""
    kinds = [key for key in ("params", "macs", "latency_us") if any(key in row for row in rows)]
    titles = {"params": "parameters", "macs": "multiply-adds", "latency_us": "time, µs"}
    heads = [("layer", True), ("form", True), ("ranks", False)]
    heads += [(title, False) for kind in kinds for title in (f"{titles[kind]} before", "after", "÷")]
    heads.append(("reason", True))
    cells = []
    for row in rows[:MAX_ROWS]:
        line = [escape(row["name"]), escape(row["method"]), escape(ranks_text(row["ranks"]))]
        for kind in kinds:
            before, after = row.get(f"dense_{kind}"), row.get(kind)
            line += [_whole(before), _whole(after), _fewer(before, after)]
        cells.append([*line, escape(row["reason"])])
    more = f"{len(rows) - MAX_ROWS} more layers are in plan.json." if len(rows) > MAX_ROWS else ""
    return _table(heads, cells, long=len(heads) - 1) + (_sections.missing(more) if more else "")


def _table(heads: Sequence[tuple[str, bool]], cells: Sequence[Sequence[str]], long: int | None = None) -> str:
    """Cells are HTML; heads: title, and whether the column is text."""

    def kind(place: int) -> str:
        names = [*(["text"] if heads[place][1] else []), *(["long"] if place == long else [])]
        return f' class="{" ".join(names)}"' if names else ""

    head = "".join(f"<th{kind(place)}>{escape(title)}</th>" for place, (title, _) in enumerate(heads))
    lines = (
        "<tr>" + "".join(f"<td{kind(place)}>{cell}</td>" for place, cell in enumerate(line)) + "</tr>" for line in cells
    )
    return f'<div class="table"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def _settings(folder: Path) -> str:
    """The recipe, folded away."""
    recipe = _recipe(folder)
    if not recipe:
        return ""
    return f"<details><summary>Recipe</summary><pre>{escape(json.dumps(recipe, indent=2))}</pre></details>"


def _recipe(folder: Path) -> dict[str, Any]:
    """What recipe.json holds; empty where there is none, since a run may go without."""
    path = folder / "recipe.json"
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise _checks.fail("run", "a folder with a whole recipe.json", f"{path}, which is no JSON") from error
    return found if isinstance(found, dict) else {}


def _nothing(what: str) -> str:
    return _sections.missing(f"No {what} was measured yet: that comes at the end of a run, in summary.json.")


def _whole(value: Any) -> str:
    return thousands(round(value)) if is_number(value) else ""


def _fixed(value: Any) -> str:
    return f"{value:.2f}" if is_number(value) else ""


def _fewer(base: Any, value: Any) -> str:
    """How many times smaller; empty where it is the same, or not known."""
    return f"{base / value:.2f}×" if is_number(base) and is_number(value) and value not in (0, base) else ""
