"""Streams of a generator: samples as they finish, cancellation, text as it grows, and what goes
wrong in one request or in a step.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from rmr1.engine.generator import Finished, Generator, Piece, Rollout, RolloutStream, SamplingParams
from rmr1.engine.model import CausalLM, ModelConfig

VOCABULARY = 300
CONFIG = LlamaConfig(
    vocab_size=VOCABULARY,
    hidden_size=48,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=256,
    initializer_range=0.3,  # far-apart logits
    bos_token_id=None,
    eos_token_id=None,
)
TOKEN_BYTES = 2 * 2 * 2 * 8 * 4  # keys and values, layers, heads, head size, fp32
PROMPTS = [[5, 6, 7, 8], [9, 10], [11] * 30, [12, 13, 14]]


def greedy(new: int = 8, **options: Any) -> SamplingParams:
    return SamplingParams(temperature=0, max_new_tokens=new, **options)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, and a tag that is one token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<eos>", special=True)])
    tokenizer.add_tokens([AddedToken("<answer>")])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.fixture(scope="module")
def model() -> CausalLM:
    torch.manual_seed(0)
    return CausalLM(ModelConfig.from_dict(CONFIG.to_dict()))


class Scripted(CausalLM):
    """A model that says a text from wherever a prompt ends: token p is followed by script[p]."""

    def __init__(self, script: list[int]) -> None:
        sizes = {"hidden_size": VOCABULARY, "head_dim": 50, "num_hidden_layers": 1}
        super().__init__(ModelConfig.from_dict({**CONFIG.to_dict(), **sizes}))
        self.script = torch.tensor(script)
        with torch.no_grad():
            self.lm_head_weight.copy_(torch.eye(VOCABULARY) * 100)

    def forward(self, token_ids: torch.Tensor, positions: torch.Tensor, attend: Any) -> Any:
        said = self.script[positions.clamp(max=len(self.script) - 1)]
        return torch.nn.functional.one_hot(said, VOCABULARY).float()


def failing(model: CausalLM, at: int, error: BaseException) -> CausalLM:
    """A copy whose forward raises once, in one of its steps."""
    other = CausalLM(model.config)
    other.load_state_dict(model.state_dict())
    plain, steps = other.forward, iter(range(10**9))

    def forward(*given: Any) -> torch.Tensor:
        if next(steps) == at:
            raise error
        return plain(*given)

    other.forward = forward  # type: ignore[assignment, method-assign]
    return other


def assert_idle(generator: Generator) -> None:
    generation = generator._generation
    assert generation is not None
    assert generation.pool.free == generation.pool.count == generation.plan.blocks
    assert not generation.pool.users.any()
    assert generation.rows.free == generation.rows.capacity
    assert not generation.scheduler.running
    assert not generator._streams


def by_place(finished: list[Finished]) -> dict[tuple[int, int], Rollout]:
    found = {(one.prompt, one.sample): one.rollout for one in finished}
    assert len(found) == len(finished)
    return found


# --- Whole samples -------------------------------------------------------------------------------


def test_a_later_prompt_may_draw_as_the_first(model: CausalLM, tokenizer: Any) -> None:
    """A server's answers must not depend on how many came before."""
    params = SamplingParams(n=2, temperature=1.0, max_new_tokens=8, seed=5)
    alone = Generator(model, tokenizer).generate([PROMPTS[0]], params)[0]
    stream = Generator(model, tokenizer).stream([PROMPTS[1]], params)
    as_first = stream.add(PROMPTS[0], params, draws_as=0)
    as_itself = stream.add(PROMPTS[0], params)
    found = by_place(list(stream))
    for sample in range(2):
        assert found[as_first, sample].token_ids == alone[sample].token_ids
    assert any(found[as_itself, s].token_ids != alone[s].token_ids for s in range(2))


