"""The API page: what it lists is there, with those parameters, and nothing public is left out."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from types import ModuleType

import pytest
from docs_pages import DOCS

import fastrank

TEXT = (DOCS / "api.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## (fastrank\S*)\n(.*?)(?=^## |^<!-- /api)", TEXT, flags=re.M | re.S))
# Submodules of fastrank that are of use to programs, all of them listed.
PUBLIC = {f"fastrank.{name}" for name in fastrank.__all__ if isinstance(getattr(fastrank, name), ModuleType)}


def parameters(signature: str) -> list[str]:
    """The names in "(a, b=1, *, c)"."""
    arguments = ast.parse(f"def f{signature}: ...").body[0].args  # type: ignore[attr-defined]
    several = [*arguments.posonlyargs, *arguments.args, arguments.vararg, *arguments.kwonlyargs, arguments.kwarg]
    return [argument.arg for argument in several if argument is not None]


@pytest.mark.parametrize("module", SECTIONS)
def test_what_is_listed_is_there(module: str) -> None:
    found = importlib.import_module(module)
    entries = re.findall(r"^- `(\w+)(\(.*\))?`", SECTIONS[module], flags=re.M)
    constants = re.findall(r"`(\w+)`", SECTIONS[module].partition("\nConstants: ")[2])
    assert entries or constants
    for name in [*(name for name, _ in entries), *constants]:
        assert hasattr(found, name), name
    for name, signature in entries:
        if inspect.isfunction(getattr(found, name)):
            assert parameters(signature) == list(inspect.signature(getattr(found, name)).parameters), name


def test_the_names_of_the_package_are_all_listed() -> None:
    names = {name for name in fastrank.__all__ if not isinstance(getattr(fastrank, name), ModuleType)} - {"__version__"}
    assert names == set(re.findall(r"^- `(\w+)\(", SECTIONS["fastrank"], flags=re.M))


def test_nothing_public_is_left_out() -> None:
    assert set(SECTIONS) >= PUBLIC | {"fastrank"}
    for module in SECTIONS:
        found = importlib.import_module(module)
        for name in getattr(found, "__all__", ()):
            named = getattr(found, name)
            assert name.startswith("_") or isinstance(named, ModuleType) or f"`{name}" in SECTIONS[module], name
