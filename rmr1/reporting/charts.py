"""The report's drawings as inline SVG: curves over steps, and dots with error bars.

Colours and strokes come from classes that the page's style sheet defines, so one drawing serves
the light scheme, the dark one and print. Geometry is in user units of the viewBox, y downwards.
Every text passes through markupsafe, which escapes it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

WIDTH, HEIGHT = 340.0, 194.0
LEFT, RIGHT, TOP, BOTTOM = 46.0, 12.0, 24.0, 36.0
# More points than pixels only make the file heavy: longer curves are averaged in buckets.
MAX_POINTS = 600
# From here on a noisy curve is drawn thin, under its moving mean.
SMOOTH_FROM = 40

Point = tuple[float, float | None]


@dataclass(frozen=True, slots=True)
class Series:
    """One curve: (step, value) in order of steps; None where a step has no finite value."""

    name: str
    points: tuple[Point, ...]

    @property
    def values(self) -> list[float]:
        """The finite values."""
        return [value for _, value in self.points if value is not None]


@dataclass(frozen=True, slots=True)
class Scale:
    """A linear map from data [low, high] to drawing units [start, end]."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """The position of a value."""
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


@dataclass(frozen=True, slots=True)
class Interval:
    """A row of dots with error bars: values and bounds between 0 and 1, None where unknown."""

    name: str
    style: str
    value: float | None
    bounds: tuple[float, float] | None
    parsed_value: float | None
    parsed_bounds: tuple[float, float] | None


def figure(value: float | None) -> str:
    """A number for reading: three significant digits, thousands grouped, a dash for None."""
    if value is None or not math.isfinite(value):
        return "–"
    size = abs(value)
    if size >= 100:
        text = f"{value:,.0f}"
    elif size >= 1e-3 or size == 0:
        digits = 2 if size == 0 else max(0, 2 - math.floor(math.log10(size)))
        text = f"{value:.{digits}f}"
    else:
        mantissa, exponent = f"{value:.1e}".split("e")
        text = f"{mantissa}e{int(exponent)}"
    return text.replace("-", "−")


def nice_ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers (1, 2, 2.5 or 5 times a power of ten) inside [low, high], about `count`."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def tick_labels(ticks: Sequence[float]) -> list[str]:
    """Labels of equally spaced ticks, all with the same number of decimals."""
    step = ticks[1] - ticks[0] if len(ticks) > 1 else max(abs(ticks[0]), 1.0)
    if step < 1e-3:
        return [f"{tick:.2g}".replace("e-0", "e-").replace("-", "−") for tick in ticks]
    decimals = next((d for d in range(5) if abs(round(step, d) - step) < step * 1e-6), 5)
    return [f"{tick:,.{decimals}f}".replace("-", "−") for tick in ticks]


def thinned(points: Sequence[Point], limit: int = MAX_POINTS) -> tuple[tuple[Point, ...], int]:
    """At most `limit` points, each the mean of a bucket of steps, and the size of a bucket."""
    size = max(1, math.ceil(len(points) / limit))
    if size == 1:
        return tuple(points), 1
    result: list[Point] = []
    for start in range(0, len(points), size):
        bucket = points[start : start + size]
        values = [value for _, value in bucket if value is not None]
        result.append((bucket[-1][0], sum(values) / len(values) if values else None))
    return tuple(result), size


def moving_mean(points: Sequence[Point]) -> tuple[Point, ...]:
    """The centred mean over about a tenth of the curve; None stays where no value was."""
    reach = max(2, len(points) // 20)
    result: list[Point] = []
    for index, (step, value) in enumerate(points):
        # The window shrinks towards both ends: a one-sided one would lag behind the curve.
        half = min(reach, index, len(points) - 1 - index)
        near = [v for _, v in points[index - half : index + half + 1] if v is not None]
        result.append((step, None if value is None else sum(near) / len(near)))
    return tuple(result)


def is_noisy(points: Sequence[Point]) -> bool:
    """Whether a curve is long and rough enough that a moving mean helps to read it."""
    values = [value for _, value in points if value is not None]
    if len(values) < SMOOTH_FROM:
        return False
    rough = [
        abs(value - mean)
        for (_, value), (_, mean) in zip(points, moving_mean(points), strict=True)
        if value is not None and mean is not None
    ]
    return sum(rough) / len(rough) > 0.025 * (max(values) - min(values))


def _path(points: Sequence[Point], x: Scale, y: Scale) -> str:
    """Path data of a curve; a missing value lifts the pen."""
    parts: list[str] = []
    pen_down = False
    for step, value in points:
        if value is None:
            pen_down = False
            continue
        parts.append(f"{'L' if pen_down else 'M'}{x(step):.1f} {y(value):.1f}")
        pen_down = True
    return "".join(parts)


def _lone_points(points: Sequence[Point]) -> list[tuple[float, float]]:
    """Points without a drawn neighbour: a path of one point is invisible, so they get a dot."""
    lone = []
    for index, (step, value) in enumerate(points):
        before = points[index - 1][1] if index else None
        after = points[index + 1][1] if index + 1 < len(points) else None
        if value is not None and before is None and after is None:
            lone.append((step, value))
    return lone


def _scales(series: Sequence[Series], unit: str, from_zero: bool) -> tuple[Scale, Scale]:
    """The scales of a chart that hold every point of every series."""
    steps = [step for one in series for step, value in one.points if value is not None]
    values = [value for one in series for value in one.values]
    first, last = min(steps), max(steps)
    if first == last:
        first, last = first - 1, last + 1
    low, high = min(values), max(values)
    zero = from_zero and low >= 0
    if zero:
        low = 0.0
    margin = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    top = high + margin
    if unit.startswith("%") and high <= 100:
        top = min(top, 100.0)  # There is nothing above 100 %.
    bottom = low if zero else low - margin
    return Scale(first, last, LEFT, WIDTH - RIGHT), Scale(bottom, top, HEIGHT - BOTTOM, TOP)


def _axes(x: Scale, y: Scale, unit: str, x_label: str) -> Markup:
    """Grid lines, tick labels and the names of both axes."""
    parts = []
    ticks = nice_ticks(y.low, y.high)
    for tick, label in zip(ticks, tick_labels(ticks), strict=True):
        parts.append(
            Markup(
                '<line class="grid" x1="{:.1f}" x2="{:.1f}" y1="{:.1f}" y2="{:.1f}"/>'
                '<text class="tick end" x="{:.1f}" y="{:.1f}">{}</text>'
            ).format(x.start, x.end, y(tick), y(tick), x.start - 6, y(tick) + 3.5, label)
        )
    # Steps are whole numbers, and so are their ticks.
    ticks = [tick for tick in nice_ticks(x.low, x.high, 5) if tick == int(tick)]
    for tick in ticks:
        parts.append(
            Markup('<text class="tick mid" x="{:.1f}" y="{:.1f}">{}</text>').format(
                x(tick), y.start + 14, f"{int(tick):,}"
            )
        )
    parts.append(
        Markup(
            '<line class="axis" x1="{:.1f}" x2="{:.1f}" y1="{:.1f}" y2="{:.1f}"/>'
            '<text class="unit" x="0" y="10">{}</text>'
            '<text class="unit mid" x="{:.1f}" y="{:.1f}">{}</text>'
        ).format(x.start, x.end, y.start, y.start, unit, (x.start + x.end) / 2, HEIGHT - 5, x_label)
    )
    return Markup("").join(parts)


def _curve(points: Sequence[Point], colour: int, x: Scale, y: Scale) -> Markup:
    """One curve, its moving mean where it is noisy, its lone points and its last point."""
    smooth = is_noisy(points)
    parts = [
        Markup('<path class="line c{} {}" d="{}"/>').format(
            colour, "raw" if smooth else "main", _path(points, x, y)
        )
    ]
    if smooth:
        path = _path(moving_mean(points), x, y)
        parts.append(Markup('<path class="line c{} main" d="{}"/>').format(colour, path))
    last = [(step, value) for step, value in points if value is not None][-1:]
    dots = _lone_points(points) + ([] if smooth else last)
    for step, value in dict.fromkeys(dots):
        parts.append(
            Markup('<circle class="dot c{}" cx="{:.1f}" cy="{:.1f}" r="2.6"/>').format(
                colour, x(step), y(value)
            )
        )
    return Markup("").join(parts)


def _hover_data(series: Sequence[Series], x: Scale, y: Scale, unit: str) -> str:
    """What the page's script needs: [x, "step", [[y, "value"] or null for each series]]."""
    by_step: dict[float, list[list[object] | None]] = {}
    for index, one in enumerate(series):
        for step, value in one.points:
            if value is None:
                continue
            row = by_step.setdefault(step, [None] * len(series))
            row[index] = [round(y(value), 1), reading(value, unit)]
    return json.dumps(
        [[round(x(step), 1), f"{step:,.0f}", by_step[step]] for step in sorted(by_step)],
        ensure_ascii=False,
        separators=(",", ":"),
    )


