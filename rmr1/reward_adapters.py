"""The rewards of rmr1/rewards.py as other trainers call them: TRL, verl and OpenRLHF.

    GRPOTrainer(..., reward_funcs=trl_reward())                            # TRL
    custom_reward_function.path=.../rmr1/reward_adapters.py                # verl
    --remote_rm_url .../rmr1/reward_adapters.py --label_key label          # OpenRLHF

Correctness alone needs the label, "A" or "B". Other parts are weighed by name (`grounding=0.1`) and
need the two answers as well: columns `answer_a` and `answer_b` (verl: in `extra_info`).
`swap_consistency` needs `id` too, and both orders of a pair in one call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from rmr1.data import Label, Pair
from rmr1.grpo_config import RewardConfig
from rmr1.rewards import weighed
from rmr1.verdict import parse_verdicts

Reward = Callable[..., list[float]]


def trl_reward(*, max_completion_length: int = 0, **weights: float) -> Reward:
    """A function for TRL's `reward_funcs`; the dataset has a column `label`.

    `weights` are those of `RewardConfig`; `length` needs TRL's cap of tokens.

    Raises:
        ValueError: a weight that is not known, or a column that is missing.
    """
    cap = max_completion_length
    config = _config(weights, cap)

    def rmr1_reward(
        completions: Sequence[Any], label: Sequence[str], **columns: Any
    ) -> list[float]:
        texts = [_text(completion) for completion in completions]
        if config.length and "completion_ids" not in columns:
            raise ValueError("the part length needs completion_ids, which TRL gives; drop length")
        lengths = [len(ids) for ids in columns.get("completion_ids", [()] * len(texts))]
        names = ("answer_a", "answer_b", "id")
        rows = [
            {name: columns[name][row] for name in names if name in columns}
            for row in range(len(texts))
        ]
        return _summed(config, texts, lengths, label, rows, cap)

    return rmr1_reward


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: str,
    extra_info: Mapping[str, Any] | None = None,
    **weights: float,
) -> dict[str, float]:
    """verl's reward function: `score`, which it trains on, and each part, which it logs.

    `ground_truth` is the label. Weights come from `custom_reward_function.reward_kwargs`. One
    judgment at a time: neither `swap_consistency` nor `length`.
    """
    config = _config(weights, 0)
    if config.swap_consistency:
        raise ValueError("verl asks for one judgment at a time: swap_consistency needs both orders")
    parts = _parts(config, [solution_str], [0], [ground_truth], [dict(extra_info or {})], 0)
    return {"score": sum(part[0] for part in parts.values())} | {
        name: part[0] for name, part in parts.items()
    }


def reward_func(
    queries: Sequence[str], prompts: Sequence[str], labels: Sequence[str], **_: Any
) -> dict[str, Any]:
    """OpenRLHF's reward function: correctness, as `rewards` (+1, -1) and as `scores` (1, 0).

    `queries` are prompts with their judgments; `labels` come from `--label_key`.
    """
    import torch

    texts = []
    for query, prompt in zip(queries, prompts, strict=True):
        # The prompt shows the format, verdicts included: it must not be read as a judgment.
        if not query.startswith(prompt):
            raise ValueError("a query does not begin with its prompt, so its judgment is unknown")
        texts.append(query[len(prompt) :])
    rewards = torch.tensor(_summed(RewardConfig(), texts, [0] * len(texts), labels, [], 0))
    scores = (rewards > 0).float()
    return {"rewards": rewards, "scores": scores, "extra_logs": {"correct": scores}}


def _config(weights: Mapping[str, float], cap: int) -> RewardConfig:
    try:
        config = RewardConfig(**weights)
    except ValidationError as error:
        first = error.errors()[0]
        known = ", ".join(RewardConfig.model_fields)
        raise ValueError(
            f"reward weight {first['loc'][0]!r}: {first['msg']}; known are {known}"
        ) from None
    if config.length and not cap:
        raise ValueError("the weight `length` needs the cap of a judgment's length in tokens")
    return config


def _text(completion: Any) -> str:
    """TRL's completion: a text, or the messages of a turn."""
    return completion if isinstance(completion, str) else str(completion[-1]["content"])


def _summed(
    config: RewardConfig,
    texts: Sequence[str],
    lengths: Sequence[int],
    labels: Sequence[str],
    rows: Sequence[Mapping[str, Any]],
    cap: int,
) -> list[float]:
    parts = _parts(config, texts, lengths, labels, rows or [{}] * len(texts), cap)
    return [sum(values) for values in zip(*parts.values(), strict=True)]


def _parts(
    config: RewardConfig,
    texts: Sequence[str],
    lengths: Sequence[int],
    labels: Sequence[str],
    rows: Sequence[Mapping[str, Any]],
    cap: int,
) -> dict[str, list[float]]:
    needed = ["answer_a", "answer_b"] * bool(config.grounding) + ["id"] * bool(
        config.swap_consistency
    )
    pairs = []
    for label, row in zip(labels, rows, strict=True):
        if missing := [name for name in needed if not row.get(name)]:
            raise ValueError(f"this reward needs {', '.join(missing)} with each judgment")
        pairs.append(_pair(label, row))
    return weighed(
        config, parse_verdicts(texts), texts, lengths, pairs, limit=max(1, cap), buffer=0
    )


def _pair(label: str, row: Mapping[str, Any]) -> Pair:
    """As much of a pair as rewards look at."""
    if label not in ("A", "B"):
        raise ValueError(f'a label must be "A" or "B", got {label!r}')
    side: Label = "A" if label == "A" else "B"
    answers = str(row.get("answer_a", "")), str(row.get("answer_b", ""))
    return Pair(str(row.get("id", "")), "", (), *answers, side, "chat")