def test_samples_come_as_they_finish(model: CausalLM, tokenizer: Any) -> None:
    generator = Generator(model, tokenizer)
    stream = generator.stream(PROMPTS[:3], [greedy(20), greedy(3), greedy(9, n=2)])
    assert stream.unfinished == 4
    first = next(stream)
    assert (first.prompt, first.sample, len(first.rollout.token_ids)) == (1, 0, 3)
    assert stream.unfinished == 3
    rest = list(stream)
    assert [(one.prompt, one.sample) for one in rest] == [(2, 0), (2, 1), (0, 0)]
    assert stream.unfinished == 0
    assert next(stream, None) is None
    whole = Generator(model, tokenizer).generate(PROMPTS[:3], [greedy(20), greedy(3), greedy(9)])
    assert [one.rollout.token_ids for one in (rest[2], first, rest[0])] == [
        group[0].token_ids for group in whole
    ]
    assert_idle(generator)


def test_each_request_has_its_own_settings(model: CausalLM, tokenizer: Any) -> None:
    params = [
        greedy(5),
        SamplingParams(n=3, temperature=0.8, seed=3, max_new_tokens=7),
        SamplingParams(top_k=1, max_new_tokens=4),
        greedy(30, stop_token_ids=tuple(range(0, 300, 3))),
    ]
    generator = Generator(model, tokenizer)
    together = generator.generate(PROMPTS, params)
    assert [len(group) for group in together] == [1, 3, 1, 1]
    lengths = [len(group[0].token_ids) for group in together]
    assert lengths[:3] == [5, 7, 4]
    assert lengths[3] < 30
    assert len({tuple(one.token_ids) for one in together[1]}) == 3
    for place, each in enumerate(params):  # at its place in a list where all have its settings
        alone = Generator(model, tokenizer).generate(PROMPTS, each)
        assert alone[place] == together[place]
    assert by_place(list(generator.stream(PROMPTS, params))) == {
        (p, s): rollout for p, group in enumerate(together) for s, rollout in enumerate(group)
    }


def test_settings_must_be_one_a_prompt(model: CausalLM, tokenizer: Any) -> None:
    generator = Generator(model, tokenizer)
    with pytest.raises(ValueError, match="params is a list of 3, and there are 2 prompts"):
        generator.generate(PROMPTS[:2], [greedy()] * 3)
    with pytest.raises(ValueError, match="params is a list of 0, and there are 1 prompts"):
        generator.stream(PROMPTS[:1], [])
    with pytest.raises(ValueError, match="params is missing"):
        generator.stream(PROMPTS)
    assert generator.generate([], []) == []
    assert list(generator.stream()) == []


def test_requests_are_added_while_others_run(model: CausalLM, tokenizer: Any) -> None:
    generator = Generator(model, tokenizer, kv_memory_gb=1e-3)
    stream = generator.stream([PROMPTS[0]], greedy(12))
    generator._step()
    assert stream.add(PROMPTS[1], greedy(2)) == 1
    generator._step()
    assert stream.add(PROMPTS[2], greedy(3, n=2)) == 2
    found = list(stream)
    assert [(one.prompt, one.sample) for one in found] == [(1, 0), (2, 0), (2, 1), (0, 0)]
    assert stream.add(PROMPTS[3], greedy(4)) == 3  # after the end, too
    found += list(stream)
    whole = Generator(model, tokenizer).generate(PROMPTS, greedy(12))
    for (prompt, _), rollout in by_place(found).items():
        wanted = whole[prompt][0].token_ids
        assert rollout.token_ids == wanted[: len(rollout.token_ids)]
    assert_idle(generator)


def test_a_longer_request_is_added_to_an_open_stream(model: CausalLM, tokenizer: Any) -> None:
    stream = Generator(model, tokenizer).stream()
    stream.add([1] * 5, greedy(5))
    stream.add([1] * 150, greedy(50))
    assert sorted(len(one.rollout.token_ids) for one in stream) == [5, 50]


