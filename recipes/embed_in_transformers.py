"""The three ops in a plain transformers loop: no trainer, generator or model of rmr1.

    python recipes/embed_in_transformers.py [--steps 3]

Offline and on a CPU, in half a minute: the pocket model that comes with rmr1 judges pairs of
answers, and GRPO rewards its right verdicts. Put any causal language model of transformers in its
place with `--model`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import rmr1
from rmr1.data import Pair
from rmr1.kernels.policy_loss import PolicyLossConfig
from rmr1.models import resolve_model
from rmr1.prompts import encode, load_prompt
from rmr1.tasks.catalog import draw_pairs

SAMPLES = 8  # a pair
NEW_TOKENS = 96
OBJECTIVE = PolicyLossConfig(beta=0)  # no reference model


def train_step(
    model: Any, tokenizer: Any, optimizer: torch.optim.Optimizer, pairs: Sequence[Pair]
) -> tuple[float, float]:
    """One update on SAMPLES judgments of each pair; the loss and the mean reward."""
    batch, rewards = [], []
    for pair in pairs:
        prompt, ids = sample(model, tokenizer, pair)
        texts = tokenizer.batch_decode(ids[:, prompt:], skip_special_tokens=True)
        verdicts = rmr1.parse_verdicts(texts)
        rewards += [1.0 if verdict.answer == pair.label else -1.0 for verdict in verdicts]
        batch.append((prompt, ids, spoken(ids[:, prompt:], tokenizer.eos_token_id)))
    groups = torch.arange(len(pairs)).repeat_interleave(SAMPLES)
    advantages = rmr1.group_advantages(torch.tensor(rewards), groups)  # [N]
    tokens = sum(int(live.sum()) for _, _, live in batch)  # of the update: it divides every part
    total = 0.0
    for (prompt, ids, live), advantage in zip(batch, advantages.split(SAMPLES), strict=True):
        hidden = model.model(ids).last_hidden_state[:, prompt - 1 : -1]  # [SAMPLES, R, H]
        head = model.get_output_embeddings().weight  # [V, H]
        logprobs = rmr1.token_logprobs(hidden[live], head, ids[:, prompt:][live])  # [T]
        loss, _ = rmr1.policy_loss(
            logprobs, logprobs.detach(), advantage, live.nonzero()[:, 0],
            config=OBJECTIVE, token_count=tokens,
        )  # fmt: skip
        loss.backward()
        total += loss.item()
    optimizer.step()
    optimizer.zero_grad()
    return total, sum(rewards) / len(rewards)


@torch.no_grad()
def sample(model: Any, tokenizer: Any, pair: Pair) -> tuple[int, Tensor]:
    """The length of a pair's prompt, and SAMPLES continuations of it, prompt included."""
    prompt = torch.tensor([encode(tokenizer, load_prompt("compact").render(pair))])
    ids = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=True,
        top_k=0,  # from the whole distribution, whose log-probabilities the loss takes
        num_return_sequences=SAMPLES,
        max_new_tokens=NEW_TOKENS,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )
    return prompt.shape[1], ids


def spoken(responses: Tensor, end: int) -> Tensor:
    """Which tokens were sampled, the first end token included; what follows it is padding, which
    no token before it sees.
    """
    ended = (responses == end).long()
    return ended.cumsum(1) - ended == 0


def main() -> None:
    """Train and print a line a step."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="pocket", help="a Hugging Face directory")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--pairs", type=int, default=4, help="a step")
    options = parser.parse_args()
    torch.manual_seed(0)
    directory = resolve_model(options.model)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0)
    pairs = draw_pairs(options.steps * options.pairs, seed=1, split="train")
    for step in range(options.steps):
        part = pairs[step * options.pairs : (step + 1) * options.pairs]
        loss, reward = train_step(model, tokenizer, optimizer, part)
        print(f"step {step + 1}  loss {loss:+.4f}  reward {reward:+.3f}", flush=True)


if __name__ == "__main__":
    main()
