"""A whole step of RL (rollout, rewards, scores, updates) with every op in Triton, against the
native path: the same tokens, figures and weights. So a GPU's path is walked where there is none.

Triton's interpreter runs the kernels. That all of them ran, and nothing else, is counted: each
launch by its kernel, while the native functions and the references refuse to be called.

What a step computes without a kernel of Triton's, because there is none:

- attention of training and scoring: flash-attention's on a GPU, torch's own on a CPU
  (rmr1/kernels/packed_attention.py, varlen_attention_cpu.py);
- matrix products: the model's linear layers and the generator's head (rmr1/kernels/linear.py), and
  those of the fused head in the update, are torch's;
- embedding, rotary tables, copies of cache blocks, clipping and AdamW: torch's too.
"""

from __future__ import annotations

import copy
import importlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import pytest
import torch
import triton.language as tl
from torch import Tensor

from rmr1 import _C
from rmr1.data import read_pairs
from rmr1.engine.generator import Rollout
from rmr1.engine.model import CausalLM, ModelConfig
from rmr1.engine.optim_config import OptimConfig
from rmr1.engine.reference import Reference
from rmr1.engine.trainer import Trainer
from rmr1.group_sampling import Task
from rmr1.grpo import Grpo, GrpoStep
from rmr1.grpo_config import GrpoConfig, RolloutConfig
from rmr1.kernels import dispatch, paged_attention_kernels
from rmr1.kernels.dispatch import interpreted, use
from rmr1.kernels.rmsnorm import rmsnorm
from rmr1.models import load_tokenizer
from rmr1.prompts import encode, load_prompt
from rmr1.verdict import parse_verdicts

pytestmark = pytest.mark.skipif(
    not interpreted(), reason="beside a GPU Triton takes no rewards that lie on the host"
)

SIZES: dict[str, Any] = {
    "vocab_size": 28,  # of tests/conftest.py
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
    "eos_token_id": 1,
}
MODELS = {
    "llama": ModelConfig(
        family="llama", num_attention_heads=4, num_key_value_heads=2, head_dim=8, **SIZES
    ),
    "qwen3": ModelConfig(  # few heads: the interpreter norms each of each token by itself
        family="qwen3",
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        tie_word_embeddings=True,
        **SIZES,
    ),
}
ALWAYS = {
    "group_advantage_triton._kernel",
    "kv_store_triton._kernel",
    "paged_attention_kernels.decode",
    "paged_attention_kernels.prefill",
    "policy_loss_triton._kernel",
    "rmsnorm_triton._backward",
    "rmsnorm_triton._forward",
    "rope_triton._kernel",
    "sample_triton._sample",
    "swiglu_triton._backward",
    "swiglu_triton._forward",
    "token_logprob_triton._forward",
}
OF_SHARES = {"paged_attention_kernels.merge"}
# A loss of single tokens is asked chunk by chunk, one of whole sequences is not.
OF_TOKENS = {"token_loss_triton._gradient", "token_loss_triton._stats"}
OF_SEQUENCES = {"token_logprob_triton._gradient"}
OPS = {"add_rmsnorm", "group_advantages", "kv_store", "paged_attention", "policy_loss", "rmsnorm"}
OPS |= {"rope", "sample", "swiglu", "token_logprobs"}
WITHOUT_KERNEL = {"linear", "packed_attention", "varlen_attention"}
WITHOUT_KERNEL |= {"decoder"}  # asked whether C++ may compute a step of generation
# In C++ too, and no op of a model.
ALLOWED = {"checksum", "parse_verdicts"}

How = Literal["use", "environment"]

# --- A step, and what there is to compare --------------------------------------------------------


def take_step(
    grpo: Grpo, prompts: list[list[int]], reward: Callable[[Sequence[Rollout]], Tensor], seed: int
) -> GrpoStep:
    """The only call of `Grpo.step` here."""
    tasks = iter([Task(tokens, None) for tokens in prompts])
    return grpo.step(tasks, lambda _, rollouts: {"right": reward(rollouts)}, seed=seed)


class Judging:
    """Prompts with their right verdicts, a policy, and a reference that is some way off."""

    def __init__(
        self, model: str, tokenizer: Any, prompts: list[list[int]], labels: Sequence[str]
    ) -> None:
        self.tokenizer, self.prompts, self.labels = tokenizer, prompts, labels
        torch.manual_seed(0)
        self.policy = CausalLM(MODELS[model])
        self.reference = copy.deepcopy(self.policy).requires_grad_(False)
        for parameter in self.policy.parameters():  # norms too
            parameter.data += 0.05 * torch.randn_like(parameter)

    def reward(self, rollouts: Sequence[Rollout]) -> Tensor:
        """+1 for the right verdict, -1 for the other or none."""
        verdicts = parse_verdicts([rollout.text for rollout in rollouts])
        samples = len(rollouts) // len(self.prompts)
        labels = [label for label in self.labels for _ in range(samples)]
        right = [v.answer == label for v, label in zip(verdicts, labels, strict=True)]
        return torch.tensor([1.0 if one else -1.0 for one in right])

    def grpo(self, config: dict[str, Any], rollout: dict[str, Any], micro: int = 1000) -> Grpo:
        """A copy of the policy with what trains it."""
        rollouts = RolloutConfig(prompts=len(self.prompts), kv_memory_gb=0.0005, **rollout)
        trainer = Trainer(
            copy.deepcopy(self.policy),
            # With the eps of 1e-8 rounding decides where a gradient of almost nothing leads.
            OptimConfig(learning_rate=1e-3, eps=1e-5),
            total_updates=100,
            max_micro_tokens=micro,
            temperature=rollouts.temperature,
        )
        return Grpo(
            trainer,
            self.tokenizer,
            reference=Reference(lambda _: self.reference, torch.device("cpu")),
            rollout=rollouts,
            grpo=GrpoConfig(beta=0.1, **config),
        )