def test_streams_share_a_batch(model: CausalLM, tokenizer: Any) -> None:
    """Whoever is asked works for all; each gets its own, and `generate` runs between."""
    generator = Generator(model, tokenizer, kv_memory_gb=1e-3)
    one = generator.stream(PROMPTS[:2], [greedy(9), greedy(3)])
    other = generator.stream(PROMPTS[2:], [greedy(2), greedy(20)])
    found: dict[str, list[Finished]] = {"one": [next(one)], "other": [next(other)]}
    assert [found[name][0].prompt for name in found] == [1, 0]
    [[between]] = generator.generate([PROMPTS[0]], greedy(15))
    assert one.unfinished == 0  # done meanwhile
    found["one"] += one
    found["other"] += other
    whole = Generator(model, tokenizer).generate(PROMPTS, greedy(20))
    assert between.token_ids == whole[0][0].token_ids[:15]
    for name, offset in (("one", 0), ("other", 2)):
        places = by_place(found[name])
        assert set(places) == {(0, 0), (1, 0)}
        for (prompt, _), rollout in places.items():
            wanted = whole[offset + prompt][0].token_ids
            assert rollout.token_ids == wanted[: len(rollout.token_ids)]
    assert_idle(generator)


# --- Control -------------------------------------------------------------------------------------


def test_cancel_a_sample_and_a_prompt(model: CausalLM, tokenizer: Any) -> None:
    generator = Generator(model, tokenizer)
    stream = generator.stream(PROMPTS, [greedy(9, n=3), greedy(4), greedy(9), greedy(9, n=2)])
    stream.cancel(0, 1)
    generator._step()
    stream.cancel(3)
    assert stream.unfinished == 4
    first = next(stream)
    assert first.prompt == 1
    stream.cancel(1)  # finished: nothing to do
    stream.cancel(0, 1)  # twice
    stream.cancel(2)
    assert set(by_place(list(stream))) == {(0, 0), (0, 2)}
    assert_idle(generator)


@pytest.mark.parametrize(
    ("prompt", "sample", "message"),
    [
        (2, None, "prompt must be from 0 to 1, got 2"),
        (-1, 0, "prompt must be from 0 to 1, got -1"),
        (1, 3, "sample must be from 0 to 2, got 3"),
        (0, -1, "sample must be from 0 to 0, got -1"),
    ],
)
def test_cancel_what_is_not_there(
    model: CausalLM, tokenizer: Any, prompt: int, sample: int | None, message: str
) -> None:
    stream = Generator(model, tokenizer).stream(PROMPTS[:2], [greedy(), greedy(n=3)])
    with pytest.raises(ValueError, match=message):
        stream.cancel(prompt, sample)
    assert len(list(stream)) == 4


def test_close_gives_everything_back(model: CausalLM, tokenizer: Any) -> None:
    generator = Generator(model, tokenizer)
    stream = generator.stream(PROMPTS, [greedy(2), greedy(2), *[greedy(50)] * 2])
    first = next(stream)
    stream.close()
    assert_idle(generator)
    assert [first.prompt, *(one.prompt for one in stream)] == [0, 1]  # finished before
    stream.close()
    assert next(stream, None) is None
    other = generator.stream(PROMPTS[:1], greedy(3))
    Generator(model, tokenizer).stream(PROMPTS[:1], greedy(3)).close()
    assert stream.add(PROMPTS[1], greedy(5)) == 4
    assert [one.prompt for one in stream] == [4]
    assert len(list(other)) == 1


def test_a_failing_progress_bar_leaves_nothing_behind(model: CausalLM, tokenizer: Any) -> None:
    generator = Generator(model, tokenizer)

    def progress(finished: int, tokens: int) -> None:
        raise RuntimeError("no terminal")

    other = generator.stream(PROMPTS[:1], greedy(3))
    with pytest.raises(RuntimeError, match="no terminal"):
        generator.generate(PROMPTS[:2], greedy(), progress=progress)
    assert len(list(other)) == 1
    assert_idle(generator)