def reading(value: float | None, unit: str) -> str:
    """A value as the chart's heading shows it; the percent sign is the only unit repeated."""
    return figure(value) + (" %" if unit.startswith("%") and value is not None else "")


def line_chart(
    title: str, unit: str, series: Sequence[Series], *, from_zero: bool = True
) -> Markup:
    """A figure with one curve per series over steps, or a note when no value is finite.

    `unit` names the y axis; an axis of values that are not negative starts at 0 with `from_zero`.
    """
    bucket = max((thinned(one.points)[1] for one in series), default=1)
    series = [Series(one.name, thinned(one.points)[0]) for one in series if one.values]
    if not series:
        return Markup(
            '<figure class="card chart empty"><figcaption><b>{}</b></figcaption>'
            "<p>Not recorded.</p></figure>"
        ).format(title)
    x, y = _scales(series, unit, from_zero)
    curves = Markup("").join(_curve(one.points, i, x, y) for i, one in enumerate(series))
    readings = Markup("").join(
        Markup('<span class="reading c{}">{}<output>{}</output></span>').format(
            i, one.name + " " if len(series) > 1 else "", reading(one.values[-1], unit)
        )
        for i, one in enumerate(series)
    )
    steps = [step for one in series for step, value in one.points if value is not None]
    x_label = "step" if bucket == 1 else f"step (each point: mean of {bucket} steps)"
    return Markup(
        '<figure class="card chart"><figcaption><b>{}</b><span class="readings">'
        '<span class="when">step <output>{}</output></span>{}</span></figcaption>'
        '<svg viewBox="0 0 {:.0f} {:.0f}" role="img" aria-label="{}" data-hover="{}">{}{}'
        '<line class="cross" y1="{:.1f}" y2="{:.1f}"/></svg></figure>'
    ).format(
        title,
        f"{max(steps):,.0f}",
        readings,
        WIDTH,
        HEIGHT,
        f"{title} over steps, {unit}",
        _hover_data(series, x, y, unit),
        _axes(x, y, unit, x_label),
        curves,
        y.end,
        y.start,
    )


