"""Seconds of three rollouts of the demo's RL, by whatever tree of this project is imported.

    PYTHONPATH=TREE python benchmarks/demo_rollouts.py MODEL CONFIG

MODEL is the demo's distilled checkpoint, CONFIG its rlvr/config.toml. Trees are compared by running
this in turn with one and the other; a first rollout warms up and is not counted.
"""

from __future__ import annotations

import json
import sys
import time
from itertools import islice
from pathlib import Path

import rmr1
from rmr1.config import RlvrConfig, load_config
from rmr1.data import shuffled_epochs
from rmr1.models import load_tokenizer
from rmr1.prompts import encode
from rmr1.tasks.catalog import draw_pairs

ROLLOUTS = 3


def main() -> None:
    folder, config = Path(sys.argv[1]), load_config(RlvrConfig, sys.argv[2], {})
    tokenizer, rollout = load_tokenizer(folder), config.rollout
    pairs = draw_pairs(config.data.tasks, seed=config.data.seed, split="train")
    prompts = [encode(tokenizer, config.prompt.render(pair)) for pair in pairs]
    fitting = [ids for ids in prompts if len(ids) <= config.max_prompt_tokens]
    stream = shuffled_epochs(fitting, config.seed)
    model = rmr1.load_model(folder)
    generator = rmr1.Generator(model, tokenizer, kv_memory_gb=rollout.kv_memory_gb)
    seconds = []
    for step in range(1 + ROLLOUTS):
        sampling = rmr1.SamplingParams(
            n=rollout.samples,
            temperature=rollout.temperature,
            top_p=rollout.top_p,
            max_new_tokens=rollout.max_new_tokens,
            seed=step,
        )
        began = time.perf_counter()
        generator.generate(list(islice(stream, rollout.prompts)), sampling)
        seconds.append(time.perf_counter() - began)
        if hasattr(generator, "sync"):  # trees before the paged generator have none
            generator.sync(model)
    print(json.dumps({"tree": rmr1.__file__, "seconds": seconds[1:]}))


if __name__ == "__main__":
    main()
