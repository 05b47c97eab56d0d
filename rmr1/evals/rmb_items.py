"""RMB (Zhou-Zoey/RMB-Reward-Model-Benchmark) becomes items: pairs, and best-of-n lists.

A row of `Pairwise_set/<goal>/<category>.json` has pair_uid, conversation_input, chosen and reject
(each with an `answer`) and category_path; one of `BoN_set` has bon_uid, conversation_input,
bon_best, loser_list and category_path. The benchmark states no licence: fetch it, never bundle it.

Many pairs and lists of a category ask the same question, so judgments are clustered by question.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rmr1.data import Kind
from rmr1.evals.benchmark_items import (
    Contest,
    Dataset,
    Ids,
    Item,
    conversation,
    digest,
    name_of,
    need,
    rows_from,
    text,
)
from rmr1.evals.score_rules import RMB_GOALS

_REASONING = {"code", "math", "reasoning"}


def load_rmb(data: str | Path) -> Dataset:
    """Read a folder (the benchmark's whole tree or a part of it), a file or a hub name.

    ValueError names the file, the item and the field.
    """
    items = []
    found = set()
    ids = Ids()
    for where, row in rows_from(data, split="train"):
        try:
            is_list = isinstance(row, dict) and "bon_uid" in row
            goal, item = (_list if is_list else _pair)(row, ids)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        found.add(("bon" if is_list else "pairwise", goal))
        items.append(item)
    missing = [f"{part} {goal}" for part in ("pairwise", "bon") for goal in RMB_GOALS
               if (part, goal) not in found]  # fmt: skip
    return Dataset("rmb", tuple(items), tuple(missing), ids.repeated)


def _pair(row: Any, ids: Ids) -> tuple[str, Item]:
    wanted = ("pair_uid", "conversation_input", "chosen", "reject", "category_path")
    fields = need(row, *wanted)
    goal, path, kind = _category(fields["category_path"])
    name = ids.own(f"pairwise/{path}", name_of(fields["pair_uid"], "pair_uid"))
    told = {"id": name, "set": "pairwise", "category_path": path}
    contest = Contest(
        _answer(fields["chosen"], "chosen"), _answer(fields["reject"], "reject"), told
    )
    return goal, _item(fields, str(name), f"pairwise/{path}", kind, [contest])


def _list(row: Any, ids: Ids) -> tuple[str, Item]:
    wanted = ("bon_uid", "conversation_input", "bon_best", "loser_list", "category_path")
    fields = need(row, *wanted)
    goal, path, kind = _category(fields["category_path"])
    losers = fields["loser_list"]
    if not isinstance(losers, list) or not losers:
        raise ValueError(
            f'field "loser_list" must be a list of at least one answer, got {losers!r:.80}'
        )
    name = ids.own(f"bon/{path}", name_of(fields["bon_uid"], "bon_uid"))
    best = _answer(fields["bon_best"], "bon_best")
    told = {"set": "bon", "category_path": path, "bon_uid": name, "losers": len(losers)}
    contests = [
        Contest(best, _answer(loser, f"loser_list[{k}]"), {"id": f"{name}/{k}", **told})
        for k, loser in enumerate(losers)
    ]
    return goal, _item(fields, str(name), f"bon/{path}", kind, contests)


def _item(
    fields: dict[str, Any], name: str, part: str, kind: Kind, contests: list[Contest]
) -> Item:
    asked = conversation(fields["conversation_input"], "conversation_input")
    cluster = digest(json.dumps([dict(turn) for turn in asked], ensure_ascii=False))
    return Item(name, part, cluster, asked, kind, tuple(contests))


def _category(value: Any) -> tuple[str, str, Kind]:
    """The goal, the path as it stands, and the kind of its tasks."""
    steps = [step.strip().lower() for step in value.split("/")] if isinstance(value, str) else []
    goals = [goal for goal in RMB_GOALS if goal in steps]
    if len(goals) != 1:
        raise ValueError(
            'field "category_path" must hold one of the steps Helpfulness and Harmlessness, got'
            f" {value!r:.80}"
        )
    kind: Kind = "reasoning" if _REASONING & set(steps) else "chat"
    return goals[0], value, kind


def _answer(value: Any, field: str) -> str:
    if not isinstance(value, dict) or "answer" not in value:
        found = ", ".join(value) if isinstance(value, dict) else f"{value!r:.80}"
        raise ValueError(f'field "{field}" must hold an "answer", found {found}')
    return text(value["answer"], f"{field}.answer")