def test_a_progress_bar_that_asks_another_stream(model: CausalLM, tokenizer: Any) -> None:
    generator = Generator(model, tokenizer)
    other, found = generator.stream(PROMPTS[:1], greedy(30)), list[Finished]()
    outputs = generator.generate(
        PROMPTS[:2], greedy(), progress=lambda finished, tokens: found.extend(other)
    )
    assert [len(one.token_ids) for [one] in outputs] == [8, 8]
    assert [len(one.rollout.token_ids) for one in found] == [30]


# --- What goes wrong in one request --------------------------------------------------------------

BAD: list[Any] = [
    ([], greedy(), r"prompts\[2\] is empty"),
    ([3, 300, 4], greedy(), r"prompts\[2\] .*token id 300, .*vocabulary has 300 words"),
    ([-2], greedy(), r"prompts\[2\] .*token id -2"),
    ([1] * 200, greedy(57), r"prompts\[2\] has 200 tokens.*max_new_tokens=57.*256 positions"),
    ([1.5, 2], greedy(), r"prompts\[2\] must be a list of token ids, got \[1.5, 2\]"),
    ([[1, 2]], greedy(), r"prompts\[2\] must be a list of token ids, got \[\[1, 2\]\]"),
    ([1, 2**70], greedy(), r"prompts\[2\] must be a list of token ids, got \[1, 11805"),
    # 10 blocks of 16 tokens.
    ([1] * 150, greedy(12), r"150 tokens and max_new_tokens=12 need .* GB .*11 .* and .*10 blocks"),
]


@pytest.mark.parametrize(("prompt", "params", "message"), BAD)
def test_a_bad_request_harms_nobody(
    model: CausalLM, tokenizer: Any, prompt: Any, params: SamplingParams, message: str
) -> None:
    generator = Generator(model, tokenizer, kv_memory_gb=(10 * 16 * TOKEN_BYTES + 1) / 1e9)
    wanted = generator.generate(PROMPTS[:3], greedy())
    stream = generator.stream(PROMPTS[:2], greedy())
    generator._step()
    with pytest.raises(ValueError, match=message):
        stream.add(prompt, params)
    with pytest.raises(ValueError, match=message.replace("[2", "[1")):
        generator.generate([PROMPTS[0], prompt], [greedy(), params])
    with pytest.raises(ValueError, match=message.replace("[2", "[0")):
        generator.stream([prompt], params)
    assert stream.add(PROMPTS[2], greedy()) == 2  # the refused one has no number
    assert by_place(list(stream)) == {(p, 0): group[0] for p, group in enumerate(wanted)}
    assert_idle(generator)


@pytest.mark.parametrize(
    ("extreme", "message"),
    [
        ({"top_k": 2**31}, r"top_k must be below 2\^31, got 2147483648"),
        ({"top_p": 1e-46}, "top_p must be .*got 1e-46"),
        ({"temperature": 1e39}, r"temperature must be .*got 1e\+39"),
        ({"temperature": 1e-46}, "temperature must be .*got 1e-46"),
    ],
)
def test_numbers_too_large_or_small_for_a_step(extreme: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingParams(**extreme)


def test_the_last_numbers_that_are_not(model: CausalLM, tokenizer: Any) -> None:
    for good in ({"top_k": 2**31 - 1}, {"top_p": 1e-30}, {"temperature": 1e30}, {"min_p": 1e-300}):
        params = SamplingParams(max_new_tokens=3, **good)
        [[rollout]] = Generator(model, tokenizer).generate(PROMPTS[:1], params)
        assert np.isfinite(rollout.logprobs).all()
        assert np.isfinite(rollout.sampled_logprobs or [np.nan]).all()


def test_a_pool_of_no_blocks(model: CausalLM, tokenizer: Any) -> None:
    with pytest.raises(ValueError, match=r"1e-09 GB .*one block of 16 tokens .*raise kv_memory_gb"):
        Generator(model, tokenizer, kv_memory_gb=1e-9).stream()


# --- What goes wrong in a step -------------------------------------------------------------------


@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt()], ids=type)
@pytest.mark.parametrize("at", [0, 1, 4])
def test_an_error_in_a_step_gives_everything_back(
    model: CausalLM, tokenizer: Any, error: BaseException, at: int
) -> None:
    generator = Generator(failing(model, at, error), tokenizer, max_batch_tokens=16)
    stream = generator.stream(PROMPTS, greedy(n=2))
    with pytest.raises(type(error)):
        list(stream)
    assert stream.unfinished == 0
    assert_idle(generator)
    with pytest.raises(RuntimeError, match="dropped: a step of the generator failed"):
        next(stream)  # it does not end as if these had been all
    stream.close()
    wanted = Generator(model, tokenizer).generate(PROMPTS, greedy(n=2))
    found = generator.generate(PROMPTS, greedy(n=2))
    assert [[one.token_ids for one in group] for group in found] == [
        [one.token_ids for one in group] for group in wanted
    ]
    assert_idle(generator)


