"""Changes to valid files: of bytes, of the tokens of a text, and of the values within a JSON or YAML document."""

from __future__ import annotations

import json
import random
from typing import Any

import yaml

from fastrank.recipe import _parse

TOKENS = (
    *(
        b"-1",
        b"0",
        b"1e999",
        b"-1e999",
        b"NaN",
        b"Infinity",
        b"1e-400",
        b"9" * 400,
        b"9" * 5000,
        b"true",
        b"null",
        b"{}",
    ),
    *(b"[]", b'""', b"1.0", b"-0.0", b"4294967296", b"9223372036854775808", b"18446744073709551616", b"../x", b"/etc"),
    *(b"\x00", b"\xff", b"\xef\xbb\xbf", b"\r\n", b'"\\ud800"', b"\xed\xa0\x80", b"\\u0000", b"[" * 50, b'{"a":' * 50),
    *(
        b"&a [x]\n",
        b"*a",
        b"<<: *a",
        b"!!int ''",
        b"!!bool x",
        b"!!timestamp x",
        b"!!python/name:os.system",
        b"? ",
        b"- ",
    ),
    *(b"0x" + b"f" * 300, b"1:1:1:1", b"2001-13-01", b"]*9999999999", b"+", b"*", b",", b"__class__", b"huge"),
)
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 2**31, 2**32, 2**62, 2**63, 2**64, -(2**63), 10**30, 10**400, 0.0, -0.5, 0.5),
    *(1e300, 1e-300, float("inf"), float("-inf"), float("nan"), "", "x", "../../x", "/etc/passwd", "a\x00b", "\ud800"),
    *("7" * 99, "é", [], [0], [1, 2], [-1, 2], [2**40, 2**40], [[[]]], {}, {"a": 1}, {"__tensor__": "x"}, [None]),
    *(
        {"__tensor__": []},
        "inf",
        "nan",
        "auto",
        "sequence",
        "same",
        [1e308, 1e308],
        "timm:resnet18",
        "torchvision:vgg11",
    ),
)


def mutate(payload: bytes, draw: random.Random) -> bytes:
    """A changed copy; the kind of change is drawn, among documents, tokens and bytes."""
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        payload = draw.choice((_document, _document, _token, _bits, _shorter, _repeated, _number))(payload, draw)
    return payload


def _document(payload: bytes, draw: random.Random) -> bytes:
    """One value of a JSON or YAML document replaced, removed, doubled or moved; other payloads get a token."""
    found, dump = _parsed(payload)
    if not isinstance(found, dict | list):
        return _token(payload, draw)
    places = _places(found)
    holder, key = draw.choice(places)
    kind = draw.randrange(8)
    if kind == 0 and isinstance(holder, dict):
        del holder[key]
    elif kind == 1 and isinstance(holder, dict):
        holder[draw.choice(("x", "", "device", "dtype", "extends", "__class__", "rank", "backend"))] = holder[key]
    elif kind == 2:
        other, name = draw.choice(places)
        if not _holds(holder[key], other):
            other[name] = holder[key]
    elif kind == 3 and isinstance(holder[key], str):
        holder[key] = draw.choice((holder[key] * 2, holder[key][:-1], holder[key].upper(), holder[key] + "x"))
    elif kind == 4 and type(holder[key]) in (int, float):
        holder[key] = draw.choice(
            (holder[key] + 1, holder[key] - 1, -holder[key], float(holder[key]), str(holder[key]))
        )
    else:
        holder[key] = draw.choice(VALUES)
    return dump(found)


def _parsed(payload: bytes) -> tuple[Any, Any]:
    """The document in `payload` and what writes it back; None where there is none."""
    try:
        return json.loads(payload), lambda found: json.dumps(found).encode()
    except (ValueError, RecursionError):
        pass
    if payload[:1] in b"\x00\x80PK" or len(payload) > 4000:
        return None, None
    try:
        found = yaml.load(payload, _parse._Loader)  # without aliases, of which a walk would never end
    except _parse._YAML_ERRORS:
        return None, None
    return found, lambda found: yaml.safe_dump(found, sort_keys=False).encode("utf-8", "replace")


def _places(found: Any) -> list[tuple[Any, Any]]:
    """(container, key) of every value."""
    places: list[tuple[Any, Any]] = [([found], 0)]
    for holder in (todo := [found]):
        items = holder.items() if isinstance(holder, dict) else enumerate(holder)
        for key, value in items:
            places.append((holder, key))
            if isinstance(value, dict | list) and value:
                todo.append(value)
    return places


def _holds(value: Any, holder: Any) -> bool:
    return (
        value is holder or any(inner is holder for inner, _ in _places(value))
        if isinstance(value, dict | list)
        else False
    )


def _token(payload: bytes, draw: random.Random) -> bytes:
    at = draw.randrange(len(payload) + 1)
    return payload[:at] + draw.choice(TOKENS) + payload[at + draw.choice((0, 0, 1, 4)) :]


def _bits(payload: bytes, draw: random.Random) -> bytes:
    if not payload:
        return b"\x01"
    found = bytearray(payload)
    # Headers lie at both ends of the small files here.
    at = draw.randrange(len(found)) if draw.random() < 0.5 else min(draw.randrange(64), len(found) - 1)
    found[at] = draw.choice((found[at] ^ (1 << draw.randrange(8)), 0, 255, 0x7F, 0x80, draw.randrange(256)))
    return bytes(found)


def _shorter(payload: bytes, draw: random.Random) -> bytes:
    first, second = sorted(draw.randrange(len(payload) + 1) for _ in range(2))
    return draw.choice((payload[:first], payload[first:], payload[:first] + payload[second:]))


def _repeated(payload: bytes, draw: random.Random) -> bytes:
    first, second = sorted(draw.randrange(len(payload) + 1) for _ in range(2))
    return payload[:second] + payload[first:second] * draw.choice((1, 2, 40)) + payload[second:]


def _number(payload: bytes, draw: random.Random) -> bytes:
    """A number of one to eight bytes, of either order, at the edge of what that many hold."""
    size = draw.choice((1, 2, 4, 8, 12))
    value = draw.choice((0, 1, 2 ** (8 * size) - 1, 2 ** (8 * size - 1), 2 ** (8 * size - 1) - 1, 1 << 20))
    at = draw.randrange(max(len(payload) - size, 0) + 1)
    return (
        payload[:at] + (value % 2 ** (8 * size)).to_bytes(size, draw.choice(("big", "little"))) + payload[at + size :]
    )
