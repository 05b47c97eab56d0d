"""The plot of `size_study.py`: accuracy of each arm against the number of parameters."""

from __future__ import annotations

import math
from collections.abc import Sequence

import harness
from markupsafe import Markup

from rmr1.reporting.charts import Scale, nice_ticks, tick_labels

LEFT, RIGHT, TOP, BOTTOM, WIDE, HIGH = 44.0, 420.0, 34.0, 300.0, 560, 340
COLOURS = {"base": "#8792a0", "distilled": "#c9820a", "rm_r1": "#0b62c4"}
NAMES = {"base": "base", "distilled": "distilled", "rm_r1": "distilled, then RL"}
STYLE = """
svg { background: #fff; } text { font: 12px system-ui, sans-serif; fill: #1c2430; }
.end { text-anchor: end; } .mid { text-anchor: middle; } .tick { fill: #55606e; font-size: 10px; }
.grid { stroke: #e3e7ec; } polyline { fill: none; stroke-width: 1.6; } circle.ring { fill: #fff; }
.bar { stroke-opacity: .3; stroke-width: 6; }
"""
NOTE = "Accuracy in percent: dots over all seeds, rings each seed, bars the gain's 95% interval"


def plot(rows: Sequence[harness.Row]) -> str:
    """An SVG; the axis of parameters is logarithmic."""
    values = [100 * value for row in rows for value in (*row["accuracy_by_seed"], row["accuracy"])]
    low, high = min(48.0, min(values) - 2), max(values) + 3
    counts = sorted({row["parameters"] for row in rows})
    x = Scale(math.log(counts[0]) - 0.2, math.log(counts[-1]) + 0.2, LEFT, RIGHT)
    y = Scale(low, high, BOTTOM, TOP)
    parts = [Markup('<text x="10" y="16">{}</text>').format(NOTE)]
    ticks = nice_ticks(low, high, 6)
    for value, label in zip(ticks, tick_labels(ticks), strict=True):
        parts.append(
            Markup(
                '<line class="grid" x1="{0}" x2="{1}" y1="{2:.1f}" y2="{2:.1f}"/>'
                '<text class="tick end" x="{3}" y="{4:.1f}">{5}</text>'
            ).format(LEFT, RIGHT, y(value), LEFT - 6, y(value) + 3, label)
        )
    for count in counts:
        parts.append(
            Markup('<text class="tick mid" x="{:.1f}" y="{}">{:.2f} M</text>').format(
                x(math.log(count)), BOTTOM + 16, count / 1e6
            )
        )
    parts.append(
        Markup('<text class="tick mid" x="{}" y="{}">parameters</text>').format(
            (LEFT + RIGHT) / 2, BOTTOM + 32
        )
    )
    for arm in COLOURS:
        own = sorted((r for r in rows if r["arm"] == arm), key=lambda row: row["parameters"])
        if own:
            parts.append(_curve(arm, own, x, y))
    size = Markup('viewBox="0 0 {} {}"').format(WIDE, HIGH)
    return str(
        Markup('<svg xmlns="http://www.w3.org/2000/svg" {}><style>{}</style>{}</svg>\n').format(
            size, Markup(STYLE), Markup("").join(parts)
        )
    )


def _curve(arm: str, rows: Sequence[harness.Row], x: Scale, y: Scale) -> Markup:
    colour = COLOURS[arm]
    middle = [(x(math.log(row["parameters"])), y(100 * row["accuracy"])) for row in rows]
    points = " ".join(f"{across:.1f},{up:.1f}" for across, up in middle)
    found = [Markup('<polyline stroke="{}" points="{}"/>').format(colour, points)]
    for row, (across, up) in zip(rows, middle, strict=True):
        if row["gain_over_base"]:
            value, low, high = (100 * one for one in row["gain_over_base"])
            mean = 100 * row["accuracy"]
            found.append(
                Markup(
                    '<line class="bar" stroke="{0}" x1="{1:.1f}" x2="{1:.1f}" y1="{2:.1f}"'
                    ' y2="{3:.1f}"/>'
                ).format(colour, across, y(mean + low - value), y(mean + high - value))
            )
        for seed in row["accuracy_by_seed"]:
            found.append(
                Markup('<circle class="ring" stroke="{}" r="3" cx="{:.1f}" cy="{:.1f}"/>').format(
                    colour, across, y(100 * seed)
                )
            )
        found.append(
            Markup('<circle fill="{}" r="4" cx="{:.1f}" cy="{:.1f}"/>').format(colour, across, up)
        )
    across, up = middle[-1]
    found.append(
        Markup('<text x="{:.1f}" y="{:.1f}">{}</text>').format(RIGHT + 8, up + 4, NAMES[arm])
    )
    return Markup("").join(found)