def test_what_was_finished_before_an_error_is_still_there(model: CausalLM, tokenizer: Any) -> None:
    generator = Generator(failing(model, 3, RuntimeError("boom")), tokenizer)
    stream = generator.stream(PROMPTS[:3], [greedy(2), greedy(2), greedy()])
    assert next(stream).prompt == 0
    assert next(stream).prompt == 1
    with pytest.raises(RuntimeError, match="boom"):
        next(stream)
    assert stream.unfinished == 0
    assert_idle(generator)


def test_what_was_finished_comes_before_the_error(model: CausalLM, tokenizer: Any) -> None:
    generator = Generator(failing(model, 3, RuntimeError("boom")), tokenizer)
    one = generator.stream(PROMPTS[:2], [greedy(2), greedy()])
    other = generator.stream(PROMPTS[:1], greedy())
    with pytest.raises(RuntimeError, match="boom"):
        list(other)
    assert next(one).prompt == 0
    with pytest.raises(RuntimeError, match="dropped"):
        next(one)


def test_every_stream_learns_of_an_error(model: CausalLM, tokenizer: Any) -> None:
    generator = Generator(failing(model, 1, RuntimeError("boom")), tokenizer)
    one, other = generator.stream(PROMPTS[:1], greedy()), generator.stream(PROMPTS[:1], greedy())
    with pytest.raises(RuntimeError, match="boom"):
        list(one)
    with pytest.raises(RuntimeError, match="dropped") as found:
        list(other)
    assert str(found.value.__cause__) == "boom"
    third = generator.stream(PROMPTS[:1], greedy())
    assert len(list(third)) == 1
    generator = Generator(failing(model, 1, RuntimeError("boom")), tokenizer)
    one, other = generator.stream(PROMPTS[:1], greedy()), generator.stream(PROMPTS[:1], greedy())
    with pytest.raises(RuntimeError, match="boom"):
        list(one.pieces())
    with pytest.raises(RuntimeError, match="dropped"):
        list(other.pieces())


def test_a_stream_may_go_on_after_an_error(model: CausalLM, tokenizer: Any) -> None:
    generator = Generator(failing(model, 1, RuntimeError("boom")), tokenizer)
    stream = generator.stream(PROMPTS[:1], greedy())
    with pytest.raises(RuntimeError, match="boom"):
        list(stream)
    with pytest.raises(RuntimeError, match="dropped"):
        list(stream)
    assert stream.add(PROMPTS[1], greedy()) == 1
    assert [one.prompt for one in stream] == [1]


def test_damaged_weights_are_refused(tokenizer: Any) -> None:
    torch.manual_seed(1)
    model = CausalLM(ModelConfig.from_dict(CONFIG.to_dict()))
    generator = Generator(model, tokenizer)
    good = model.model.norm.weight.detach().clone()
    with torch.no_grad():
        model.model.norm.weight[3] = torch.nan
    with pytest.raises(ValueError, match=r"logits for prompt 0 are not finite after 0 tokens"):
        generator.generate(PROMPTS, greedy())
    assert_idle(generator)
    with torch.no_grad():
        model.model.norm.weight.copy_(good)
    assert len(generator.generate(PROMPTS, greedy())) == 4


