"""A plan survives its JSON, and JSON that is no plan is refused in one sentence, whatever it holds."""

from __future__ import annotations

import contextlib
import json
import os
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastrank import LayerPlan, Plan
from fastrank.plan import FORMAT, LAYER_METHODS, MAX_BYTES, MAX_RANK, VERSION

RANK = st.integers(1, MAX_RANK)
LAYER = st.sampled_from(sorted(LAYER_METHODS)).flatmap(
    lambda method: st.builds(
        LayerPlan,
        st.just(method),
        st.tuples(*[RANK] * LAYER_METHODS[method]),
        st.text(st.characters(codec="utf-8"), max_size=40),
    )
)
VALUE = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**60), 2**60)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)
PLANS = st.builds(
    Plan,
    st.dictionaries(st.text(max_size=20), LAYER, max_size=5),
    st.text(max_size=9),
    st.dictionaries(st.text(max_size=5), VALUE, max_size=3),
)


def text(layers=None, **changes):
    return json.dumps({"format": FORMAT, "version": VERSION, "layers": layers or {}, **changes})


GOOD = text({"a": {"method": "cp", "ranks": [3], "reason": "so"}}, method="norton", options={"rank": 3})


@given(PLANS)
def test_json_round_trip(plan):
    again = Plan.from_json(plan.to_json())
    assert again == plan
    assert list(again.layers) == list(plan.layers)
    assert again == Plan.from_json(plan.to_json().encode())
    assert set(plan.compressed) == {name for name, layer in plan.layers.items() if layer.method != "dense"}


@given(st.text(alphabet=string.printable, max_size=60) | st.binary(max_size=60) | VALUE.map(json.dumps))
def test_nothing_but_a_plan_is_read(found):
    with pytest.raises((ValueError, TypeError), match=r"^plan must "):
        Plan.from_json(found)


@given(st.data())
def test_damaged_plans_are_refused_or_valid(data):
    """A plan with one character changed is read as another plan or refused; nothing else is raised."""
    at = data.draw(st.integers(0, len(GOOD) - 1))
    damaged = GOOD[:at] + data.draw(st.sampled_from(string.printable)) + GOOD[at + 1 :]
    found = None
    with contextlib.suppress(ValueError, TypeError):
        found = Plan.from_json(damaged)
    assert found is None or Plan.from_json(found.to_json()) == found


def test_files_round_trip_and_the_path_is_named_in_errors(tmp_path):
    plan, path = Plan.from_json(GOOD), tmp_path / "plan.json"
    plan.save(path)
    assert Plan.load(path) == plan == Plan.load(os.fspath(path))
    path.write_text("{}")
    with pytest.raises(ValueError, match=r"^.*plan\.json must have the key 'format', got \[\]"):
        Plan.load(path)
    plan.save(path)
    assert Plan.load(path) == plan
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]


def test_a_plan_that_cannot_be_written_leaves_the_old_file(tmp_path):
    path = tmp_path / "plan.json"
    path.write_text(GOOD)
    for options, error in (({"x": object()}, TypeError), ({"x": float("nan")}, ValueError), ({"x": {1, 2}}, TypeError)):
        with pytest.raises(error, match=r"^options must be JSON values, got one that is not"):
            Plan({}, options=options).save(path)
    deep = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(ValueError, match=r"^options must be JSON values"):
        Plan({}, options={"x": deep}).save(path)
    with pytest.raises(OSError, match="absent"):
        Plan({}).save(tmp_path / "absent" / "plan.json")
    assert path.read_text() == GOOD
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]


def test_files_that_are_missing_or_huge(tmp_path):
    for missing in (tmp_path / "none.json", tmp_path):
        with pytest.raises(FileNotFoundError, match=r"^plan must be an existing JSON file, got "):
            Plan.load(missing)
    huge = tmp_path / "huge.json"
    with open(huge, "wb") as file:
        file.truncate(MAX_BYTES + 1)  # sparse: costs nothing unless it is read
    with pytest.raises(ValueError, match=f"^plan must be at most {MAX_BYTES} bytes, got {MAX_BYTES + 1}"):
        Plan.load(huge)


LAYERED = [
    (
        {"method": "tuker2", "ranks": [1, 2]},
        ValueError,
        r"method must be one of .*got 'tuker2' \(did you mean 'tucker2'\?\)",
    ),
    ({"method": ["cp"], "ranks": [1]}, TypeError, r"method must be a str, got list"),
    ({"method": None}, TypeError, r"method must be a str, got NoneType"),
    ({"method": "cp"}, ValueError, r"ranks must be 1 ints for cp, got \[\]"),
    ({"method": "tucker2", "ranks": [1]}, ValueError, r"ranks must be 2 ints for tucker2, got \[1\]"),
    ({"method": "dense", "ranks": [1]}, ValueError, r"ranks must be 0 ints for dense, got \[1\]"),
    ({"method": "cp", "ranks": [0]}, ValueError, r"ranks must be between 1 and 1048576, got 0"),
    ({"method": "cp", "ranks": [-3]}, ValueError, r"ranks must be between 1 and 1048576, got -3"),
    ({"method": "cp", "ranks": [2**60]}, ValueError, r"ranks must be between 1 and 1048576, got 1152921504606846976"),
    ({"method": "cp", "ranks": [True]}, TypeError, r"ranks must be ints, got \(True,\)"),
    ({"method": "cp", "ranks": [1.0]}, TypeError, r"ranks must be ints, got \(1.0,\)"),
    ({"method": "cp", "ranks": 1}, TypeError, r"ranks must be a list of ints, got int"),
    ({"method": "cp", "ranks": "1"}, TypeError, r"ranks must be a list of ints, got str"),
    ({"method": "cp", "ranks": {"0": 1}}, TypeError, r"ranks must be a list of ints, got dict"),
    ({"method": "cp", "ranks": [1], "reason": 5}, TypeError, r"reason must be a str, got int"),
]


