"""Rate lists in the NORTON spelling: what they stand for, and that no text can do more than be refused."""

from __future__ import annotations

import contextlib
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastrank.models.rates import MAX_RATES, check_rates, parse_rates

RATES = st.lists(st.floats(0, 1, exclude_max=True), max_size=6)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[0.6]*6+[0.8]*7", [0.6] * 6 + [0.8] * 7),
        ("[0.]+[0.18]*29", [0.0] + [0.18] * 29),
        ("[0.]+[0.1]*2+[0.4]*5+[0.75]*12", [0.0] + [0.1] * 2 + [0.4] * 5 + [0.75] * 12),
        (" [ 0.1 , .25 ,0 ] * 2 + [ 1e-3 ] ", [0.1, 0.25, 0.0, 0.1, 0.25, 0.0, 0.001]),
        ("[0.5]*2*3", [0.5] * 6),
        ("[0.5]*0+[]+[0.1]", [0.1]),
        ("[]", []),
    ],
)
def test_spelling(text, expected):
    assert parse_rates(text) == expected


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(RATES, st.integers(0, 5)), min_size=1, max_size=6))
def test_round_trip(groups):
    text = "+".join(f"{values}*{times}" for values, times in groups)
    assert parse_rates(text) == [rate for values, times in groups for rate in values * times]
    assert parse_rates(str(parse_rates(text))) == parse_rates(text)


@settings(max_examples=500, deadline=None)
@given(st.text(max_size=200) | st.text("[]0123456789.,+*eE- \n_", max_size=200))
def test_any_text_is_parsed_or_refused_with_value_error(text):
    rates = []
    with contextlib.suppress(ValueError):
        rates = parse_rates(text)
    assert len(rates) <= MAX_RATES
    assert all(0 <= rate < 1 for rate in rates)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "0.1",
        "[0.1",
        "[0.1,]",
        "[0.1]+",
        "[0.1]*",
        "[0.1]*-2",
        "[0.1]*1.5",
        "[0.1]*1e3",
        "2*[0.1]",
        "[0.1]-[0.2]",
        "[0.1 0.2]",
        "[[0.1]]",
        "[0.1+0.2]",
        "[0.1]**2",
        "[nan]",
        "[inf]",
        "[1_0]",
        "[٠]",
        "__import__('os').system('true')",
        "[0.1 for _ in range(9)]",
        "[0." + "1" * 100 + "]",
    ],
)
def test_other_text_is_refused(text):
    with pytest.raises(ValueError, match=r"^compress_rate must be lists of numbers .* got .*wrong at character \d+"):
        parse_rates(text)


@pytest.mark.parametrize("rate", ["1", "1.0", "-0.1", "1e999", "2e0"])
def test_rates_outside_the_interval_are_named(rate):
    with pytest.raises(ValueError, match=r"compress_rate\[1\] must be a rate in \[0, 1\), got"):
        parse_rates(f"[0, {rate}]")


def test_length_is_bounded():
    assert len(parse_rates(f"[0.1]*{MAX_RATES}")) == MAX_RATES
    with pytest.raises(ValueError, match="at most 10000 rates"):
        parse_rates(f"[0.1]*{MAX_RATES + 1}")
    with pytest.raises(ValueError, match="at most 10000 rates"):
        parse_rates("[0.1]*9999*9999*9999*" + "9" * 60)


@pytest.mark.parametrize(
    "text",
    [
        "[" * 300_000,
        " " * 300_000,
        "[" + " " * 300_000,
        "1" * 300_000,
        "[0.1]" + "*9" * 100_000,
        "[]+" * 100_000,
        "[" + "0," * 100_000,
        "[]" + "*0" * 100_000 + "*",
        "[0" + "0" * 300_000,
        "[0.1]" * 60_000,
        "x" * 10_000_000,
    ],
    ids=lambda text: text[:8],
)
def test_long_hostile_text_ends_soon(text):
    start = time.perf_counter()
    with pytest.raises(ValueError, match="compress_rate must be") as caught:
        parse_rates(text)
    assert time.perf_counter() - start < 2
    assert len(str(caught.value)) < 300


def test_types():
    with pytest.raises(TypeError, match="compress_rate must be a string, got list"):
        parse_rates([0.1])
    with pytest.raises(TypeError, match="compress_rate must be a list of rates"):
        check_rates(0.5)
    with pytest.raises(TypeError, match=r"compress_rate\[1\] must be a number in \[0, 1\), got bool"):
        check_rates([0.1, True])
    with pytest.raises(ValueError, match=r"cpr\[0\] must be a rate in \[0, 1\), got nan"):
        check_rates([float("nan")], name="cpr")
    assert check_rates((0, 0.5)) == [0.0, 0.5]