def assert_equal_steps(found: GrpoStep, wanted: GrpoStep) -> None:
    """Tokens are the same; log-probabilities and figures differ by rounding."""
    for mine, truth in zip(rollouts(found), rollouts(wanted), strict=True):
        assert mine.token_ids == truth.token_ids
        assert (mine.text, mine.finish_reason) == (truth.text, truth.finish_reason)
        for name in ("logprobs", "sampled_logprobs"):
            assert getattr(mine, name) == pytest.approx(getattr(truth, name), rel=0, abs=1e-4)
    assert torch.equal(found.drawn.samples.rewards, wanted.drawn.samples.rewards)
    for name in ("advantages", "old_logprobs", "ref_logprobs"):
        assert (getattr(found.batch, name) - getattr(wanted.batch, name)).abs().max() <= 1e-4
    for update, true_update in zip(found.updates, wanted.updates, strict=True):
        for name in ("loss", "entropy", "grad_norm"):
            assert abs(getattr(update, name) - getattr(true_update, name)) <= 1e-4, name
        assert update.extra == pytest.approx(true_update.extra, rel=0, abs=1e-4)
    assert figures(found) == pytest.approx(figures(wanted), rel=0, abs=1e-4)


def rollouts(step: GrpoStep) -> list[Rollout]:
    return [rollout for _, rollout in step.drawn.own]


def figures(step: GrpoStep) -> dict[str, float]:
    """Without those of the clock."""
    return {name: value for name, value in step.figures().items() if not name.endswith("_time")}


def assert_not_equal_by_nature(step: GrpoStep) -> None:
    """Every group teaches something, and no figure is a zero that anything would agree with."""
    found = step.figures()
    assert found["frac_reward_zero_std"] == 0
    assert 0 < found["completions/clipped_ratio"] < 1
    for name in ("kl", "entropy", "grad_norm"):
        assert found[name] > 1e-2, name
    assert max(abs(update.loss) for update in step.updates) > 1e-2
    assert step.updates[-1].extra["ratio_max"] > 1.001  # an update has moved the policy


def apart(one: CausalLM, other: CausalLM) -> float:
    """The largest difference of two weights."""
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return max(float((a - b).detach().abs().max()) for a, b in pairs)


# --- What ran ------------------------------------------------------------------------------------


def kernel_modules(pattern: str) -> Iterator[ModuleType]:
    for path in sorted(Path(dispatch.__file__).parent.glob(pattern)):
        if path.stem != "compile_gate":  # which turns the interpreter off
            yield importlib.import_module(f"rmr1.kernels.{path.stem}")


