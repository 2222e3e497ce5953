"""The table of docs/scale-out.md is what the code gives."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from fastrank import models
from fastrank.distributed import cost, table
from fastrank.regularize import NuclearNorm

PAGE = Path(__file__).resolve().parents[2] / "docs" / "scale-out.md"
PLACE = re.compile(r"(?<=<!-- table: begins -->\n)(.*?)(?=<!-- table: ends -->)", re.S)


def resnet50() -> str:
    """The network and the settings that the page names."""
    model = models.build("resnet_50")
    penalty = NuclearNorm(model, 3e-4)
    worlds = [("ddp", 1), ("ddp", 2), ("ddp", 4), ("ddp", 8), ("fsdp", 8), ("ddp", 32), ("fsdp", 32)]
    options = {"batch_size": 256, "input_size": (3, 224, 224)}
    costs = [cost(model, [penalty], world=world, parallel=kind, **options) for kind, world in worlds]
    return f"\n{table(costs)}\n\n"


def test_the_table_is_of_this_code() -> None:
    assert PLACE.search(PAGE.read_text(encoding="utf-8"))[0] == resnet50()  # type: ignore[index]


if __name__ == "__main__":
    PAGE.write_text(PLACE.sub(lambda _: resnet50(), PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    sys.exit(pytest.main([__file__]))
