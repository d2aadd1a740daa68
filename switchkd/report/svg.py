"""A chart as inline SVG: axes, lines, bands and bars. Colours are classes of style.css.

Every chart has the size of a column of the page, so its text stays readable on a phone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from markupsafe import Markup, escape

WIDTH, HEIGHT = 440, 250
LEFT, RIGHT, TOP, BOTTOM = 46, 14, 26, 36
_UP = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def number(value: float) -> str:
    """A number of a label: four digits, thousands separated."""
    if value == 0 or 1e-3 <= abs(value) < 1e7:
        text = f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
        return text
    return f"{value:.2g}"


def linear_ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers between low and high, a step of 1, 2 or 5 times a power of ten apart."""
    rough = (high - low) / most
    power = 10 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    count = math.floor(high / step + 1e-9) - first + 1
    return [round((first + i) * step, 12) for i in range(count)]


def log_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Powers of ten between low and high, some left out if there are many."""
    first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
    every = max(1, math.ceil((last - first + 1) / most))
    return [10.0**k for k in range(first, last + 1) if k % every == 0]


def padded(values: Sequence[float], zero: bool = False) -> tuple[float, float]:
    """A range with a margin around the values; from 0 if asked for."""
    low, high = min(values), max(values)
    margin = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    return (0.0 if zero and low >= 0 else low - margin), high + margin


class Chart:
    """x, y: ranges of the axes, low < high (both > 0 on a log axis); label: the chart in words."""

    def __init__(
        self, x: tuple[float, float], y: tuple[float, float], *,
        x_label: str, y_label: str, label: str,
        log_x: bool = False, log_y: bool = False, percent: bool = False,
    ):  # fmt: skip
        self.x, self.y, self.log_x, self.log_y = x, y, log_x, log_y
        self.x_label, self.y_label, self.label, self.percent = x_label, y_label, label, percent
        self.marks: list[str] = []

    @staticmethod
    def _scale(value: float, ends: tuple[float, float], log: bool) -> float:
        if log:
            value, ends = math.log10(max(value, 1e-300)), tuple(map(math.log10, ends))
        return (value - ends[0]) / (ends[1] - ends[0])

    def _x(self, value: float) -> float:
        part = self._scale(value, self.x, self.log_x)
        return round(LEFT + (WIDTH - LEFT - RIGHT) * part, 1)

    def _y(self, value: float) -> float:
        part = self._scale(value, self.y, self.log_y)
        y = TOP + (HEIGHT - TOP - BOTTOM) * (1 - part)
        return round(min(max(y, -1e4), 1e4), 1)  # far outside is outside; clipped below

    def line(self, points, css: str, *, dots: bool = False, unit: str = "") -> None:
        """A line through (x, y); a break at NaN. dots: marks with the values as their titles."""
        path, pen = [], "M"
        for x, y in points:
            if math.isnan(y):
                pen = "M"
                continue
            path.append(f"{pen}{self._x(x)},{self._y(y)}")
            pen = "L"
        self.marks.append(f'<path class="line {css}" d="{"".join(path)}"/>')
        for x, y in [p for p in points if dots and not math.isnan(p[1])]:
            value = f"{100 * y:.3g} %" if self.percent else f"{number(y)} {unit}".rstrip()
            self.marks.append(
                f'<circle class="dot {css}" cx="{self._x(x)}" cy="{self._y(y)}" r="3">'
                f"<title>{escape(f'{number(x)}: {value}')}</title></circle>"
            )

    def band(self, points, css: str) -> None:
        """The area between low and high of (x, low, high); points with a NaN are left out."""
        points = [p for p in points if not any(map(math.isnan, p))]
        upper = [f"{self._x(x)},{self._y(high)}" for x, _, high in points]
        lower = [f"{self._x(x)},{self._y(low)}" for x, low, _ in reversed(points)]
        self.marks.append(f'<polygon class="band {css}" points="{" ".join(upper + lower)}"/>')

    def bar(self, x: tuple[float, float], y: tuple[float, float], css: str, title: str) -> None:
        left, right, top, bottom = self._x(x[0]), self._x(x[1]), self._y(y[1]), self._y(y[0])
        gap = 0.5 if right - left > 3 else 0
        self.marks.append(
            f'<rect class="bar {css}" x="{left + gap}" y="{top}" '
            f'width="{max(0.5, right - left - 2 * gap):.1f}" height="{max(0, bottom - top):.1f}">'
            f"<title>{escape(title)}</title></rect>"
        )

    def _axes(self) -> str:
        right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
        out = []
        for value in self._ticks(self.y, self.log_y):
            y = self._y(value)
            out.append(f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{y}" y2="{y}"/>')
            text = f"{100 * value:g} %" if self.percent else self._tick(value, self.log_y)
            out.append(f'<text class="tick" x="{LEFT - 6}" y="{y + 4}" {_END}>{text}</text>')
        for value in self._ticks(self.x, self.log_x):
            x, text = self._x(value), self._tick(value, self.log_x)
            out.append(f'<line class="axis" x1="{x}" x2="{x}" y1="{bottom}" y2="{bottom + 4}"/>')
            out.append(f'<text class="tick" x="{x}" y="{bottom + 16}" {_MIDDLE}>{text}</text>')
        out.append(f'<line class="axis" x1="{LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}"/>')
        out.append(f'<text class="label" x="4" y="14">{escape(self.y_label)}</text>')
        middle = (LEFT + right) / 2
        out.append(
            f'<text class="label" x="{middle}" y="{HEIGHT - 4}" {_MIDDLE}>'
            f"{escape(self.x_label)}</text>"
        )
        return "".join(out)

    @staticmethod
    def _ticks(ends: tuple[float, float], log: bool) -> list[float]:
        decades = log_ticks(*ends) if log else []
        return decades if len(decades) > 1 else linear_ticks(*ends)

    @staticmethod
    def _tick(value: float, log: bool) -> str:
        power = math.log10(value) if log else 0.0
        if abs(power) > 2.5 and abs(power - round(power)) < 1e-9:
            return "10" + str(round(power)).translate(_UP)
        return number(value)

    def svg(self) -> Markup:
        """The drawing; what lies outside the axes is clipped by the inner svg."""
        left, top = LEFT - 4, TOP - 4  # whole dots at the ends
        width, height = WIDTH - left - RIGHT + 4, HEIGHT - top - BOTTOM + 4
        box = f'x="{left}" y="{top}" width="{width}" height="{height}"'
        return Markup(
            f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
            f'aria-label="{escape(self.label)}">{self._axes()}'
            f'<svg {box} viewBox="{left} {top} {width} {height}">{"".join(self.marks)}</svg></svg>'
        )


_END, _MIDDLE = 'text-anchor="end"', 'text-anchor="middle"'
