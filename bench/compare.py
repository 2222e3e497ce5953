"""Before and after: the cases of bench/compare_cases.py on another revision and on this working tree, in turns.

    python bench/compare.py --base main [--families tucker2,linalg] [-k REGEX] [--rounds 5] [--fail-slower]

REV is unpacked into a folder under build/ that is removed again; its native parts are built there where csrc/ or
setup.py differ, and are copies of this tree's otherwise. Each round is one process a tree, in another order every
round. A change is claimed where it is 3 % or more and the p20–p80 of both do not overlap, over three rounds or more.
What a case computes is compared first: where the two differ by more than rounding, there is no figure.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import compare_cases
import torch
from torch import Tensor

from fastrank.benchmarks import timing

ROOT = Path(__file__).resolve().parents[1]
LEAST_CHANGE = 0.03
LEAST_ROUNDS = 3
"""Two processes of the very same code differ by where their memory happens to lie: fewer show no spread of that."""
BASE, HEAD = "base", "head"
COLUMNS = ("case", "before p50 (p20–p80)", "after p50 (p20–p80)", "change", "verdict")


class Refused(Exception):
    """Why there is nothing to compare, in one sentence."""


def git(root: Path, *arguments: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, check=False)


def commit_of(root: Path, revision: str) -> str:
    """The full hash; Refused where the name is none of a commit (a working tree with changes has no name)."""
    found = git(root, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}")
    if found.returncode:
        raise Refused(f"--base must name a commit of {root}, got {revision!r}")
    return found.stdout.decode().strip()


def described(root: Path) -> str:
    """The commit of the working tree, and whether it has changes beyond it."""
    head = git(root, "rev-parse", "--short", "HEAD").stdout.decode().strip()
    return f"{head} with changes" if git(root, "status", "--porcelain").stdout.strip() else head


def native_differs(root: Path, commit: str) -> bool:
    """Whether the working tree would build other native parts than the commit."""
    changed = git(root, "diff", "--quiet", commit, "--", "csrc", "setup.py").returncode
    return bool(changed or git(root, "ls-files", "--others", "--exclude-standard", "csrc").stdout.strip())


def unpack(root: Path, commit: str, folder: Path) -> None:
    """The commit's files in `folder`, ready to import from there."""
    archive = git(root, "archive", "--format=tar", commit)
    if archive.returncode:
        raise Refused(f"git could not unpack {commit}: {archive.stderr.decode().strip()}")
    with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as files:
        files.extractall(folder, filter="data")
    # Else the editable installation would lend it the kernels of the working tree.
    kernels = folder / "fastrank" / "triton_kernels"
    if (folder / "triton_kernels").is_dir() and not kernels.exists():
        kernels.symlink_to("../triton_kernels")
    if not native_differs(root, commit):
        for part in (*(root / "fastrank").glob("*.so"), root / "fastrank" / "_build_info.json"):
            if part.is_file():
                shutil.copy2(part, folder / "fastrank")
        return
    print("building the native parts of the base …", file=sys.stderr, flush=True)
    environment = {"FASTRANK_CUDA": "auto" if torch.cuda.is_available() else "0", **os.environ}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    built = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if built.returncode:
        raise Refused(f"the native parts of the base were not built: {last_line(built.stderr)}")


def last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no message"])[-1]


