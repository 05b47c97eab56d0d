"""The plot of `learning_curves.py`: reward over steps by objective, and held-out accuracies."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from textwrap import wrap

import harness
from markupsafe import Markup

from rmr1.reporting.charts import Scale, nice_ticks, tick_labels

NAMES = {"grpo": "GRPO", "dr_grpo": "Dr.GRPO", "dapo": "DAPO", "gspo": "GSPO", "cispo": "CISPO",
         "rloo": "RLOO", "rm_r1": "RM-R1"}  # fmt: skip
COLUMNS, PANEL, TALL, LEFT, TOP = 4, 230.0, 168.0, 40.0, 26.0
STYLE = """
svg { background: #fff; } text { font: 11px system-ui, sans-serif; fill: #1c2430; }
.end { text-anchor: end; } .mid { text-anchor: middle; } .tick { fill: #55606e; font-size: 10px; }
.name { font-size: 13px; font-weight: 600; } .grid { stroke: #e3e7ec; }
.unit { stroke: #8792a0; stroke-dasharray: 4 3; } .peer { fill: none; stroke: #b3bac3; }
.seed { fill: none; stroke: #0b62c4; stroke-opacity: .45; }
.ours { fill: none; stroke: #0b62c4; stroke-width: 2.2; } .band { fill: #0b62c4; opacity: .12; }
circle.dot { fill: #0b62c4; } circle.ring { fill: #fff; stroke: #0b62c4; stroke-opacity: .55; }
"""
NOTE = (
    "Mean reward of a step's judgments (1: all are right, −1: none) over the steps. Thin: one seed;"
    " band: from the lowest to the highest; bold: their mean; grey: the mean of all objectives."
    " Accuracy after RL: dots are means, rings seeds, bars the 95% interval of the gain over the"
    " distilled model, the dashed line."
)


def plot(rows: Sequence[harness.Row]) -> str:
    """An SVG: the reward of every objective over the steps, then the held-out accuracies."""
    values = [reward for row in rows for run in row["reward"] for reward in run]
    steps = len(rows[0]["reward"][0])
    margin = 0.05 * (max(values) - min(values)) or 0.1
    bounds = min(values) - margin, min(1.0, max(values) + margin)
    everyone = mean_of([run for row in rows for run in row["reward"]])
    panels = [curves(row, everyone, (1, max(2, steps)), bounds) for row in rows]
    panels.append(accuracies(rows))
    lines = -(-len(panels) // COLUMNS)
    width = min(COLUMNS, len(panels)) * PANEL
    below = wrap(NOTE, int(width / 5.6))
    height = lines * (TALL + 34) + 14 * len(below) + 8
    parts = [
        Markup('<g transform="translate({:.0f} {:.0f})">{}</g>').format(
            PANEL * (number % COLUMNS), (TALL + 34) * (number // COLUMNS), panel
        )
        for number, panel in enumerate(panels)
    ]
    parts += [
        Markup('<text class="tick" x="8" y="{:.0f}">{}</text>').format(
            height - 8 - 14 * number, text
        )
        for number, text in enumerate(reversed(below))
    ]
    return Markup(
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {:.0f} {:.0f}" role="img"'
        ' aria-label="{}"><style>{}</style><rect width="100%" height="100%" fill="#fff"/>'
        "{}</svg>\n"
    ).format(
        width,
        height,
        f"{rows[0]['workload']}: reward over steps and held-out accuracy by objective",
        Markup(STYLE),
        Markup("").join(parts),
    )


def mean_of(runs: Sequence[Sequence[float]]) -> list[float]:
    return [statistics.fmean(step) for step in zip(*runs, strict=True)]


def curves(
    row: harness.Row,
    everyone: Sequence[float],
    steps: tuple[float, float],
    bounds: tuple[float, float],
) -> Markup:
    """One objective: its seeds, their spread and mean, and the mean of all objectives."""
    x, y = Scale(*steps, LEFT, PANEL - 10), Scale(*bounds, TALL, TOP)

    def path(values: Sequence[float]) -> str:
        return "L".join(f"{x(i):.1f} {y(value):.1f}" for i, value in enumerate(values, start=1))

    runs = row["reward"]
    low, high = ([end(step) for step in zip(*runs, strict=True)] for end in (min, max))
    back = [f"{x(i):.1f} {y(value):.1f}" for i, value in enumerate(low, start=1)][::-1]
    lines = [("peer", path(everyone)), *(("seed", path(run)) for run in runs)]
    parts = [grid(y), frame(NAMES[row["provider"].split()[1]])]
    parts += [Markup('<path class="band" d="M{}L{}Z"/>').format(path(high), "L".join(back))]
    parts += [
        Markup('<path class="{}" d="M{}"/>').format(style, line)
        for style, line in [*lines, ("ours", path(mean_of(runs)))]
    ]
    for tick in nice_ticks(*steps, count=4):
        if tick == int(tick):
            parts.append(label(x(tick), TALL + 14, f"{int(tick)}"))
    return Markup("").join(parts)


def accuracies(rows: Sequence[harness.Row]) -> Markup:
    """Held-out accuracy of every objective, the dashed line that of the distilled model."""
    before = statistics.fmean(value for row in rows for value in row["accuracy_before"])
    every = [100 * value for row in rows for value in row["accuracy"]]
    ends = [100 * (statistics.fmean(row["accuracy_before"]) + end)
            for row in rows for end in row["gain"][1:]]  # fmt: skip
    low, high = min(*every, *ends, 100 * before) - 2, max(*every, *ends, 100 * before) + 2
    x, spacing = Scale(low, high, LEFT + 26, PANEL - 10), (TALL - TOP) / len(rows)
    parts = [frame("Held-out accuracy, %")]
    for tick, text in zip(nice_ticks(low, high), tick_labels(nice_ticks(low, high)), strict=True):
        parts.append(line("grid", x(tick), x(tick), TOP, TALL))
        parts.append(label(x(tick), TALL + 14, text))
    parts.append(line("unit", x(100 * before), x(100 * before), TOP, TALL))
    for number, row in enumerate(rows):
        y = TOP + spacing * (number + 0.5)
        ends = [100 * (statistics.fmean(row["accuracy_before"]) + end) for end in row["gain"][1:]]
        parts.append(label(LEFT + 20, y + 4, NAMES[row["provider"].split()[1]], "end"))
        parts.append(line("ours", x(ends[0]), x(ends[1]), y, y))
        dots = [*(("ring", one, 3.0) for one in row["accuracy"])]
        for style, value, radius in [*dots, ("dot", row["accuracy_mean"], 3.6)]:
            parts.append(
                Markup('<circle class="{}" cx="{:.1f}" cy="{:.1f}" r="{}"/>').format(
                    style, x(100 * value), y, radius
                )
            )
    return Markup("").join(parts)


def grid(y: Scale) -> Markup:
    ticks = nice_ticks(y.low, y.high)
    return Markup("").join(
        line("grid", LEFT, PANEL - 10, y(tick), y(tick))
        + label(LEFT - 5, y(tick) + 3.5, text, "end")
        for tick, text in zip(ticks, tick_labels(ticks), strict=True)
    )


def frame(title: str) -> Markup:
    return Markup('<text class="name" x="{:.0f}" y="16">{}</text>').format(LEFT, title)


def line(style: str, x1: float, x2: float, y1: float, y2: float) -> Markup:
    return Markup('<line class="{}" x1="{:.1f}" x2="{:.1f}" y1="{:.1f}" y2="{:.1f}"/>').format(
        style, x1, x2, y1, y2
    )


def label(x: float, y: float, text: str, anchor: str = "mid") -> Markup:
    return Markup('<text class="tick {}" x="{:.1f}" y="{:.1f}">{}</text>').format(
        anchor, x, y, text
    )
