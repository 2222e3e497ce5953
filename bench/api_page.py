"""The list of docs/api.md: every public name with its signature and the first sentence of its docstring.

Read off the syntax trees, so that no optional package has to be there.
"""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# In the order of the page; what is a folder of modules without names of its own is listed by module.
MODULES = (
    "fastrank",
    "fastrank.nn",
    "fastrank.ops",
    "fastrank.decompose",
    "fastrank.ranks",
    "fastrank.regularize",
    "fastrank.regularize.schedules",
    "fastrank.methods",
    "fastrank.methods.nrmf",
    "fastrank.methods.trp",
    "fastrank.methods.funnel",
    "fastrank.methods.norton",
    "fastrank.methods.musco",
    "fastrank.prune",
    "fastrank.convert",
    "fastrank.calibration",
    "fastrank.complexity",
    "fastrank.latency",
    "fastrank.models",
    "fastrank.data",
    "fastrank.train",
    "fastrank.distributed",
    "fastrank.integrations",
    "fastrank.integrations.lightning",
    "fastrank.integrations.huggingface",
    "fastrank.integrations.tensorboard",
    "fastrank.export",
    "fastrank.hub",
    "fastrank.report",
)
# Methods that every layer has, for PyTorch's sake.
INNER = ("extra_repr", "reset_parameters", "forward", "train")
Definition = ast.FunctionDef | ast.ClassDef


def file_of(module: str) -> Path | None:
    """The file of a module of this checkout, None where there is none."""
    path = ROOT.joinpath(*module.split("."))
    found = (path / "__init__.py", path.with_suffix(".py"))
    return next((file for file in found if file.exists()), None)


@cache
def tree(module: str) -> ast.Module:
    """The syntax tree of a module."""
    file = file_of(module)
    assert file is not None, module
    return ast.parse(file.read_text(encoding="utf-8"))


def public(module: str) -> list[str]:
    """`__all__` of a module, or the functions and classes that it defines without an underscore."""
    for node in tree(module).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return [name for name in ast.literal_eval(node.value) if not name.startswith("_")]
    return [node.name for node in tree(module).body if isinstance(node, Definition) and not node.name.startswith("_")]


def find(module: str, name: str) -> Definition | str | None:
    """The definition of a name as seen in a module; the name of a module that it is; None for a constant."""
    for node in _statements(module):
        if isinstance(node, Definition) and node.name == name:
            return node
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("fastrank"):
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    below = f"{node.module}.{alias.name}"
                    return below if file_of(below) else find(node.module, alias.name)
    return None


def _statements(module: str) -> list[ast.stmt]:
    """The statements of a module, with those behind TYPE_CHECKING: names that are imported when they are used."""
    found: list[ast.stmt] = []
    for node in tree(module).body:
        lazy = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        found += node.body if lazy else [node]  # type: ignore[attr-defined]
    return found


def signature(node: Definition, *, bound: bool = False) -> str:
    """The parameters with their defaults, without annotations; those of a class are its constructor's or its fields."""
    if isinstance(node, ast.ClassDef):
        init = next((n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"), None)
        if init is not None:
            return signature(init, bound=True)
        if not any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list):
            return ""
        fields = [
            (ast.unparse(n.target), n.value)
            for n in node.body
            if isinstance(n, ast.AnnAssign) and "ClassVar" not in ast.unparse(n.annotation)
        ]
        return f"({', '.join(name if value is None else f'{name}={_default(value)}' for name, value in fields)})"
    arguments = ast.parse(f"def f({ast.unparse(node.args)}): ...").body[0].args  # type: ignore[attr-defined]
    for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg):
        if argument is not None:
            argument.annotation = None
    if bound:
        arguments.args = arguments.args[1:]
    return f"({ast.unparse(arguments)})"


def _default(value: ast.expr) -> str:
    """A field's default; what a factory makes is left open."""
    return "..." if isinstance(value, ast.Call) and ast.unparse(value.func) == "field" else ast.unparse(value)


def sentence(node: Definition | ast.Module) -> str:
    """The first sentence of a docstring, safe in Markdown."""
    paragraph = " ".join((ast.get_docstring(node) or "").partition("\n\n")[0].split())
    first, _, rest = paragraph.partition(". ")
    text = f"{first}." if rest else paragraph
    return text.replace("*", r"\*").replace("<", "&lt;").replace("[", r"\[")


def _shown(method: ast.FunctionDef) -> bool:
    return not method.name.startswith("_") and method.name not in INNER and bool(ast.get_docstring(method))


def entry(name: str, node: Definition) -> list[str]:
    """A name, and for a class its public methods below it."""
    lines = [f"- `{name}{signature(node)}`<br>", f"  {sentence(node)}"]
    for method in node.body if isinstance(node, ast.ClassDef) else ():
        if isinstance(method, ast.FunctionDef) and _shown(method):
            kinds = {ast.unparse(decorator) for decorator in method.decorator_list}
            parameters = "" if "property" in kinds else signature(method, bound="staticmethod" not in kinds)
            lines += [f"    - `{method.name}{parameters}`<br>", f"      {sentence(method)}"]
    return lines


def page() -> str:
    """The list, a heading a module."""
    lines: list[str] = []
    for module in MODULES:
        if file_of(module) is None:
            continue
        names = public(module)
        found = {name: find(module, name) for name in names}
        listed = {name: node for name, node in found.items() if isinstance(node, Definition)}
        others = [name for name, node in found.items() if node is None]
        if not listed and not others:
            continue
        lines += [f"## {module}", "", sentence(tree(module)), ""]
        for name, node in listed.items():
            lines += entry(name, node)
        if others:
            lines += ["", f"Constants: {', '.join(f'`{name}`' for name in others)}."]
        lines.append("")
    return "\n".join(lines).rstrip()