# --- Text as it grows ----------------------------------------------------------------------------


def joined(pieces: Iterator[Piece]) -> tuple[dict[tuple[int, int], list[str]], list[Piece]]:
    """The pieces of each sample, and the last ones; nothing comes after a sample's last one."""
    texts: dict[tuple[int, int], list[str]] = defaultdict(list)
    last: dict[tuple[int, int], Piece] = {}
    for piece in pieces:
        place = (piece.prompt, piece.sample)
        assert place not in last
        assert piece.text or piece.rollout
        texts[place].append(piece.text)
        if piece.rollout is not None:
            last[place] = piece
    for place, piece in last.items():
        assert piece.rollout is not None
        assert "".join(texts[place]) == piece.rollout.text
    return texts, list(last.values())


TEXT = "Rubric: né 漢字, 👩‍🚀🙂🏽 ok. <answer>[[A]] END."


def said_from(text: str, tokenizer: Any, starts: list[int]) -> tuple[Scripted, list[list[int]]]:
    """A model that says `text`, and prompts after which it begins at these characters."""
    before = [len(tokenizer.encode(text[:start])) for start in starts]
    return Scripted([0, *tokenizer.encode(text)]), [[1] * (size + 2) for size in before]


def test_pieces_are_whole_characters(tokenizer: Any) -> None:
    model, prompts = said_from(TEXT, tokenizer, [0, 8, 11])
    generator = Generator(model, tokenizer)
    ends = [len(tokenizer.encode(TEXT[start:])) for start in (0, 8, 11)]
    stream = generator.stream(prompts, [greedy(ends[0], n=3), greedy(ends[1]), greedy(ends[2])])
    texts, last = joined(stream.pieces())
    assert {place: "".join(pieces) for place, pieces in texts.items()} == {
        **dict.fromkeys([(0, 0), (0, 1), (0, 2)], TEXT),
        (1, 0): TEXT[8:],
        (2, 0): TEXT[11:],
    }
    assert len(last) == 5
    for pieces in texts.values():
        assert "\ufffd" not in "".join(pieces)
        # One a character, or a token of several: what is known is shown at once.
        assert max(map(len, pieces)) <= len("<answer>")
        assert len(pieces) > 20
    assert_idle(generator)


def test_half_a_character_comes_only_where_the_text_ends_in_it(tokenizer: Any) -> None:
    model, prompts = said_from("ab🙂", tokenizer, [0])
    pieces = list(Generator(model, tokenizer).stream(prompts, greedy(4)).pieces())
    assert [piece.text for piece in pieces[:2]] == ["a", "b"]
    [last] = pieces[2:]
    assert last.rollout is not None
    assert last.rollout.text == "ab\ufffd"
    assert last.text == "\ufffd"


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        (("END",), TEXT[:-4]),
        (("[[A]] END.",), TEXT[: TEXT.index("[[")]),
        (("字, 👩\u200d🚀🙂🏾", "🙂🏽 o"), TEXT[: TEXT.index("🙂")]),
        (("漢字",), "Rubric: né "),
        (("k. <answer>[",), TEXT[: TEXT.index("k.")]),
        (("Rub",), ""),
        (("bric!", "c: no", "é 漢Z"), TEXT),
    ],
)
def test_pieces_never_show_a_part_of_a_stop_string(
    tokenizer: Any, stop: tuple[str, ...], expected: str
) -> None:
    model, prompts = said_from(TEXT, tokenizer, [0])
    count = len(tokenizer.encode(TEXT))
    stream = Generator(model, tokenizer).stream(prompts, greedy(count, stop=stop, n=2))
    shown = {0: "", 1: ""}
    for piece in stream.pieces():
        shown[piece.sample] += piece.text
        assert expected.startswith(shown[piece.sample])
        if piece.rollout is not None:
            assert piece.rollout.text == shown[piece.sample] == expected
            assert piece.rollout.finish_reason == ("length" if expected == TEXT else "stop")
    assert shown == {0: expected, 1: expected}