def _error_bar(
    value: float | None, bounds: tuple[float, float] | None, x: Scale, y: float, style: str
) -> Markup:
    """A dot with its interval; nothing for an unknown value."""
    if value is None:
        return Markup("")
    bar = Markup("")
    if bounds is not None:
        low, high = x(bounds[0]), x(bounds[1])
        bar = Markup(
            '<path class="whisker {}" d="M{:.1f} {:.1f}H{:.1f}M{:.1f} {:.1f}v6M{:.1f} {:.1f}v6"/>'
        ).format(style, low, y, high, low, y - 3, high, y - 3)
    dot = Markup('<circle class="mark {}" cx="{:.1f}" cy="{:.1f}" r="4.5"/>')
    return bar + dot.format(style, x(value), y)


def interval_chart(rows: Sequence[Interval]) -> Markup:
    """Accuracies as dots with 95% intervals: filled over all pairs, hollow among parsed ones."""
    width, row_height, top = 460.0, 46.0, 26.0
    x = Scale(0.0, 1.0, 78.0, width - 16)
    floor = top + row_height * len(rows)
    parts = []
    for percent in (0, 25, 50, 75, 100):
        style = "chance" if percent == 50 else "grid"
        parts.append(
            Markup(
                '<line class="{}" x1="{:.1f}" x2="{:.1f}" y1="{:.1f}" y2="{:.1f}"/>'
                '<text class="tick mid" x="{:.1f}" y="{:.1f}">{}</text>'
            ).format(style, x(percent / 100), x(percent / 100), top - 6, floor, x(percent / 100),
                     floor + 15, f"{percent} %")
        )  # fmt: skip
    parts.append(Markup('<text class="unit mid" x="{:.1f}" y="12">chance</text>').format(x(0.5)))
    for index, row in enumerate(rows):
        y = top + row_height * (index + 0.5) - 3
        parts.append(
            Markup('<text class="name end" x="{:.1f}" y="{:.1f}">{}</text>').format(
                x.start - 12, y + 4, row.name
            )
        )
        parts.append(_error_bar(row.value, row.bounds, x, y - 7, row.style))
        parts.append(
            _error_bar(row.parsed_value, row.parsed_bounds, x, y + 7, row.style + " hollow")
        )
    return Markup('<svg viewBox="0 0 {:.0f} {:.0f}" role="img" aria-label="{}">{}</svg>').format(
        width,
        floor + 24,
        "Accuracy with 95% intervals; dashed line: chance",
        Markup("").join(parts),
    )