@pytest.mark.parametrize(("entry", "error", "message"), LAYERED)
def test_wrong_layers_are_refused_by_name(entry, error, message):
    with pytest.raises(error, match=rf"^plan.layers\['conv1'\]: {message}"):
        Plan.from_json(text({"conv1": entry}))


@pytest.mark.parametrize(
    ("found", "error", "message"),
    [
        ("", ValueError, r"plan must be JSON, got text that is not"),
        (b"\xff\xfe{", ValueError, r"plan must be JSON, got text that is not"),
        (None, TypeError, r"plan must be JSON text, got NoneType"),
        ({}, TypeError, r"plan must be JSON text, got dict"),
        ("[]", TypeError, r"plan must be an object, got list"),
        ("[" * 100_000, ValueError, r"plan must be JSON, got text that is not"),
        ('{"a":' * 100_000, ValueError, r"plan must be JSON, got text that is not"),
        (text().replace("1", "9" * 5000), ValueError, r"plan must be JSON, got text that is not"),
        (text(version=2), ValueError, r"plan.version must be 1, got 2"),
        (text(version=True), ValueError, r"plan.version must be 1, got True"),
        (text(version="1"), ValueError, r"plan.version must be 1, got '1'"),
        (text(format="fastrank-model"), ValueError, r"plan.format must be 'fastrank-plan', got 'fastrank-model'"),
        (text(format=[1]), ValueError, r"plan.format must be 'fastrank-plan', got \[1\]"),
        (text(method=3), TypeError, r"plan.method must be a str, got int"),
        (text(options=[]), TypeError, r"plan.options must be an object, got list"),
        (text().replace("{}", "[]"), TypeError, r"plan.layers must be an object, got list"),
        (text({"a": []}), TypeError, r"plan.layers\['a'\] must be an object, got list"),
        (text({"a": {}}), ValueError, r"plan.layers\['a'\] must have the key 'method', got \[\]"),
        (
            text({"a": {"method": "dense", "rank": 1}}),
            ValueError,
            r"plan.layers\['a'\] must .*unknown key 'rank' \(did you mean 'ranks'\?\)",
        ),
        (text(layer={}), ValueError, r"plan must have the keys .*unknown key 'layer' \(did you mean 'layers'\?\)"),
        (text(options={"a": float("nan")}), ValueError, r"plan must be JSON, .*NaN is no number in JSON"),
        (text(options={"a": float("-inf")}), ValueError, r"plan must be JSON, .*-Infinity is no number in JSON"),
        (
            '{"format":"fastrank-plan","version":1,"layers":{},"layers":{}}',
            ValueError,
            r"plan must be JSON, .*'layers' stands twice",
        ),
        (
            text({"a": {"method": "dense"}}).replace('"a": {', '"a": {"method": "cp", '),
            ValueError,
            r"plan must be JSON, .*'method' stands twice",
        ),
        (" " * (MAX_BYTES + 1), ValueError, rf"plan must be at most {MAX_BYTES} bytes, got {MAX_BYTES + 1}"),
    ],
)
def test_hostile_text_is_refused_in_one_sentence(found, error, message):
    with pytest.raises(error, match=f"^{message}") as caught:
        Plan.from_json(found)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: Plan([]), TypeError, r"layers must be a mapping of layer name to LayerPlan, got list"),
        (lambda: Plan({1: LayerPlan("dense")}), TypeError, r"layers must map str to LayerPlan, got int to LayerPlan"),
        (lambda: Plan({"a": {"method": "dense"}}), TypeError, r"layers must map str to LayerPlan, got str to dict"),
        (lambda: Plan({}, method=None), TypeError, r"method must be a str, got NoneType"),
        (lambda: Plan({}, options=[]), TypeError, r"options must be a mapping, got list"),
        (lambda: LayerPlan("cp", 3), TypeError, r"ranks must be ints, got 3"),
        (lambda: LayerPlan("cp", (1, 2)), ValueError, r"ranks must be 1 ints for cp, got \[1, 2\]"),
        (lambda: LayerPlan(b"cp", (1,)), TypeError, r"method must be a str, got bytes"),
    ],
)
def test_bad_plans_cannot_be_made(call, error, message):
    with pytest.raises(error, match=f"^{message}"):
        call()


def test_plans_cannot_be_changed():
    layer = LayerPlan("cp", [2])
    assert layer.ranks == (2,)
    with pytest.raises(AttributeError):
        layer.ranks = (3,)
    with pytest.raises(AttributeError):
        Plan({}).method = "x"


def test_many_keys_are_checked_for_doubles_quickly():
    keys = ",".join(f'"k{n}":{{"method":"dense"}}' for n in range(50_000))
    with pytest.raises(ValueError, match="'k0' stands twice"):
        Plan.from_json('{"format":"fastrank-plan","version":1,"layers":{' + keys + ',"k0":{"method":"dense"}}}')