def test_pieces_without_the_end_token(tokenizer: Any) -> None:
    model, prompts = said_from("yes! no", tokenizer, [0])
    stream = Generator(model, tokenizer).stream(
        prompts, greedy(7, stop_token_ids=tokenizer.encode("!"))
    )
    assert [piece.text for piece in stream.pieces()] == ["y", "e", "s", ""]


@pytest.mark.parametrize("memory", [None, 25 * 4 * TOKEN_BYTES / 1e9 + 1e-9])
def test_pieces_of_random_bytes(model: CausalLM, tokenizer: Any, memory: float | None) -> None:
    """Broken characters, samples that are put back, stop strings: joined it is the same text."""
    generator = Generator(model, tokenizer, kv_memory_gb=memory, block_size=4)
    params = [
        SamplingParams(n=3, seed=seed, max_new_tokens=60, stop=stop, temperature=1.5)
        for seed, stop in enumerate([(), ("a", "xy"), ("\ufffd\ufffd\ufffd",), ("é",)])
    ]
    texts, last = joined(generator.stream(PROMPTS, params).pieces())
    assert len(texts) == 12
    places = by_place(
        [Finished(p.prompt, p.sample, p.rollout) for p in last if p.rollout is not None]
    )
    whole = Generator(model, tokenizer, block_size=4).generate(PROMPTS, params)
    for prompt, group in enumerate(whole):
        assert [places[prompt, sample] for sample in range(3)] == group
    assert generator._generation is not None
    assert (generator._generation.scheduler.preemptions > 0) == (memory is not None)
    assert_idle(generator)


def between_pieces(what: str, stream: RolloutStream, other: RolloutStream) -> None:
    if what == "cancel":
        stream.cancel(1)
    elif what == "add":
        stream.add(PROMPTS[3], greedy(5))
    else:
        next(other, None)


@pytest.mark.parametrize("what", ["cancel", "add", "another stream"])
def test_control_between_pieces(model: CausalLM, tokenizer: Any, what: str) -> None:
    generator = Generator(model, tokenizer, kv_memory_gb=1e-3)
    stream = generator.stream(PROMPTS[:3], [greedy(12), greedy(9), greedy(3)])
    other = generator.stream(PROMPTS[:1], greedy(8))
    chance, seen = random.Random(0), list[Piece]()
    for piece in stream.pieces():
        seen.append(piece)
        if len(seen) == 2 or (what == "another stream" and chance.random() < 0.5):
            between_pieces(what, stream, other)
    texts, last = joined(iter(seen))
    expected = {"cancel": {0, 2}, "add": {0, 1, 2, 3}, "another stream": {0, 1, 2}}
    assert {piece.prompt for piece in last} == expected[what]
    assert set(texts) >= {(0, 0), (2, 0)}


def test_whole_samples_and_pieces_may_be_mixed(model: CausalLM, tokenizer: Any) -> None:
    generator = Generator(model, tokenizer)
    stream = generator.stream(PROMPTS[:3], [greedy(12), greedy(6), greedy(3)])
    assert next(stream).prompt == 2
    texts, last = joined(stream.pieces())  # from the beginning, though some was drawn before
    assert [piece.prompt for piece in last] == [1, 0]
    assert set(texts) == {(1, 0), (0, 0)}


def byte_fallback() -> PreTrainedTokenizerFast:
    """As of Llama 2: a character that is no token is bytes, of which a run decodes as a whole."""
    words = {"<unk>": 0, **{f"<0x{byte:02X}>": 1 + byte for byte in range(256)}, "▁": 257, "a": 258}
    tokenizer = Tokenizer(models.BPE(words, [], byte_fallback=True, unk_token="<unk>"))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


