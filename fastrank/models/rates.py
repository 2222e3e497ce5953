"""Compression rates in the NORTON spelling, ``[0.]+[0.1]*2+[0.4]*5``: parsed by hand, never evaluated."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from fastrank import _checks

MAX_RATES = 10_000
_MAX_TEXT = 400_000
_MAX_TOKEN = 64
_TOKEN = re.compile(r"\s*(-?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?|[\[\],+*])", re.ASCII)
_SPELLING = "lists of numbers joined by + and repeated by *, such as '[0.]+[0.1]*2+[0.4]*5'"


class _Reader:
    """Takes the tokens of one text from left to right."""

    def __init__(self, text: str, name: str) -> None:
        self.text, self.name, self.at = text.rstrip(), name, 0

    def refuse(self) -> ValueError:
        shown = self.text if len(self.text) <= 60 else self.text[:57] + "..."
        return _checks.fail(self.name, _SPELLING, f"{shown!r} (wrong at character {self.at})")

    def at_end(self) -> bool:
        return self.at == len(self.text)

    def take(self, sign: str) -> bool:
        """Whether `sign` comes next; steps over it if so."""
        found = _TOKEN.match(self.text, self.at)
        if found is None or found[1] != sign:
            return False
        self.at = found.end()
        return True

    def number(self) -> str:
        found = _TOKEN.match(self.text, self.at)
        if found is None or found[1] in "[],+*" or len(found[1]) > _MAX_TOKEN:
            raise self.refuse()
        self.at = found.end()
        return found[1]

    def rates(self) -> list[float]:
        """One bracketed list."""
        if not self.take("["):
            raise self.refuse()
        if self.take("]"):
            return []
        values = [float(self.number())]
        while self.take(","):
            values.append(float(self.number()))
        if not self.take("]"):
            raise self.refuse()
        return values

    def times(self) -> int:
        before, digits = self.at, self.number()
        if not digits.isdecimal():
            self.at = before
            raise self.refuse()
        return int(digits)


def parse_rates(text: str, *, name: str = "compress_rate") -> list[float]:
    """The list that a text such as ``"[0.]+[0.1]*2+[0.4]*5"`` stands for.

    Understands lists of numbers, ``+`` between lists and ``*n`` behind one, nothing else; `name` is what errors call
    the text. Raises ValueError for any other text, for more than 10,000 rates, and for a rate outside [0, 1).
    """
    if not isinstance(text, str):
        raise _checks.fail_type(name, "a string", text)
    if len(text) > _MAX_TEXT:
        raise _checks.fail(name, f"at most {_MAX_TEXT} characters long", f"{len(text)} characters")
    reader, rates = _Reader(text, name), list[float]()
    while True:
        group, times = reader.rates(), 1
        while reader.take("*"):
            times = min(times * reader.times(), MAX_RATES + 1)
        if len(rates) + len(group) * times > MAX_RATES:
            raise _checks.fail(name, f"at most {MAX_RATES} rates", "more")
        rates += group * times
        if reader.at_end():
            return check_rates(rates, name=name)
        if not reader.take("+"):
            raise reader.refuse()


def check_rates(rates: Any, *, name: str = "compress_rate") -> list[float]:
    """`rates` as a list of floats in [0, 1). Raises TypeError or ValueError that names the first wrong entry."""
    if not isinstance(rates, Sequence) or isinstance(rates, str | bytes):
        raise _checks.fail_type(name, "a list of rates in [0, 1) or a string such as '[0.]+[0.1]*2'", rates)
    for i, rate in enumerate(rates):
        if isinstance(rate, bool) or not isinstance(rate, int | float):
            raise _checks.fail_type(f"{name}[{i}]", "a number in [0, 1)", rate)
        if not 0 <= rate < 1:
            raise _checks.fail(f"{name}[{i}]", "a rate in [0, 1)", rate)
    return [float(rate) for rate in rates]
