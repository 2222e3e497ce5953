"""A recipe: one YAML file that says which network is trained on what, regularised, compressed and fine-tuned how."""

from fastrank.recipe._parse import Recipe, load, parse
from fastrank.recipe._run import load_data, regularizers, run

__all__ = ["Recipe", "load", "load_data", "parse", "regularizers", "run"]