@pytest.mark.parametrize("stop", [(), ("🙂",), ("字🙂",)])
def test_pieces_of_a_byte_fallback(stop: tuple[str, ...]) -> None:
    tokenizer, text = byte_fallback(), "漢字漢字漢字漢字🙂aa"
    script = [1 + byte for byte in text[:-2].encode()] + [258, 258]
    model = Scripted([0, *script])
    [*pieces] = Generator(model, tokenizer).stream([[1, 2]], greedy(30, stop=stop)).pieces()
    shown = "".join(piece.text for piece in pieces)
    assert shown == text[: text.index(stop[0]) if stop else None]
    assert pieces[-1].rollout is not None
    assert pieces[-1].rollout.text == shown
    assert pieces[-1].rollout.finish_reason == ("stop" if stop else "length")
    assert len(pieces[-1].rollout.token_ids) == (28 if stop else 30)
    # With "字🙂" every 字 is held back until the next character.
    assert max(len(piece.text) for piece in pieces) == (2 if "字🙂" in stop else 1)


def pieces_by_chance(model: CausalLM, tokenizer: Any, seed: int) -> list[int]:
    """How many samples were finished, cancelled, put back, and how often the weights changed."""
    own = CausalLM(model.config)
    own.load_state_dict(model.state_dict())
    generator = Generator(
        own, tokenizer, kv_memory_gb=(26 * 4 * TOKEN_BYTES + 1) / 1e9, block_size=4
    )
    chance, stream, other = random.Random(seed), generator.stream(), generator.stream()
    settings = [
        SamplingParams(n=n, seed=n, max_new_tokens=20 * n, stop=stop, temperature=1.3)
        for n, stop in ((1, ()), (2, ("a", "xyz")), (3, ("\ufffd\ufffd", "é")))
    ]
    texts, rollouts = defaultdict[tuple[int, int], str](str), dict[tuple[int, int], Rollout]()
    cancelled, added = set[int](), list[SamplingParams]()

    def add(to: RolloutStream) -> None:
        params = chance.choice(settings)
        number = to.add(chance.choice(PROMPTS), params)
        if to is stream:
            assert number == len(added)
            added.append(params)

    for _ in range(6):
        add(stream)
    for piece in stream.pieces():
        place = (piece.prompt, piece.sample)
        assert place not in rollouts
        assert piece.prompt not in cancelled or piece.rollout  # it had finished
        texts[place] = piece.text if piece.anew else texts[place] + piece.text
        if piece.rollout is not None:
            rollouts[place] = piece.rollout
        what = chance.random()
        if what < 0.02 and len(added) < 12:
            add(stream)
        elif what < 0.04 and len(cancelled) < 4:
            cancelled.add(prompt := chance.randrange(len(added)))
            stream.cancel(prompt)
        elif what < 0.05:
            add(other)
        elif what < 0.07:
            next(other, None)
        elif what < 0.09 and generator.weights_version < 3:
            with torch.no_grad():
                own.model.norm.weight.neg_()
    list(other)
    assert_idle(generator)
    assert {place: texts[place] for place in rollouts} == {
        place: rollout.text for place, rollout in rollouts.items()
    }
    samples = {(p, s) for p, params in enumerate(added) for s in range(params.n)}
    assert {prompt for prompt, _ in samples - set(rollouts)} <= cancelled
    assert generator._generation is not None
    put_back = generator._generation.scheduler.preemptions
    return [len(rollouts), len(cancelled), put_back, generator.weights_version]


def test_pieces_whatever_happens_between_them(model: CausalLM, tokenizer: Any) -> None:
    """Samples added, cancelled, put back and begun anew, another stream: the text is the same."""
    counts = [pieces_by_chance(model, tokenizer, seed) for seed in range(6)]
    assert all(sum(column) > 5 for column in zip(*counts, strict=True))
