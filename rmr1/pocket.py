"""Makes the pocket model: the 2M-parameter decoder and tokenizer inside this package.

    python -m rmr1.pocket --output rmr1/pocket          (about two and a quarter hours on 2 cores)

It exists so that a newcomer sees the whole pipeline in ten minutes; it is no claim about the
engine. It is pretrained, with the project's own trainer, on answering the embedded tasks, on saying
of one answer what speaks for or against it, and on writing judgments in the judge's format, with
true notes on both answers and a verdict that is drawn at random, whatever the notes say. So it
starts like an instruct model: it can solve many tasks, it keeps to the format, it judges at chance.
Only tasks of the training split are used.

The shipped weights are what this command made, with the code of the commit before theirs.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import torch

from rmr1.data import Kind, Label, Pair
from rmr1.distill import nll
from rmr1.engine.model import CausalLM, ModelConfig
from rmr1.engine.optim_config import OptimConfig
from rmr1.engine.packing import pack
from rmr1.engine.trainer import Trainer
from rmr1.engine.weights import load_model, save_model
from rmr1.models import load_tokenizer
from rmr1.pocket_init import wire_copying
from rmr1.prompts import encode, load_prompt
from rmr1.tasks.catalog import FAMILIES
from rmr1.tasks.family import Item, draw_item, judgment_text, place
from rmr1.terminal import Phase, phase

VOCABULARY = 3072
TAGS = ("type", "solution", "rubric", "justify", "eval", "quote_A", "quote_B", "summary_A",
        "summary_B", "answer")  # fmt: skip
MARKERS = ("[Question]", "[Answer]", "[Answer A]", "[Answer B]", "[End]", "[[A]]", "[[B]]")
# The fixed passages between two texts of a judgment are one token each: a third of a judgment's
# length, and nothing to learn in it.
PASSAGES = (
    "<type>Reasoning</type>\n<solution>",
    "</solution>\n<eval>\n<quote_A>",
    "<type>Chat</type>\n<rubric>\n1. ",
    "</justify>\n</rubric>\n<eval>\n<quote_A>",
    "</quote_A>\n<summary_A>",
    "</summary_A>\n<quote_B>",
    "</quote_B>\n<summary_B>",
    "</summary_B>\n</eval>\n<answer>[[A]]</answer>",
    "</summary_B>\n</eval>\n<answer>[[B]]</answer>",
)
SPECIAL = ("<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# Llama with biases, which `wire_copying` needs. (transformers gives every Qwen2 model the tokenizer
# of Qwen, whatever its directory says.)
MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "attention_bias": True,
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
    "initializer_range": 0.06,
    "hidden_act": "silu",
    "bos_token_id": None,
}
# Learnt early; every other family takes two turns for their one.
EASY = ("safety", "over_refusal", "on_topic", "exact_format", "complete")
TURNS = (*FAMILIES, *(family for family in FAMILIES if family.name not in EASY))
# Of the random verdicts. At one half, a greedy judge would go by whatever tips the scales by a hair
# and may be right in 57 of 100; this one says A.
A_SHARE = 0.6
WIDTHS = (32, 64, 128, 192)
# Few sequences a step: a small model gains more from many updates than from large ones.
BATCH = 16
# (updates, peak learning rate); each round warms up again, on fresh tasks.
ROUNDS = ((14_000, 2e-3), (14_000, 1e-3), (14_000, 1e-3))
SAVE_EVERY = 1000


@dataclass(frozen=True, slots=True)
class Drawn:
    """A pair, its item, and a judgment of it whose verdict was drawn at random."""

    pair: Pair
    item: Item
    judgment: str


def drawn_tasks(seed: int) -> Iterator[Drawn]:
    """Endless tasks of the training split, families by `TURNS`."""
    rng = Random(f"pocket/{seed}")
    number = 0
    while True:
        family = TURNS[number % len(TURNS)]
        item = draw_item(family, rng, "train")
        label: Label = rng.choice(("A", "B"))
        pair = place(item, family, label, f"pocket-{number}")
        yield Drawn(pair, item, random_trace(item, family.kind, label, rng))
        number += 1


def random_trace(item: Item, kind: Kind, label: Label, rng: Random) -> str:
    """A judgment in the right format, with true quotes, notes and own solution, whose verdict is
    drawn without a look at any of them.
    """
    quotes, notes = (item.chosen_quote, item.rejected_quote), (item.chosen_note, item.rejected_note)
    if label == "B":
        quotes, notes = quotes[::-1], notes[::-1]
    verdict: Label = "A" if rng.random() < A_SHARE else "B"
    return judgment_text(item, kind, verdict, quotes=quotes, notes=notes)


def train_tokenizer(tasks: Sequence[Drawn]) -> Any:
    """The commonest words of the embedded tasks as one token each, anything else byte by byte.

    So a made-up or reversed word is spelt out in the same letters wherever it stands, and numbers
    are single digits. Tags and the passages between two texts are single tokens.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(
                Regex(r"\d| ?[A-Za-z]+(?:'[a-z]+)?|\n| ?[^\sA-Za-z\d]|\s+"), "isolated"
            ),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    counts: Counter[str] = Counter()
    for task in tasks:
        for text in (load_prompt("compact").render(task.pair)[-1]["content"], task.judgment):
            counts.update(word for word, _ in words.pre_tokenize_str(text))
    tags = [tag for name in TAGS for tag in (f"<{name}>", f"</{name}>")]
    added = [*PASSAGES, *tags, *MARKERS]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    room = VOCABULARY - len(alphabet) - len(SPECIAL) - len(added)
    common = [word for word, _ in counts.most_common() if len(word) > 1][:room]
    # A word as a whole always beats its letters.
    pieces = [(byte, -100.0) for byte in alphabet] + [(word, -1.0) for word in common]
    core = Tokenizer(models.Unigram(pieces))
    core.pre_tokenizer = words
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(list(SPECIAL))
    core.add_tokens(added)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=SPECIAL[0],
        eos_token=SPECIAL[1],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=MODEL["max_position_embeddings"],
    )