def name_of(kernel: Any) -> str:
    """Module and function of a kernel, whatever is wrapped around it."""
    while not hasattr(kernel, "__code__"):
        kernel = kernel.fn
    return f"{kernel.__module__.removeprefix('rmr1.kernels.')}.{kernel.__name__}"


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often the interpreter has run each kernel."""
    from triton.runtime.interpreter import InterpretedFunction

    seen: Counter[str] = Counter()
    run = InterpretedFunction.run

    def counted(self: Any, *args: Any, **options: Any) -> None:
        run(self, *args, **options)
        seen[name_of(self)] += 1

    monkeypatch.setattr(InterpretedFunction, "run", counted)
    return seen


@contextmanager
def only(backend: Literal["native", "triton"], how: How) -> Iterator[set[str]]:
    """Force a backend; an op that uses its reference, or C++ under Triton, fails. Gives the names
    of the ops that are asked for Triton.
    """
    asked: set[str] = set()
    with pytest.MonkeyPatch.context() as patch:
        for module in kernel_modules("*.py"):
            for name in ("reference", "reference_backward"):
                if hasattr(module, name) and module.__name__ != "rmr1.kernels.linear":
                    patch.setattr(module, name, _refuse(f"{module.__name__}.{name}"))
        if backend == "triton":
            for name, value in vars(_C).items():
                function = type(value).__name__ == "nb_func" and name not in ALLOWED
                if function or name == "Decoder":
                    patch.setattr(_C, name, _refuse(f"_C.{name}"))
        real = dispatch._refuse_without_triton

        def noted(op: str, x: Tensor, triton: bool) -> None:
            asked.add(op)
            real(op, x, triton)

        patch.setattr(dispatch, "_refuse_without_triton", noted)
        forced: AbstractContextManager[None] = nullcontext()
        if how == "use":
            forced = use(backend)
        else:
            patch.setenv("RMR1_KERNELS", backend)
        with forced:
            yield asked


def _refuse(where: str) -> Callable[..., Any]:
    def call(*_: Any, **__: Any) -> Any:
        raise AssertionError(f"{where} was called")

    return call


def compare(
    task: Judging, make: Callable[[], Grpo], seeds: Sequence[int], how: How, launches: Counter[str]
) -> set[str]:
    """A step for each seed, natively and in Triton; returns the ops that were asked for Triton."""
    truth, mine = make(), make()
    with only("native", how):
        wanted = [take_step(truth, task.prompts, task.reward, seed=seed) for seed in seeds]
    generation = truth.generator._generation
    assert generation is not None
    assert generation.native  # else the rollouts would have used the native ops one by one
    assert not launches
    with only("triton", how) as asked:
        found = [take_step(mine, task.prompts, task.reward, seed=seed) for seed in seeds]
    for one, true_one in zip(found, wanted, strict=True):
        assert_not_equal_by_nature(true_one)
        assert_equal_steps(one, true_one)
    assert apart(mine.trainer.model, task.policy) > 1e-3
    assert apart(mine.trainer.model, truth.trainer.model) <= 1e-5
    return asked


# --- The tests -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "config", "seed", "how", "kernels", "op"),
    [
        pytest.param(*("llama", {}, 63, "use", OF_TOKENS, "token_loss"), marks=pytest.mark.slow),
        (
            "qwen3",
            {"variant": "gspo"},
            61,
            "environment",
            OF_SEQUENCES | OF_SHARES,
            "token_logprobs",
        ),
    ],
)
def test_a_step_in_triton_is_the_native_one(
    model: str,
    config: dict[str, Any],
    seed: int,
    how: How,
    kernels: set[str],
    op: str,
    tiny_model: Path,
    launches: Counter[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if kernels > OF_SHARES:  # of a context; unasked a share has 128 tokens
        monkeypatch.setattr(paged_attention_kernels, "SHARE", tl.constexpr(4))
    tokenizer = load_tokenizer(tiny_model)
    prompts = [tokenizer(text)["input_ids"] for text in ("0 + 1 =", "2 =")]
    task = Judging(model, tokenizer, prompts, "AB")
    settings, rollout = {"minibatches": 2, **config}, {"samples": 3, "max_new_tokens": 5}
    asked = compare(task, lambda: task.grpo(settings, rollout), [seed], how, launches)
    assert set(launches) == ALWAYS | kernels
    assert asked - WITHOUT_KERNEL == OPS | {op}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "config", "seeds"),
    [
        (
            "llama",
            {
                "old_logprobs": "recompute",
                "correction": "mask_sequence",
                "correction_high": 1.1,
                "kl": "k2",
            },
            [96, 97],
        ),
        (
            "qwen3",
            {
                "old_logprobs": "recompute",
                "correction": "truncate",
                "dual_clip": 3.0,
                "scale": "none",
            },
            [21, 22],
        ),
    ],
)
def test_two_steps_with_prompts_of_more_than_a_block(
    model: str,
    config: dict[str, Any],
    seeds: list[int],
    tiny_model: Path,
    tiny_pairs: Path,
    launches: Counter[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The second step samples from what the first has learned; updates are cut further."""
    monkeypatch.setattr(paged_attention_kernels, "SHARE", tl.constexpr(16))
    tokenizer, pairs = load_tokenizer(tiny_model), read_pairs(tiny_pairs)[:2]
    prompts = [encode(tokenizer, load_prompt("compact").render(pair)) for pair in pairs]
    task = Judging(model, tokenizer, prompts, [pair.label for pair in pairs])
    settings = {"minibatches": 2, "old_logprobs": "recompute", **config}
    rollout = {"samples": 3, "max_new_tokens": 8, "temperature": 0.9, "top_p": 0.95}
    compare(task, lambda: task.grpo(settings, rollout, micro=40), seeds, "use", launches)
    sequences = config.get("correction") == "mask_sequence"
    assert set(launches) == ALWAYS | OF_SHARES | (OF_SEQUENCES if sequences else OF_TOKENS)


def test_no_kernel_is_left_out() -> None:
    """Those that ran above are all there are: what the compile gate compiles."""
    there = {name_of(case.kernel) for one in kernel_modules("*_triton.py") for case in one.CASES}
    assert there == ALWAYS | OF_SHARES | OF_TOKENS | OF_SEQUENCES


def test_what_must_not_run_fails() -> None:
    row = torch.ones(1, 8)
    with (
        only("triton", "use"),
        use("native"),
        pytest.raises(AssertionError, match=r"_C\.rmsnorm was called"),
    ):
        rmsnorm(row, row[0], 1e-5)
    with only("native", "use"):
        assert rmsnorm(row, row[0], 1e-5).shape == row.shape
        with use("reference"), pytest.raises(AssertionError, match=r"rmsnorm\.reference was"):
            rmsnorm(row, row[0], 1e-5)
