"""How much longer `import fastrank` takes than `import torch`: medians of fresh processes, in turns.

    python bench/import_time.py [ROUNDS]

Prints seconds of the wall clock, and of the process's own time, which other work on the machine hardly touches.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys

CODE = """
import json, time
clocks = time.perf_counter, time.process_time
before = [clock() for clock in clocks]
import {modules}
print(json.dumps([clock() - start for clock, start in zip(clocks, before)]))
"""


def once(modules: str) -> list[float]:
    """(wall, process) seconds of importing `modules` in a fresh process."""
    command = [sys.executable, "-c", CODE.format(modules=modules)]
    found: list[float] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return found


def main() -> int:
    """Measure and print."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    samples = [(once("torch"), once("torch, fastrank")) for _ in range(rounds)]
    for index, name in enumerate(("wall", "process")):
        torch, both = (statistics.median(pair[side][index] for pair in samples) for side in (0, 1))
        print(f"{name}: torch {torch:.3f} s, with fastrank {both:.3f} s, fastrank {both - torch:.3f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