def model_config(width: int = 192) -> ModelConfig:
    """The pocket model's shape at one of `WIDTHS`, all else alike; 192 is the one that ships."""
    inner = width * 8 // 3 // 8 * 8
    sizes = {"hidden_size": width, "intermediate_size": inner}
    # A head is 32 wide, but `wire_copying` needs two of them.
    count = max(2, width // 32)
    heads = dict.fromkeys(("num_attention_heads", "num_key_value_heads"), count)
    return ModelConfig.from_dict({**MODEL, **sizes, **heads})


def pretrain(
    output: Path,
    *,
    number: int,
    steps: int,
    learning_rate: float,
    width: int = 192,
    on_step: Callable[[int, int, dict[str, float]], None] | None = None,
) -> Path:
    """Round `number` of the pretraining: round 0 starts from nothing, a later one from what the
    round before left in `output`. Writes tokenizer and model there, now and then and at the end.
    """
    torch.manual_seed(number)
    if number == 0:
        tokenizer = train_tokenizer(list(islice(drawn_tasks(1), 20_000)))
        model = CausalLM(model_config(width))
        wire_copying(model)
        output.mkdir(parents=True, exist_ok=True)
        tokenizer.save_pretrained(output)
    else:
        tokenizer, model = load_tokenizer(output), load_model(output)
    optim = OptimConfig(
        learning_rate=learning_rate,
        schedule="cosine",
        warmup_steps=100,
        weight_decay=0.1,
        beta2=0.98,
    )
    trainer = Trainer(model, optim, total_updates=steps, max_micro_tokens=16384)
    rng = Random(f"pocket-mix/{number}")
    tasks = drawn_tasks(number)
    for step in range(1, steps + 1):
        rows = [_example(tokenizer, task, rng) for task in islice(tasks, BATCH)]
        stats = trainer.update(
            pack([r[0] for r in rows], [r[1] for r in rows]), nll, per_token=True
        )
        if on_step is not None:
            on_step(step, steps, {"loss": stats.loss})
        if step % SAVE_EVERY == 0 or step == steps:
            save_model(deepcopy(model).to(torch.float16), output)
    return output


def _example(tokenizer: Any, task: Drawn, rng: Random) -> tuple[list[int], list[int]]:
    """(prompt ids, response ids): a plain question, a look at one answer, or a judgment.

    Who sees both answers can copy a result instead of working it out, and is right half the time.
    So most examples show no answer, or one that is mostly wrong.
    """
    drawn = rng.random()
    item, pair = task.item, task.pair
    working = item.solution or item.rubric[0][0]
    if drawn < 0.3:
        messages, text = list(pair.conversation), f"{working}\n{item.chosen}"
    elif drawn < 0.6:
        right = rng.random() < 0.35
        shown, note = (
            (item.chosen, item.chosen_note) if right else (item.rejected, item.rejected_note)
        )
        question = f"[Question]\n{item.question}\n[Answer]\n{shown}\n[End]"
        messages = [{"role": "user", "content": question}]
        text = f"{working} {note}"
    else:
        messages, text = load_prompt("compact").render(pair), task.judgment
    response = tokenizer(text, add_special_tokens=False)["input_ids"]
    return encode(tokenizer, messages), [*response, tokenizer.eos_token_id]


def _follow(bar: Phase) -> Callable[[int, int, dict[str, float]], None]:
    def on_step(step: int, total: int, row: dict[str, float]) -> None:
        bar.reach(step, total)
        bar.show(row)

    return on_step


def main() -> None:
    """`python -m rmr1.pocket --output DIR [--first N] [--width W]`."""
    parser = argparse.ArgumentParser(
        prog="python -m rmr1.pocket",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", type=Path, required=True, help="directory to write")
    parser.add_argument(
        "--first",
        type=int,
        choices=range(len(ROUNDS)),
        default=0,
        help="round to begin with; a later one goes on from what is in --output (default: 0)",
    )
    parser.add_argument(
        "--width",
        type=int,
        choices=WIDTHS,
        default=192,
        help="of the residual stream, for round 0; 192 ships, the others are for a study of sizes",
    )
    args = parser.parse_args()
    for number in range(args.first, len(ROUNDS)):
        steps, learning_rate = ROUNDS[number]
        with phase(f"Pretrain, round {number}", steps, "steps") as bar:
            pretrain(
                args.output,
                number=number,
                steps=steps,
                learning_rate=learning_rate,
                width=args.width,
                on_step=_follow(bar),
            )
    print(args.output)


if __name__ == "__main__":
    main()
