"""What RewardBench's own scoring code says about random judgments.

The package drags in much (fschat, bitsandbytes, a pinned transformers), so only its constants and
its one function are taken out of the wheel:

    pip download --no-deps rewardbench==0.1.4 -d /tmp/rb
    python tests/rewardbench_reference.py /tmp/rb/rewardbench-0.1.4-py3-none-any.whl

prints what tests/test_score.py holds as EXPECTED.
"""

from __future__ import annotations

import ast
import json
import sys
import zipfile
from pathlib import Path
from random import Random
from typing import Any

COUNTS = {"math-prm": 447}  # those subsets whose weight is not their number of pairs
SEEDS = (0, 1, 2)


def random_judgments(seed: int, counts: dict[str, int]) -> list[dict[str, Any]]:
    """A row for each of RewardBench's 2,985 pairs; the second seed leaves whole subsets out."""
    random = Random(seed)
    rows = []
    for subset in sorted(counts):
        if seed == 1 and random.random() < 0.3:
            continue
        skill = random.random()
        for number in range(COUNTS.get(subset, counts[subset])):
            label = random.choice("AB")
            other = "B" if label == "A" else "A"
            unread = random.choice([None, "tie"])
            verdict = random.choices([label, other, unread], [skill, 1 - skill, 0.1])[0]
            rows.append(
                {
                    "benchmark": "rewardbench", "id": number, "subset": subset, "label": label,
                    "verdict": verdict,
                }
            )  # fmt: skip
    return rows


def official(rows: list[dict[str, Any]], source: dict[str, str]) -> dict[str, float]:
    """Sections by the package's rule; `source` holds its constants.py and utils.py.

    As scripts/run_generative.py: 1 for the right answer, 0 for the wrong one, 0.5 for neither.
    """
    names: dict[str, Any] = {}
    exec(compile(source["constants"], "constants.py", "exec"), names)
    tree = ast.parse(source["utils"])
    (rule,) = [
        node for node in tree.body
        if isinstance(node, ast.FunctionDef) and node.name == "calculate_scores_per_section"
    ]  # fmt: skip
    exec(compile(ast.Module([rule], []), "utils.py", "exec"), names)
    results: dict[str, list[float]] = {}
    for row in rows:
        credit = 0.5 if row["verdict"] not in ("A", "B") else float(row["verdict"] == row["label"])
        results.setdefault(row["subset"], []).append(credit)
    metrics = {subset: sum(found) / len(found) for subset, found in results.items()}
    rule_of_sections = names["calculate_scores_per_section"]
    found = rule_of_sections(names["EXAMPLE_COUNTS"], names["SUBSET_MAPPING"], metrics)
    return {section: float(value) for section, value in found.items()}


def of_wheel(wheel: str | Path) -> dict[str, str]:
    with zipfile.ZipFile(wheel) as archive:
        return {
            name: archive.read(f"rewardbench/{name}.py").decode() for name in ("constants", "utils")
        }


def counts_of(source: dict[str, str]) -> dict[str, int]:
    names: dict[str, Any] = {}
    exec(compile(source["constants"], "constants.py", "exec"), names)
    counts: dict[str, int] = names["EXAMPLE_COUNTS"]
    return counts


if __name__ == "__main__":
    found_source = of_wheel(sys.argv[1])
    weights = counts_of(found_source)
    for one in SEEDS:
        print(json.dumps(official(random_judgments(one, weights), found_source)))
