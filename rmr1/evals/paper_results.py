"""The published figures that a benchmark's score is put beside, and what differs in protocol.

From RM-R1 (arXiv 2505.02387v3), in per cent. The paper's RM-Bench totals of the two
32B models come from a script that reads one file twice; the corrected ones are ours to tell.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rmr1.evals.judgment_rows import Benchmark

TITLES: dict[Benchmark, str] = {
    "rewardbench": "RewardBench", "rm-bench": "RM-Bench", "rmb": "RMB",
}  # fmt: skip
# Judgments in one order of the whole benchmark.
WHOLE: dict[Benchmark, int] = {"rewardbench": 2_985, "rm-bench": 11_943, "rmb": 25_845}
# The figure that papers call a benchmark's score.
TOTAL: dict[Benchmark, str] = {
    "rewardbench": "section_mean", "rm-bench": "overall", "rmb": "overall",
}  # fmt: skip

_COLUMNS: tuple[Benchmark, ...] = ("rewardbench", "rm-bench", "rmb")
_TOTALS = {
    "RM-R1-Qwen2.5-Instruct-7B": (85.2, 70.2, 66.4),
    "RM-R1-Qwen2.5-Instruct-14B": (88.2, 76.1, 69.2),
    "RM-R1-Qwen2.5-Instruct-32B": (91.4, 79.1, 73.0),
    "RM-R1-DeepSeek-Distilled-Qwen-7B": (80.1, 72.4, 55.1),
    "RM-R1-DeepSeek-Distilled-Qwen-14B": (88.9, 81.5, 68.5),
    "RM-R1-DeepSeek-Distilled-Qwen-32B": (90.9, 83.9, 69.8),
    "INF-ORM-70B": (95.1, 70.9, 70.5),
    "Skywork-8B": (92.5, 70.1, 69.3),
    "Nemotron-340B": (92.0, 69.5, 69.9),
    "GPT-4o-0806": (86.7, 72.5, 73.8),
    "Self-taught-70B": (90.2, 71.4, 67.0),
    "JudgeLRM": (75.2, 64.7, 53.1),
}
_CORRECTED = {
    "RM-R1-Qwen2.5-Instruct-32B": 78.6,
    "RM-R1-DeepSeek-Distilled-Qwen-32B": 83.3,
}
_SECTIONS = {
    "RM-R1-Qwen2.5-Instruct-32B": (95.3, 83.1, 91.9, 95.2),
    "Qwen2.5-Instruct-32B, untrained": (95.8, 74.3, 86.8, 86.3),
}
_SECTION_NAMES = ("Chat", "Chat Hard", "Safety", "Reasoning")
_UNTRAINED = 85.8  # that model's total, from the paper's ablation
# The figures that are known of published models.
COLUMNS: dict[Benchmark, tuple[str, ...]] = {
    "rewardbench": (*_SECTION_NAMES, "total"), "rm-bench": ("total", "corrected"), "rmb": ("total",)
}  # fmt: skip


def published(benchmark: Benchmark) -> dict[str, dict[str, float]]:
    """Model -> figures, as shares. "corrected" stands beside a total that was added up wrongly."""
    column = _COLUMNS.index(benchmark)
    found = {name: {"total": totals[column]} for name, totals in _TOTALS.items()}
    if benchmark == "rm-bench":
        for name, value in _CORRECTED.items():
            found[name]["corrected"] = value
    if benchmark == "rewardbench":
        found["Qwen2.5-Instruct-32B, untrained"] = {"total": _UNTRAINED}
        for name, values in _SECTIONS.items():
            found[name] |= dict(zip(_SECTION_NAMES, values, strict=True))
    return {
        name: {figure: round(value / 100, 4) for figure, value in figures.items()}
        for name, figures in found.items()
    }


def differences(report: Mapping[str, Any]) -> list[str]:
    """What a reader must know before setting a score beside the published ones."""
    benchmark: Benchmark = report["benchmark"]
    made = report["made_by"]
    found = []
    orders = report["pairs_in_both_orders"]
    if report["pairs"] < WHOLE[benchmark]:
        found.append(
            f"{report['pairs']:,} of the benchmark's {WHOLE[benchmark]:,} pairs were judged;"
            " weights of parts are the official ones."
        )
    found.append(
        f"Placement is seeded ({made.get('seed', 'seed unknown')}) and balanced; the published"
        " one is drawn without a seed."
    )
    if orders:
        lists = " A best-of-n list counts in each order for itself." if benchmark == "rmb" else ""
        found.append(
            f"{orders:,} pairs were judged in both orders, a pair's credit being the mean of both;"
            f" the published figures are of one order.{lists}"
        )
    votes = made.get("votes", 1)
    if "temperature" in made and made["temperature"] is None:
        found.append(
            "No temperature was sent: judgments are drawn at the server's own, which is seldom 0;"
            " the published figures are of one greedy judgment."
        )
    if votes != 1:
        found.append(
            f"{votes} votes a judgment at temperature {made.get('temperature')}, equal numbers"
            " being a tie; the published figures are of one greedy judgment."
        )
    found += _rules(report, benchmark)
    found.append(
        f"The prompt is this project's own or yours (hash {made.get('prompt_hash', 'unknown')}),"
        f" a judgment ends at {made.get('max_new_tokens', 'unknown')} tokens; the paper's has its"
        " own wording and 8,192."
    )
    return found


def _rules(report: Mapping[str, Any], benchmark: Benchmark) -> list[str]:
    """How what names neither answer counts, and how figures are put together."""
    unparsed = f"A judgment that names neither answer earns {report['unparsed_credit']:g}"
    if benchmark == "rewardbench":
        return [f"{unparsed}; RewardBench's own code gives 0.5, RM-R1's 0 (`--unparsed 0`)."]
    if benchmark == "rm-bench":
        return [
            f"{unparsed}, as in the paper.",
            "Every judgment counts once; the published script reads the third of its three files"
            " twice, which the corrected totals put right.",
        ]
    return [
        f"{unparsed}, as in the paper; a best-of-n list is right only if its best answer beats"
        " every loser.",
    ]
