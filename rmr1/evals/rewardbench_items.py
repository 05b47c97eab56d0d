"""RewardBench (allenai/reward-bench, split `filtered`) becomes items: one pair each.

A row has prompt, chosen, rejected, subset and id; other columns are left alone. Published as
Parquet; copies as JSON and JSONL are read as well.
"""

from __future__ import annotations

from pathlib import Path

from rmr1.data import Kind
from rmr1.evals.benchmark_items import (
    Contest,
    Dataset,
    Ids,
    Item,
    conversation,
    name_of,
    need,
    text,
)
from rmr1.evals.benchmark_items import rows_from as rows_from_data
from rmr1.evals.score_rules import REWARDBENCH_SUBSETS


def load_rewardbench(data: str | Path) -> Dataset:
    """Read a file, a folder (its `filtered*` files, if it has such) or a hub name."""
    items = []
    ids = Ids()
    for where, row in rows_from_data(data, split="filtered", named="filtered"):
        try:
            items.append(_item(row, ids))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
    found = {item.part for item in items}
    missing = tuple(name for name in REWARDBENCH_SUBSETS if name not in found)
    return Dataset("rewardbench", tuple(items), missing, ids.repeated)


def _item(row: object, ids: Ids) -> Item:
    fields = need(row, "prompt", "chosen", "rejected", "subset", "id")
    subset = fields["subset"]
    if not isinstance(subset, str) or subset not in REWARDBENCH_SUBSETS:
        raise ValueError(
            f'field "subset" must be one of {", ".join(REWARDBENCH_SUBSETS)}, got {subset!r:.80}'
        )
    name = ids.own(subset, name_of(fields["id"], "id"))
    kind: Kind = "reasoning" if REWARDBENCH_SUBSETS[subset][0] == "Reasoning" else "chat"
    contest = Contest(
        text(fields["chosen"], "chosen"),
        text(fields["rejected"], "rejected"),
        {"id": name, "subset": subset},
    )
    return Item(
        id=str(name),
        part=subset,
        cluster=str(name),
        conversation=conversation(fields["prompt"], "prompt"),
        kind=kind,
        contests=(contest,),
    )