def once(tree: Path, scratch: Path, options: Sequence[str]) -> dict[str, Any]:
    """One process that times all cases with the package of `tree`: {title: {"us": samples} or {"absent": why}}."""
    environment = {**os.environ, "PYTHONPATH": str(tree), "FASTRANK_CACHE": str(scratch / "no tables of the user")}
    command = [sys.executable, compare_cases.__file__, "--tree", str(tree), *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=scratch)
    if done.returncode:
        raise Refused(f"the cases did not run in {tree}: {last_line(done.stderr)}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def rounds(trees: Mapping[str, Path], scratch: Path, count: int, options: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Of each tree its cases with the samples of all rounds; what they computed goes to SCRATCH/NAME.pt."""
    found: dict[str, dict[str, Any]] = {name: {} for name in trees}
    for turn in range(count):
        for name in list(trees) if turn % 2 == 0 else reversed(list(trees)):
            outputs = ["--outputs", str(scratch / f"{name}.pt")] if turn == 0 else []
            for title, row in once(trees[name], scratch, [*options, *outputs]).items():
                kept = found[name].setdefault(title, row)
                if kept is not row and "us" in row and "us" in kept:
                    kept["us"] += row["us"]
        print(f"round {turn + 1} of {count}", file=sys.stderr, flush=True)
    return found


def difference(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    """The largest relative difference (Frobenius norm) over the tensors; infinite where they do not match."""
    if [tensor.shape for tensor in before] != [tensor.shape for tensor in after]:
        return math.inf
    worst = 0.0
    for old, new in zip(before, after, strict=True):
        off, size = float((new - old).norm()), max(float(old.norm()), float(new.norm()))
        if not math.isfinite(off) or not math.isfinite(size):
            return math.inf
        worst = max(worst, off / size if size else 0.0)
    return worst


def verdict(before: timing.Quantiles, after: timing.Quantiles) -> str:
    """ "faster" or "slower" where the medians are 3 % apart and the middle three fifths have no time in common."""
    change = after.p50_us / before.p50_us - 1
    if change <= -LEAST_CHANGE and after.p80_us < before.p20_us:
        return "faster"
    return "slower" if change >= LEAST_CHANGE and after.p20_us > before.p80_us else "no claim"


def judged(
    cases: Sequence[compare_cases.Case],
    found: Mapping[str, Mapping[str, Any]],
    outputs: Mapping[str, Mapping[str, Sequence[Tensor]]],
    rounds: int = LEAST_ROUNDS,
) -> list[dict[str, Any]]:
    """A row a case: quantiles, change, verdict, and by how much the results differ. Fewer rounds make no claim."""
    rows = []
    for case in cases:
        row: dict[str, Any] = {"case": case.title, "tolerance": case.tolerance}
        rows.append(row)
        absent = {name: found[name][case.title]["absent"] for name in found if "absent" in found[name][case.title]}
        for name in found:
            if name not in absent:
                row[name] = timing.Quantiles.of(found[name][case.title]["us"]).as_dict()
        if absent:
            row |= {"verdict": f"absent in {' and '.join(absent)}", "why": absent}
            continue
        row["difference"] = difference(outputs[BASE][case.title], outputs[HEAD][case.title])
        if row["difference"] > case.tolerance:
            row["verdict"] = "results differ"
            continue
        before, after = (timing.Quantiles(**row[name]) for name in (BASE, HEAD))
        row["change"] = after.p50_us / before.p50_us - 1
        row["verdict"] = verdict(before, after) if rounds >= LEAST_ROUNDS else "no claim"
    return rows


def shown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as a table of text, and what they amount to."""

    def time(row: Mapping[str, Any], name: str) -> str:
        if name not in row:
            return "–"
        q = row[name]
        return f"{q['p50_us']:,.1f} ({q['p20_us']:,.1f}–{q['p80_us']:,.1f}) µs"

    lines = [COLUMNS]
    for row in rows:
        change = f"{100 * row['change']:+.1f} %" if "change" in row else "–"
        told = row["verdict"]
        if told == "results differ":
            told += f": by {row['difference']:.1e}, {row['tolerance']:.1e} is rounding"
        elif "why" in row:
            told += f": {'; '.join(row['why'].values())}"
        lines.append((row["case"], time(row, BASE), time(row, HEAD), change, told))
    widths = [max(len(line[place]) for line in lines) for place in range(4)]
    text = ["  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=False)) + "  " + line[4]
            for line in lines]  # fmt: skip
    counts = {told: sum(row["verdict"] == told for row in rows) for told in ("faster", "slower", "no claim")}
    others = len(rows) - sum(counts.values())
    ratios = [row[HEAD]["p50_us"] / row[BASE]["p50_us"] for row in rows if "change" in row]
    mean = f"; geometric mean of after over before {statistics.geometric_mean(ratios):.3f}" if ratios else ""
    worst = max((row["difference"] for row in rows if "change" in row), default=0.0)
    told = ", ".join(f"{count} {name}" for name, count in counts.items())
    text += ["", f"{len(rows)} cases: {told}, {others} not compared{mean}; results differ by {worst:.1e} at most."]
    return "\n".join(text)


def compare(root: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The result of all rounds; Refused where there can be none. Nothing is left behind."""
    cases = compare_cases.chosen(options.families.split(","), options.expression)
    if not cases:
        raise Refused(f"-k must match a case, got {options.expression!r}")
    commit = commit_of(root, options.base)
    (root / "build").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="compare-", dir=root / "build") as name:
        scratch = Path(name)
        trees = {BASE: scratch / "base", HEAD: root}
        trees[BASE].mkdir()
        unpack(root, commit, trees[BASE])
        asked = [f"--families={options.families}", f"-k={options.expression}", f"--seconds={options.seconds}"]
        found = rounds(trees, scratch, options.rounds, [*asked, f"--threads={options.threads}"])
        outputs = {each: torch.load(scratch / f"{each}.pt") for each in trees}
        return {
            "base": {"asked": options.base, "commit": commit},
            "head": described(root),
            "rounds": options.rounds,
            "threads": options.threads,
            "environment": timing.environment(),
            "rows": judged(cases, found, outputs, options.rounds),
        }


def stop(number: int, frame: object) -> None:
    """Told to end: leave by an exception, so that the folder is removed."""
    raise SystemExit(128 + number)


def main() -> int:
    """Compare; 1 with --fail-slower where a case is slower, differs, or is absent in head; 2 where refused."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True, metavar="REV", help="the commit to compare with")
    parser.add_argument("--families", default="", help="some of the families, with commas between (default: all)")
    parser.add_argument("-k", dest="expression", default="", metavar="REGEX", help="cases whose title matches")
    parser.add_argument("--rounds", type=int, default=5, help="processes a tree (default: 5)")
    parser.add_argument("--seconds", type=float, default=0.2, help="for a case in a process (default: 0.2)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="file for the rows")
    parser.add_argument("--fail-slower", action="store_true", help="exit 1 where a case is slower or differs")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, stop)
    try:
        result = compare(ROOT, options)
    except (Refused, ValueError) as error:
        print(f"there is nothing to compare: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    print(f"before: {options.base} ({result['base']['commit'][:9]}), after: the working tree ({result['head']})")
    print(shown(result["rows"]))
    if options.rounds < LEAST_ROUNDS:
        print(f"Fewer than {LEAST_ROUNDS} rounds claim nothing.")
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    bad = ("slower", "results differ", f"absent in {HEAD}", f"absent in {BASE} and {HEAD}")
    return int(options.fail_slower and any(row["verdict"] in bad for row in result["rows"]))


if __name__ == "__main__":
    sys.exit(main())
