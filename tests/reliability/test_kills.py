"""The campaign of kills.py in small: SIGKILL in training and in saving, and the same bits in the end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

CAMPAIGN = """
import json, sys
from dataclasses import asdict
from pathlib import Path
import kills, torch
torch.set_num_threads(1)
print(json.dumps([asdict(kills.campaign(name, 4, Path(sys.argv[1]))) for name in ("trp", "funnel")]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks processes in order to kill them")
def test_killed_in_training_and_in_saving(tmp_path: Path) -> None:
    # In an interpreter of its own: a process that is forked should have no threads.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", CAMPAIGN, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    for tally in json.loads(done.stdout):
        assert tally["bad"] == []
        assert tally["kills"] == tally["whole"] == 4
        assert tally["saving"] >= 2, "two of four kills are in the midst of saving"
        assert tally["exact"] == tally["runs"] >= 1
