"""Charts as SVG text: sized for a phone's width, coloured by the page's style sheet, readable without a script."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 360, 230
LEFT, RIGHT, TOP, BOTTOM = 56, 12, 10, 36
SERIES, STEPS = 6, 8
"""Colours of the style sheet: s0, s1, ... for series, and e0 to e7 for epochs, the last one the strongest."""
Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """A line: its name, points, and class of the style sheet. area: filled below."""

    name: str
    points: Sequence[Point]
    kind: str
    dashed: bool = False
    area: bool = False


@dataclass(frozen=True)
class Mark:
    """A point of a scatter chart: what it is called beside it and in its tooltip, where it lies, and its class."""

    label: str
    tip: str
    x: float
    y: float
    kind: str


@dataclass(frozen=True)
class Axis:
    """The range of an axis and how its numbers are written."""

    low: float
    high: float
    label: str
    log: bool = False
    whole: bool = False
    text: Callable[[float], str] = lambda value: f"{value:g}"

    def share(self, value: float) -> float:
        """Where a value lies between both ends, 0 to 1."""
        low, high, value = (math.log10(x) if self.log else x for x in (self.low, self.high, max(value, self._floor)))
        return min(max((value - low) / ((high - low) or 1.0), 0.0), 1.0)

    @property
    def _floor(self) -> float:
        return self.low if self.log else -math.inf

    def ticks(self) -> list[float]:
        """Round numbers on the axis, five or so."""
        if self.log:
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            for steps in ((1, 2, 5), (1, 3), (1,)):
                found = [10.0**power * step for power in powers for step in steps]
                found = [value for value in found if self.low * 0.999 <= value <= self.high * 1.001]
                if len(found) <= 6:
                    return found
            return found[:: math.ceil(len(found) / 6)]
        step = nice((self.high - self.low) / 4, (1, 2, 5, 10) if self.whole else (1, 2, 2.5, 5, 10))
        step = max(step, 1.0) if self.whole else step
        first = math.ceil(self.low / step - 1e-9)
        return [round((first + i) * step, 10) for i in range(int((self.high - first * step) / step + 1e-9) + 1)]


def nice(value: float, steps: Sequence[float] = (1, 2, 2.5, 5, 10)) -> float:
    """The next of `steps`, times a power of ten, that is no smaller than about `value`."""
    if not value > 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return power * next((step for step in steps if value <= step * power * 1.001), 10)


def fitted(values: Sequence[float], label: str, *, zero: bool = False, whole: bool = False) -> Axis:
    """An axis around all values, with some air; `zero`: from 0 on; `whole`: of whole numbers, without air."""
    low, high = min(values), max(values)
    if zero:
        low = min(low, 0.0)
    if whole:
        return Axis(low, max(high, low + 1), label, whole=True)
    air = 0.06 * (high - low) or abs(high) * 0.05 or 1.0
    return Axis(low if zero and low == 0 else low - air, high + air, label, text=_short)


def spread(values: Sequence[float], label: str) -> Axis:
    """An axis around positive values, logarithmic where they differ much."""
    low, high = min(values), max(values)
    if low > 0 and high / low > 4:
        return Axis(low / 1.25, high * 1.25, label, log=True, text=_short)
    return Axis(0.0, high * 1.1 or 1.0, label, text=_short)


def lines(title: str, series: Sequence[Series], x: Axis, y: Axis, *, notes: Sequence[float] = ()) -> str:
    """A line chart; notes: places on the x axis that a dotted line marks."""
    parts = []
    for place in notes:
        at = _x(x, place)
        parts.append(f'<line class="note" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
    for each in series:
        if not each.points:
            continue
        places = [(_x(x, a), _y(y, b)) for a, b in each.points]
        tip = f"<title>{escape(each.name)}</title>"
        if len(places) == 1:
            parts.append(
                f'<circle class="dot {each.kind}" cx="{places[0][0]:.1f}" cy="{places[0][1]:.1f}" r="3">{tip}</circle>'
            )
            continue
        path = "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in places)
        if each.area:
            base = HEIGHT - BOTTOM
            parts.append(f'<path class="area {each.kind}" d="{path}V{base}H{places[0][0]:.1f}Z"/>')
        dash = ' stroke-dasharray="5 3"' if each.dashed else ""
        parts.append(f'<path class="line {each.kind}" d="{path}"{dash}>{tip}</path>')
    return _framed(title, x, y, parts)


def scatter(title: str, marks: Sequence[Mark], x: Axis, y: Axis, front: Sequence[Point] = ()) -> str:
    """Points with their labels, those that would overlap left to the tooltip; front: a line behind them."""
    parts = []
    if len(front) > 1:
        path = "M" + "L".join(f"{_x(x, a):.1f} {_y(y, b):.1f}" for a, b in front)
        parts.append(f'<path class="front" d="{path}"/>')
    dots = [(_x(x, mark.x), _y(y, mark.y)) for mark in marks]
    taken = [(a - 5, b - 5, a + 5, b + 5) for a, b in dots]
    for mark, (a, b) in zip(marks, dots, strict=True):
        tip = f"<title>{escape(mark.tip)}</title>"
        parts.append(f'<circle class="mark {mark.kind}" cx="{a:.1f}" cy="{b:.1f}" r="4.5">{tip}</circle>')
        width = 6.4 * len(mark.label)
        right_of, left_of, above, below = a + 7, a - 7 - width, b - 6, b + 14
        for left, baseline in ((right_of, above), (right_of, below), (left_of, above), (left_of, below)):
            box = (left, baseline - 9, left + width, baseline + 2)
            inside = left > LEFT and left + width < WIDTH and baseline > TOP + 8 and baseline < HEIGHT - BOTTOM
            if inside and not any(_overlap(box, other) for other in taken):
                taken.append(box)
                at = f'x="{left:.1f}" y="{baseline:.1f}"'
                parts.append(f'<text class="tag {mark.kind}" {at}>{escape(mark.label)}</text>')
                break
    return _framed(title, x, y, parts)


def heat(title: str, rows: Sequence[tuple[str, Sequence[float]]], columns: Sequence[int], label: str) -> str:
    """Rows of shares in [0, 1] as cells, the stronger the larger; columns: the epochs they stand for."""
    names, right = 96, 8
    tall = 14 if len(rows) <= 24 else 9
    height = TOP + tall * len(rows) + BOTTOM
    wide = (WIDTH - names - right) / max(len(columns), 1)
    parts = []
    for number, (name, values) in enumerate(rows):
        top = TOP + number * tall
        if tall > 10 or number % 2 == 0:
            short = name if len(name) <= 15 else f"…{name[-14:]}"
            parts.append(
                f'<text class="tick" text-anchor="end" x="{names - 6}" y="{top + tall - 3}">{escape(short)}</text>'
            )
        for place, value in enumerate(values):
            step = min(int(value * STEPS), STEPS - 1)
            tip = f"<title>{escape(name)}, epoch {columns[place]}: {100 * value:.0f} %</title>"
            at = f'x="{names + place * wide:.1f}" y="{top}" width="{wide + 0.3:.1f}" height="{tall - 1}"'
            parts.append(f'<rect class="cell e{step}" {at}>{tip}</rect>')
    for place in sorted({0, len(columns) // 2, len(columns) - 1}):
        centre = names + (place + 0.5) * wide
        spot = f'x="{centre:.1f}" y="{height - 20}"'
        parts.append(f'<text class="tick" text-anchor="middle" {spot}>{columns[place]}</text>')
    middle = names + (WIDTH - names - right) / 2
    parts.append(f'<text class="name" text-anchor="middle" x="{middle:.0f}" y="{height - 5}">{escape(label)}</text>')
    return _svg(title, parts, height)


def _framed(title: str, x: Axis, y: Axis, parts: Sequence[str]) -> str:
    """The parts inside a frame: grid, ticks, and names of both axes."""
    floor = HEIGHT - BOTTOM
    frame = [f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{floor}" y2="{floor}"/>']
    for tick in y.ticks():
        at = _y(y, tick)
        frame.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        frame.append(
            f'<text class="tick" text-anchor="end" x="{LEFT - 6}" y="{at + 3.5:.1f}">{escape(y.text(tick))}</text>'
        )
    for tick in x.ticks():
        at = _x(x, tick)
        frame.append(
            f'<text class="tick" text-anchor="middle" x="{at:.1f}" y="{floor + 14}">{escape(x.text(tick))}</text>'
        )
    middle = (LEFT + WIDTH - RIGHT) / 2
    frame.append(f'<text class="name" text-anchor="middle" x="{middle:.0f}" y="{HEIGHT - 5}">{escape(x.label)}</text>')
    up = (TOP + floor) / 2
    turned = f'transform="rotate(-90 10 {up:.0f})"'
    frame.append(f'<text class="name" text-anchor="middle" x="10" y="{up:.0f}" {turned}>{escape(y.label)}</text>')
    return _svg(title, [*frame, *parts], HEIGHT)


def _svg(title: str, parts: Sequence[str], height: float) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'


def _x(axis: Axis, value: float) -> float:
    return LEFT + axis.share(value) * (WIDTH - LEFT - RIGHT)


def _y(axis: Axis, value: float) -> float:
    return HEIGHT - BOTTOM - axis.share(value) * (HEIGHT - TOP - BOTTOM)


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _short(value: float) -> str:
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= limit:
            return f"{value / {'G': 1e9, 'M': 1e6, 'k': 1e3}[unit]:.3g}{unit}"
    return f"{value:.4g}"
