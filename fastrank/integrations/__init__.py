"""Rank regularisers in the training loops of others: plain PyTorch, Lightning, Hugging Face; and TensorBoard's logs.

`lightning`, `huggingface` and `tensorboard` are imported when they are first named, and need their package then.
"""

from __future__ import annotations

import importlib
from typing import Any

from fastrank.integrations._hooks import Attachments, attach_all

__all__ = ["Attachments", "attach_all", "huggingface", "lightning", "tensorboard"]


def __getattr__(name: str) -> Any:
    if name in ("huggingface", "lightning", "tensorboard"):
        return importlib.import_module(f"fastrank.integrations.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
