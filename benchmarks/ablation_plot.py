"""The plot of `ablation.py`: held-out accuracy of each arm, seeds, and the gain's interval."""

from __future__ import annotations

from collections.abc import Sequence

import harness
from markupsafe import Markup

from rmr1.reporting.charts import Scale, nice_ticks, tick_labels

LEFT, WIDE, LINE, TOP = 190.0, 460.0, 30.0, 34.0
STYLE = """
svg { background: #fff; } text { font: 12px system-ui, sans-serif; fill: #1c2430; }
.end { text-anchor: end; } .mid { text-anchor: middle; } .tick { fill: #55606e; font-size: 10px; }
.grid { stroke: #e3e7ec; } .chance { stroke: #8792a0; stroke-dasharray: 4 3; }
.bar { stroke: #0b62c4; stroke-opacity: .35; stroke-width: 7; }
circle.dot { fill: #0b62c4; } circle.ring { fill: #fff; stroke: #0b62c4; stroke-opacity: .6; }
"""
NOTE = "Accuracy in percent: dots over all seeds, rings each seed, bars the gain's 95% interval"


def plot(rows: Sequence[harness.Row]) -> str:
    """An SVG with a line for each arm."""
    values = [100 * value for row in rows for value in (*row["accuracy_by_seed"], row["accuracy"])]
    low, high = min(48.0, min(values) - 2), max(values) + 3
    x = Scale(low, high, LEFT, LEFT + WIDE)
    height = TOP + LINE * len(rows) + 34
    parts = [Markup('<line class="chance" x1="{0:.1f}" x2="{0:.1f}" y1="{1}" y2="{2}"/>').format(
        x(50.0), TOP - 8, height - 30
    )]  # fmt: skip
    ticks = nice_ticks(low, high, 6)
    for value, label in zip(ticks, tick_labels(ticks), strict=True):
        parts.append(
            Markup(
                '<line class="grid" x1="{0:.1f}" x2="{0:.1f}" y1="{1}" y2="{2}"/>'
                '<text class="tick mid" x="{0:.1f}" y="{3}">{4}</text>'
            ).format(x(value), TOP - 8, height - 30, height - 16, label)
        )
    for number, row in enumerate(rows):
        parts.append(line_of(row, TOP + LINE * (number + 0.5), x))
    title = Markup('<text x="10" y="16">{}</text>').format(NOTE)
    size = Markup('viewBox="0 0 {} {}"').format(int(LEFT + WIDE + 20), int(height))
    body = Markup("").join(parts)
    return str(
        Markup('<svg xmlns="http://www.w3.org/2000/svg" {}><style>{}</style>{}{}</svg>\n').format(
            size, Markup(STYLE), title, body
        )
    )


def line_of(row: harness.Row, y: float, x: Scale) -> Markup:
    """An arm: its name, its seeds, its mean and the interval of its gain over base."""
    found = [Markup('<text class="end" x="{}" y="{:.1f}">{}</text>').format(
        LEFT - 12, y + 4, row["name"]
    )]  # fmt: skip
    mean = 100 * row["accuracy"]
    if row["gain_over_base"]:
        value, low, high = (100 * one for one in row["gain_over_base"])
        found.append(
            Markup('<line class="bar" x1="{:.1f}" x2="{:.1f}" y1="{:.1f}" y2="{:.1f}"/>').format(
                x(mean + low - value), x(mean + high - value), y, y
            )
        )
    for seed in row["accuracy_by_seed"]:
        found.append(
            Markup('<circle class="ring" r="3.5" cx="{:.1f}" cy="{:.1f}"/>').format(
                x(100 * seed), y
            )
        )
    found.append(Markup('<circle class="dot" r="4.5" cx="{:.1f}" cy="{:.1f}"/>').format(x(mean), y))
    return Markup("").join(found)
