"""The goals of the fused convolutions and gates, and what a GPU run measured of them.

    python bench/goals.py RESULTS_DIR [--write FILE]

Reads the bench_*.jsonl of `bench/gpu.py` (tucker2, networks, cp, gates) and prints two tables in Markdown: every
goal with what was wanted, what came out, whether that meets it and the roofline fraction where its rows have one; and
images a second of whole networks. A goal none of whose rows was measured says so. Times are medians of cold graphs.

"fused" is the faster of fastrank's kernels, "three" the faster of three library convolutions with ranks as given and
padded to 8, "auto" what the dispatcher takes. A stack's time is the sum over its layers, each as often as it stands
there; where layers are missing, the sum is over the others, and the table says how many were measured. "best" is the
fastest backend that the dispatcher could have taken.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Info = Mapping[str, Any]
STACK = "ResNet-18"
FAMILIES = ("tucker2", "networks", "cp", "gates")
FUSED, THREE = ("cuda", "triton"), ("sequence", "padded")
NOISE = 1.03  # two measurements of one thing
HOST_US, SAVED_SHARE, BANDWIDTH_SHARE = 10.0, 0.55, 0.85
TERABYTES = 4.3  # a second: what the goals assume of an H200
UNKNOWN, NO_TABLE = "not measured", "nothing known"


@dataclass(frozen=True)
class Goal:
    """A line of the table. met is None where nothing was measured; roofline is the fraction of the floor, or None."""

    number: str
    what: str
    wanted: str
    found: str
    met: bool | None
    roofline: float | None = None

    def cells(self) -> list[str]:
        verdict = {None: "", True: "met", False: "missed"}[self.met]
        share = "" if self.roofline is None else f"{100 * self.roofline:.0f} %"
        return [self.number, self.what, self.wanted, self.found, verdict, share]


def read(folder: Path, family: str) -> list[tuple[str, Info]]:
    """(group, extra_info) of every benchmark of a family that ended; nothing where the file is missing."""
    return [(group, info) for _, group, info in named(folder, family)]


def named(folder: Path, family: str) -> list[tuple[str, str, Info]]:
    """The same, with the name of each benchmark in front."""
    path = folder / f"bench_{family}.jsonl"
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue  # the run was stopped while it wrote
        rows.append((row["name"], row["group"], row["extra_info"]))
    return rows


def times(info: Info, way: str) -> dict[str, float]:
    """Contender -> microseconds, by the primary figure, with "fused", "three" and "best" from among them."""
    found = info.get(way, {})
    quantiles = found.get("cold_graph", found.get("eager", {}))
    us = {name: float(each["p50_us"]) for name, each in quantiles.items()}
    for name, among in (("fused", FUSED), ("three", THREE), ("best", (*FUSED, "sequence", "dense"))):
        able = [us[each] for each in among if each in us]
        if able:
            us[name] = min(able)
    return us


def of(rows: Iterable[tuple[str, Info]], group: str, batch: int | None = None) -> list[Info]:
    """The rows of a group that ran to their end, at one batch if asked."""
    return [info for name, info in rows if name == group and "plain" in info and batch in (None, info["batch"])]


def stack(rows: Sequence[Info], way: str, those: str, these: str) -> tuple[float, int] | None:
    """(how many times as long the stack takes by those as by these, layers that count), None where none has both."""
    sums, layers = [0.0, 0.0], 0
    for info in rows:
        us, count = times(info, way), info["counts"].get(STACK, 0)
        if count and those in us and these in us:
            sums = [sums[0] + count * us[those], sums[1] + count * us[these]]
            layers += count
    return (sums[0] / sums[1], layers) if layers else None


def roofline(rows: Sequence[Info], way: str, name: str) -> float | None:
    """The floors of a stack over its time."""
    known = [(info["counts"].get(STACK, 0), info[way]["floor_us"], times(info, way)) for info in rows if way in info
             and "floor_us" in info[way]]  # fmt: skip
    pairs = [(count * floor, count * us[name]) for count, floor, us in known if count and name in us]
    return sum(floor for floor, _ in pairs) / sum(us for _, us in pairs) if pairs else None


def at_least(
    number: str, what: str, limit: float, value: float | None, *, note: str = "", share: float | None = None
) -> Goal:
    """A goal of the kind "so many times as fast"."""
    if value is None:
        return Goal(number, what, f"≥ {limit:g}×", UNKNOWN, None)
    return Goal(number, what, f"≥ {limit:g}×", f"{value:.2f}×{note}", value >= limit, share)


def of_stack(number: str, what: str, limit: float, rows: Sequence[Info], way: str, those: str, these: str) -> Goal:
    found = stack(rows, way, those, these)
    if found is None:
        return at_least(number, what, limit, None)
    note = "" if found[1] == 16 else f" ({found[1]} of 16 layers)"
    best = stack(rows, way, those, "best")
    if these == "auto" and best and any(info["auto_by"] == NO_TABLE for info in rows):
        note += f"; auto had no table of this device, with one {best[0]:.2f}×"
    return at_least(number, what, limit, found[0], note=note, share=roofline(rows, way, these))


def geometric(values: Sequence[float]) -> float | None:
    return math.exp(sum(map(math.log, values)) / len(values)) if values else None


def ratios(rows: Sequence[Info], way: str, those: str, these: str) -> dict[str, float]:
    """Layer and batch -> how many times as long those take as these, where both were measured."""
    suffix = "" if way == "plain" else f", {way}"
    found = {f"{info['layer']}, N={info['batch']}{suffix}": times(info, way) for info in rows}
    return {name: us[those] / us[these] for name, us in found.items() if those in us and these in us}


def worst(number: str, what: str, wanted: str, limit: float, found: Mapping[str, float]) -> Goal:
    """A goal that every row has to meet, `limit` being the least ratio; the worst row is named."""
    if not found:
        return Goal(number, what, wanted, UNKNOWN, None)
    name = min(found, key=lambda key: found[key])
    return Goal(number, what, wanted, f"{found[name]:.2f}× at the worst ({name})", found[name] >= limit)


def table(folder: Path) -> list[Goal]:
    """Goals 1 to 6, 11 and 12."""
    rows = read(folder, "tucker2")
    forward = of(rows, "tucker2 forward")
    at = {batch: of(rows, "tucker2 forward", batch) for batch in (1, 8, 32, 128)}
    goals = [
        of_stack("1", f"{STACK}'s stack, fused over three convolutions, N={batch}{text}", limit, at[batch], way,
                 "three", "fused")
        for way, text, limits in (("plain", "", (1.8, 2.0, 1.75, 1.6)),
                                  ("epilogue", ", with bias, residual, ReLU", (2.3, 2.4, 2.1, 2.0)))
        for batch, limit in zip((1, 8, 32, 128), limits, strict=True)
    ]  # fmt: skip
    slower = {
        name: value for way in ("plain", "epilogue") for name, value in ratios(forward, way, "dense", "auto").items()
    }
    goals.append(worst("2", "every layer, auto over dense, to 3 % of noise", "≥ 1×", 1 / NOISE, slower))
    for batch, limit in ((8, 1.35), (32, 1.75), (128, 1.75)):
        what = f"{STACK}'s stack, auto over dense, N={batch}"
        goals.append(of_stack("2", what, limit, at[batch], "plain", "dense", "auto"))
    for name, limit in (("NRMF conv4", 5.0), ("NRMF conv5", 8.0)):
        found = ratios([info for info in at[128] if info["layer"] == name], "plain", "dense", "auto")
        goals.append(at_least("2", f"{name}, auto over dense, N=128", limit, next(iter(found.values()), None)))
    for batches, limit, text in (((1,), 1.8, "N=1"), ((8, 32, 128), 1.5, "N≥8")):
        tuned = [info for info in of(rows, "tucker2 compiled") if info["batch"] in batches]
        found = ratios(tuned, "plain", "compiled", "auto")
        what, note = f"auto over torch.compile, {text}, geometric mean", f" ({len(found)} rows)"
        goals.append(at_least("3", what, limit, geometric(list(found.values())), note=note))
    goals += [bandwidth(forward), dispatcher(forward), *training(rows)]
    return [*goals, *cp(read(folder, "cp")), *gates(folder), host(rows)]


def bandwidth(rows: Sequence[Info]) -> Goal:
    """Goal 4: the layers of 64 channels are bound by their bytes."""
    shares = {}
    for info in rows:
        if info["layer"].startswith("64, ") and info["batch"] >= 32 and "floor_us" in info["plain"]:
            us = times(info, "plain")
            if "fused" in us:
                shares[f"{info['layer']}, N={info['batch']}"] = info["plain"]["floor_us"] / us["fused"]
    wanted = f"≥ {100 * BANDWIDTH_SHARE:.0f} % of the floor"
    what = "layers of 64 channels, N≥32, fused"
    if not shares:
        return Goal("4", what, wanted, UNKNOWN, None)
    name = min(shares, key=lambda key: shares[key])
    share = shares[name]
    return Goal("4", what, wanted, f"{100 * share:.0f} % at the worst ({name})", share >= BANDWIDTH_SHARE, share)


def dispatcher(rows: Sequence[Info]) -> Goal:
    """Goal 4: what auto takes is at most 3 % slower than the best."""
    found = {name: value for way in ("plain", "epilogue") for name, value in ratios(rows, way, "best", "auto").items()}
    return worst("4", "every layer, auto over the best backend", f"≥ {1 / NOISE:.2f}×", 1 / NOISE, found)


def training(rows: Sequence[tuple[str, Info]]) -> list[Goal]:
    """Goal 5."""
    trained = of(rows, "tucker2 forward and backward", 128)
    narrow = [info for info in trained if max(info["ranks"]) <= 64]
    low = list(ratios(narrow, "plain", "three", "fused").values())
    saved = [0.0, 0.0]
    for info in trained:
        count, kept = info["counts"].get(STACK, 0), info.get("saved_bytes", {})
        ours = [kept[name] for name in FUSED if name in kept]
        if ours and "sequence" in kept:
            saved = [saved[0] + count * max(ours), saved[1] + count * kept["sequence"]]
    share = saved[0] / saved[1] if saved[1] else None
    return [
        of_stack("5", f"{STACK}'s stack, forward and backward, fused over three, N=128", 1.4, trained, "plain", "three",
                 "fused"),
        at_least("5", "the same, layers with R ≤ 64, geometric mean", 1.8, geometric(low), note=f" ({len(low)} rows)"),
        Goal("5", "saved activations, fused of three", f"≤ {100 * SAVED_SHARE:.0f} %",
             UNKNOWN if share is None else f"{100 * share:.0f} %", None if share is None else share <= SAVED_SHARE),
    ]  # fmt: skip


def cp(rows: Sequence[tuple[str, Info]]) -> list[Goal]:
    """Goal 6: CP layers, the fused kernel over the chain of four operations and over dense."""
    us = {
        (info["layer"], info["rank"]): {name: float(each["p50_us"]) for name, each in info["cold_graph"].items()}
        for group, info in rows
        if group == "cp forward" and "cold_graph" in info
    }

    def over(name: str, some: Callable[[str, int], bool]) -> list[float]:
        return [t[name] / t["triton"] for key, t in us.items() if some(*key) and name in t and "triton" in t]

    def narrow(layer: str, channels: int) -> bool:
        return layer.startswith(f"{channels}, ")

    everything = over("sequence", lambda layer, rank: True)
    note, what = f" ({len(everything)} rows)", "CP layers, fused over the chain of four operations, geometric mean"
    return [
        at_least("6", what, 5.0, geometric(everything), note=note),
        *(
            at_least("6", f"CP layers of {channels} channels, R = 1, fused over dense", limit, next(iter(found), None))
            for channels, limit in ((128, 2.5), (256, 5.0))
            for found in (over("dense", lambda layer, rank, c=channels: narrow(layer, c) and rank == 1),)
        ),
    ]


def gates(folder: Path) -> list[Goal]:
    """Goal 11: the factors of a model in one launch, over the chain of torch._foreach, and over the bandwidth."""
    us: dict[str, dict[str, float]] = {}
    shares = {}
    for name, group, info in named(folder, "gates"):
        if group != "gated_factors, forward" or "cold_graph" not in info:
            continue
        contender, _, tensors = name.partition("[")[2].removesuffix("]").partition("-")
        us.setdefault(tensors, {})[contender] = float(info["cold_graph"]["p50_us"])
        if contender in FUSED and " MB " in tensors:
            share = info["bytes_moved"] / us[tensors][contender] / (1e6 * TERABYTES)
            shares[tensors] = max(share, shares.get(tensors, 0.0))
    model = us.get(STACK, {})
    fused = [model[name] for name in FUSED if name in model]
    over = model["foreach"] / min(fused) if fused and "foreach" in model else None
    wanted, what = f"≥ 90 % of {TERABYTES:g} TB/s", "gated factors of 64 MB and more"
    worst_list = min(shares, key=lambda key: shares[key], default="")
    return [
        at_least("11", f"gated factors of {STACK}, fused over a torch._foreach chain", 3.0, over),
        Goal("11", what, wanted, f"{100 * shares[worst_list]:.0f} % at the worst ({worst_list})",
             shares[worst_list] >= 0.9, shares[worst_list]) if shares else Goal("11", what, wanted, UNKNOWN, None),
    ]  # fmt: skip


def host(rows: Sequence[tuple[str, Info]]) -> Goal:
    """Goal 12; that nothing waits for the device is asserted by the benchmark itself."""
    found = [info["host"] for name, info in rows if name == "tucker2 host" and "host" in info]
    what, wanted = "host time of an eager call, auto", f"≤ {HOST_US:g} µs"
    if not found:
        return Goal("12", what, wanted, UNKNOWN, None)
    us = {name: each["p50_us"] for name, each in found[-1].items()}
    others = ", ".join(f"{name} {value:.1f}" for name, value in us.items() if name != "auto")
    return Goal("12", what, wanted, f"{us['auto']:.1f} µs ({others})", us["auto"] <= HOST_US)


def markdown(columns: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (columns, ["---"] * len(columns), *lines))


def goals_table(folder: Path) -> str:
    """Goals as Markdown."""
    columns = ["goal", "what", "wanted", "measured", "", "of the roofline"]
    return markdown(columns, [goal.cells() for goal in table(folder)])


def networks_table(folder: Path) -> str:
    """Images a second as Markdown, the ratio of multiply-adds beside every speed-up; empty where there are none."""
    lines = []
    for group, info in read(folder, "networks"):
        for way, rates in info.get("images_a_second", {}).items():
            name = {"cold_graph": "CUDA graph", "eager": "eager"}[way]
            for contender, rate in rates.items():
                faster = info["faster_than_dense"][way][contender]
                fewer = "" if contender.endswith("dense") else f"{info['fewer_macs']:.2f}×"
                how = f"{name}, compiled" if group.endswith("compiled") else name
                lines.append(
                    [info["network"], str(info["batch"]), how, contender, f"{rate:.0f}", fewer, f"{faster:.2f}×"]
                )
    columns = ["network", "N", "way", "form", "images a second", "fewer multiply-adds", "faster than dense"]
    return markdown(columns, lines) if lines else ""


def page(folder: Path) -> str:
    """Both tables, with the machine they were measured on."""
    known = environment(folder)
    gpu, torch, cuda, cudnn = (known.get(key, "unknown") for key in ("gpu", "torch", "cuda", "cudnn"))
    note = f"Measured on {gpu}, torch {torch}, CUDA {cuda}, cuDNN {cudnn}."
    return "\n\n".join(part for part in (goals_table(folder), networks_table(folder), note) if part)


def environment(folder: Path) -> Info:
    """What the first benchmark found."""
    for family in FAMILIES:
        for _, info in read(folder, family):
            found: Info = info.get("environment", {})
            return found
    return {}


def main() -> int:
    """Exit code 1 where a goal was missed, 2 where there are no results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="the folder that bench/gpu.py filled")
    parser.add_argument("--write", type=Path, help="a file for the tables")
    options = parser.parse_args()
    if not any(read(options.results, family) for family in FAMILIES):
        print(f"{options.results} has no results of {', '.join(FAMILIES)}", file=sys.stderr)
        return 2
    text = page(options.results)
    print(text)
    if options.write:
        options.write.write_text(text + "\n", encoding="utf-8")
    return int(any(goal.met is False for goal in table(options.results)))


if __name__ == "__main__":
    sys.exit(main())
