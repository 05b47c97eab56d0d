"""Tables of what ends a sample: few tokens are asked about, none is missed, they are made once."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

import rmr1
from rmr1.engine.detokenize import StopStrings, TokenTexts, decode
from rmr1.engine.endings import BEFORE, ENDS, MAY_END, ONLY_AFTER, Endings
from rmr1.engine.generator import Generator, SamplingParams
from rmr1.engine.model import CausalLM, ModelConfig
from rmr1.engine.sequences import Request, Rows, new_sequences
from rmr1.engine.sequences import Sequence as Sample

POCKET = Path(rmr1.__file__).parent / "pocket"
SMOL = Path.home() / ".cache/rmr1/SmolLM2-135M-Instruct"
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
# As GPT-2 writes bytes: what is visible as it is, the rest as letters from 256 on.
VISIBLE = {*range(33, 127), *range(161, 173), *range(174, 256)}
HIDDEN = [byte for byte in range(256) if byte not in VISIBLE]
LETTERS = [chr(byte if byte in VISIBLE else 256 + HIDDEN.index(byte)) for byte in range(256)]
PIECES = ["▁", "▁▁", "▁▁▁", "a", "b", "▁a", "a▁b", "▁answer", "answer", ":", "▁:", "\n", "é", "▁字",
          "er:", "ans", "w", "▁yes", ".", "字字", "meanwhile"]  # fmt: skip
SPECIAL = ["<unk>", "<eos>"]


def word_level(words: Sequence[str], decoder: Any) -> PreTrainedTokenizerFast:
    """These words, specials, and a tag with a space that is one token but not special."""
    known = {word: token for token, word in enumerate([*SPECIAL, *words])}
    tokenizer = Tokenizer(models.WordLevel(known, unk_token="<unk>"))
    if decoder is not None:
        tokenizer.decoder = decoder
    tokenizer.add_special_tokens([AddedToken(word, special=True) for word in SPECIAL])
    tokenizer.add_tokens([AddedToken("<the answer>")])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>")


def byte_level() -> PreTrainedTokenizerFast:
    """Every byte, words, and tokens that begin or end in the middle of a character."""
    parts = [text.encode() for text in (" answer", "ans", "er:", ": ", " \n", "  ", "\n\n", "字")]
    parts += ["é".encode()[1:] + b" ", b"a" + "字".encode()[:1], "字".encode()[1:] + b":"]
    words = ["".join(LETTERS[byte] for byte in part) for part in parts]
    return word_level([*LETTERS, *words], decoders.ByteLevel())


class Stripping(PreTrainedTokenizerFast):
    """As transformers' tokenizers for plain sentencepiece models, which strip both ends."""

    def _decode(self, *args: Any, **options: Any) -> str:
        return str(super()._decode(*args, **options)).strip()


def stripping() -> Stripping:
    words = ["meanwhile", *BYTES, *PIECES[:-1]]  # the bytes are words like others here
    plain = word_level(words, decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()]))
    return Stripping(tokenizer_object=plain.backend_tokenizer, unk_token="<unk>", eos_token="<eos>")


def llama(strip: bool) -> PreTrainedTokenizerFast:
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if strip:
        steps.append(decoders.Strip(" ", 1, 0))
    return word_level([*BYTES, *PIECES], decoders.Sequence(steps))


WORDS = ["an", "##swer", "answer", ":", "yes", "##:", "##字", "a", "b", "##b"]
SUFFIXED = ["an", "swer</w>", "answer</w>", ":</w>", "yes</w>", ":", "字</w>", "a", "b</w>", "\n"]
TOKENIZERS: dict[str, Callable[[], Any]] = {
    "bytes": byte_level,
    "byte fallback": lambda: llama(strip=False),
    "byte fallback, stripped": lambda: llama(strip=True),
    "metaspace": lambda: word_level(PIECES, decoders.Metaspace()),
    "wordpiece": lambda: word_level(WORDS, decoders.WordPiece(cleanup=False)),
    "joined by spaces": lambda: word_level(["answer", ":", "yes", "a", "b", "\n"], None),
    "suffixes": lambda: word_level(SUFFIXED, decoders.BPEDecoder("</w>")),
    "stripped at both ends": stripping,
    "no letters": lambda: word_level(["字", "é", ":", "\n", " "], decoders.Fuse()),
    "pocket": lambda: AutoTokenizer.from_pretrained(POCKET),
}


@pytest.fixture(scope="module")
def pocket() -> Any:
    return AutoTokenizer.from_pretrained(POCKET)


def config(words: int) -> ModelConfig:
    return ModelConfig.from_dict(
        LlamaConfig(
            vocab_size=words,
            hidden_size=words,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=1,
            head_dim=16,
            bos_token_id=None,
            eos_token_id=None,
        ).to_dict()
    )


def stopping(*stop: str, **options: Any) -> SamplingParams:
    return SamplingParams(stop=stop, **options)


def started(rows: Rows, flags: np.ndarray, tokens: Sequence[int] = (), new: int = 64) -> Sample:
    """A running sample that has drawn these tokens."""
    request = Request(np.array([1]), SamplingParams(max_new_tokens=new), 0, flags)
    [sample] = new_sequences(request, iter([0]))
    sample.tokens = np.array(tokens, dtype=np.int64)
    sample.logprobs = np.zeros((2, len(tokens)), dtype=np.float32)
    rows.start(sample)
    return sample


def asked(flags: np.ndarray, tokens: Sequence[int]) -> list[bool]:
    """After which of a sample's tokens its text is looked at."""
    rows = Rows(1, 1)
    row = np.array([started(rows, flags, new=len(tokens)).row])
    found = []
    for token in tokens:
        drawn = np.array([token])
        rows.draw(row, drawn, np.zeros((2, 1), dtype=np.float32))
        [meaning] = rows.flags(row, drawn)
        assert meaning | ENDS | MAY_END == ENDS | MAY_END
        found.append(bool(meaning & MAY_END))
    return found


# --- No stop string is missed --------------------------------------------------------------------


def some_stops(text: str, chance: random.Random) -> tuple[str, ...]:
    """Parts of a text, some that end in white space."""
    stops = []
    for _ in range(chance.randint(1, 3)):
        spaces = [place + 1 for place, one in enumerate(text) if one.isspace()]
        end = chance.choice(spaces) if spaces and chance.random() < 0.5 else len(text)
        end = end if chance.random() < 0.7 else chance.randint(1, len(text))
        stops.append(text[max(0, end - chance.randint(1, 15)) : end])
    return tuple(stops)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_every_token_that_completes_a_stop_string_is_asked_about(name: str) -> None:
    tokenizer = TOKENIZERS[name]()
    words = [tokenizer.convert_ids_to_tokens(token) for token in range(len(tokenizer))]
    byte = [token for token, word in enumerate(words) if len(word) == 1 or word.startswith("<0x")]
    other = sorted(set(range(len(words))).difference(byte))
    endings = Endings(config(len(words) + 3), tokenizer)
    chance, completed = random.Random(0), 0
    for _ in range(400):
        # Not all of those that are bytes, and of all so few that some follow each other often.
        few = chance.sample(byte, min(6, len(byte))) + chance.sample(other, min(24, len(other)))
        tokens = chance.choices(chance.sample(few, 5), k=chance.randint(1, 12))
        grown = [decode(tokenizer, tokens[:size]) for size in range(len(tokens) + 1)]
        if not grown[-1]:
            continue
        stop = some_stops(grown[-1], chance)
        looked = asked(endings.flags(stopping(*stop, ignore_eos=True)), tokens)
        for place, (before, after) in enumerate(pairwise(grown)):
            if any(one in after and one not in before for one in stop):
                completed += 1
                assert looked[place], (stop, grown)
    assert completed > 200


@pytest.mark.parametrize("stop", ["é ", "字: ", "é字", "answer: ", ":\n", "\n\n", " "])
@pytest.mark.parametrize("name", ["bytes", "byte fallback", "byte fallback, stripped"])
def test_a_stop_string_in_single_bytes(name: str, stop: str) -> None:
    tokenizer = TOKENIZERS[name]()
    written = LETTERS if name == "bytes" else BYTES
    special, tokens = tokenizer.eos_token_id, list[int]()
    for byte in f"a{stop}".encode():
        tokens += tokenizer.convert_tokens_to_ids(written[byte]), special
    assert decode(tokenizer, tokens) == f"a{stop}"
    endings = Endings(config(len(tokenizer)), tokenizer)
    for drawn in (tokens[:-1], tokens[:-1:2]):
        assert asked(endings.flags(stopping(stop, ignore_eos=True)), drawn)[-1]


@pytest.mark.parametrize("name", ["bytes", "byte fallback", "byte fallback, stripped", "metaspace"])
def test_texts_of_tokens_that_join(name: str) -> None:
    tokenizer = TOKENIZERS[name]()
    texts = TokenTexts(tokenizer, len(tokenizer) + 3)
    assert texts.join
    odd = [tokenizer.convert_ids_to_tokens(int(t)) for t in np.nonzero(texts.unsure)[0][:-3]]
    # Metaspace drops both spaces of "a▁b" at the beginning of a text, and keeps none in the middle.
    assert odd == (["a▁b"] if name == "metaspace" else [])
    assert texts.unsure[-3:].all()
    assert all(texts._texts[token] == "" for token in tokenizer.all_special_ids)
    assert texts._texts[tokenizer.convert_tokens_to_ids("<the answer>")] == "<the answer>"


@pytest.mark.parametrize("name", ["suffixes", "stripped at both ends", "no letters"])
def test_where_texts_do_not_join_spaces_are_looked_for_everywhere(name: str) -> None:
    tokenizer = TOKENIZERS[name]()
    words = len(tokenizer)
    assert not TokenTexts(tokenizer, words).join
    assert StopStrings(tokenizer, ("answer: ",), words).may_end.all()
    colons = StopStrings(tokenizer, ("answer:",), words)
    assert not colons.only_after.any()
    assert 0 < colons.may_end.sum() < words / 2


def test_half_a_character_that_is_not_shown() -> None:
    """A decoder may be silent about it, as about special tokens; it is not taken for one."""

    class Silent(PreTrainedTokenizerFast):
        def _decode(self, *args: Any, **options: Any) -> str:
            return str(super()._decode(*args, **options)).replace("\ufffd", "")

    plain = byte_level()
    tokenizer = Silent(tokenizer_object=plain.backend_tokenizer, eos_token="<eos>")
    texts = TokenTexts(tokenizer, len(tokenizer))
    half = next(t for t in range(len(tokenizer)) if decode(plain, [t]) == "\ufffd")
    assert texts.unsure[half]
    assert not texts.unsure[tokenizer.eos_token_id]


# --- Few tokens are asked about ------------------------------------------------------------------


@pytest.mark.parametrize("directory", [POCKET, SMOL], ids=["pocket", "smol"])
def test_white_space_flags_only_tokens_that_bring_it(directory: Path) -> None:
    if not directory.exists():
        pytest.skip(f"{directory} is not here")
    tokenizer = AutoTokenizer.from_pretrained(directory)
    words = len(tokenizer)
    endings = Endings(config(words), tokenizer)
    texts = [tokenizer.decode([token], skip_special_tokens=True) for token in range(words)]
    lines = endings.flags(stopping("\n")) & MAY_END != 0
    assert lines.tolist() == ["\n" in text for text in texts]
    assert lines.mean() < 0.01
    # Half of all tokens begin with a space: they count only after what may stand before it.
    flags = endings.flags(stopping("answer: "))
    assert not (flags & MAY_END != 0)[[" " not in text for text in texts]].any()
    assert (flags & MAY_END != 0).sum() - (flags & ONLY_AFTER != 0).sum() < 10
    before = {texts[token] for token in np.nonzero(flags & BEFORE)[0]}
    assert before <= {"", *("answer:"[place:] for place in range(7)), " answer:"}


def test_few_looks_at_a_text_of_words(pocket: Any) -> None:
    text = "The answer is not here: it is an answer: yes, and the answer: no."
    endings = Endings(config(len(pocket)), pocket)
    tokens = pocket.encode(text, add_special_tokens=False)
    looked = asked(endings.flags(stopping("answer: ")), tokens)
    grown = [decode(pocket, tokens[: size + 1]) for size in range(len(tokens))]
    assert grown[-1] == text
    assert sum(" " in pocket.decode([token]) for token in tokens) > 10
    assert sum(looked) == 3  # after each ":"
    assert not any(asked(endings.flags(stopping("\n", "answer:\n\n")), tokens))


def test_generation_stops_at_white_space_and_looks_seldom(
    pocket: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks, find = list[list[int]](), StopStrings.find

    def counted(self: StopStrings, token_ids: Sequence[int]) -> int | None:
        looks.append(list(token_ids))
        return find(self, token_ids)

    monkeypatch.setattr(StopStrings, "find", counted)
    text = "It is an answer and one more line of it\nand the answer: yes it is"
    script = pocket.encode(text, add_special_tokens=False)
    model = Scripted(script, config(len(pocket)))
    for stop, kept in (("answer: ", "and the "), ("\n", "It is"), (" is", "It"), ("er: y", "answ")):
        looks.clear()
        params = stopping(stop, temperature=0, max_new_tokens=len(script))
        [[rollout]] = Generator(model, pocket).generate([[1, 2]], params)
        assert rollout.text == text[: text.index(stop)]
        assert kept in rollout.text
        assert rollout.finish_reason == "stop"
        ids = rollout.token_ids
        assert stop in decode(pocket, ids)
        assert stop not in decode(pocket, ids[:-1])
        assert len(looks) <= 2
        assert looks[-1] == ids


class Scripted(CausalLM):
    """A model that says these tokens after a prompt of two."""

    def __init__(self, script: list[int], config: ModelConfig) -> None:
        super().__init__(config)
        self.script = torch.tensor([0, *script])
        with torch.no_grad():
            self.lm_head_weight.copy_(torch.eye(config.vocab_size) * 100)

    def forward(self, token_ids: torch.Tensor, positions: torch.Tensor, attend: Any) -> Any:
        said = self.script[positions.clamp(max=len(self.script) - 1)]
        return torch.nn.functional.one_hot(said, self.config.vocab_size).float()


# --- Made once, kept for a while -----------------------------------------------------------------


def test_a_vocabulary_is_decoded_once(pocket: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, plain = [0], pocket.decode

    def counted(*args: Any, **options: Any) -> Any:
        calls[0] += 1
        return plain(*args, **options)

    monkeypatch.setattr(pocket, "decode", counted)
    endings = Endings(config(len(pocket)), pocket)
    endings.flags(stopping())
    assert calls[0] == 0  # nothing to be looked for
    first = endings.flags(stopping("</answer>"))
    assert len(pocket) <= calls[0] < 1.5 * len(pocket)
    calls[0] = 0
    other = endings.flags(stopping("\n\n", "answer: "))
    endings.flags(stopping("</answer>", stop_token_ids=(3,)))
    assert calls[0] == 0
    assert endings.flags(stopping("</answer>")) is first is not other


def test_settings_that_nobody_uses_are_forgotten() -> None:
    tokenizer = llama(strip=True)
    endings = Endings(config(len(tokenizer)), tokenizer)
    first = endings.flags(stopping("stop 0")).copy()
    for number in range(500):
        params = stopping(f"stop {number}", stop_token_ids=(number,))
        endings.flags(params)
        assert endings.flags(params) is endings.flags(params)
        assert endings.stops(params) is endings.stops(params)
    assert endings._flags.cache_info().currsize <= 32
    assert endings._stops.cache_info().currsize <= 32
    assert np.array_equal(endings.flags(stopping("stop 0")), first)


def test_rows_drop_tables_that_no_row_uses() -> None:
    """While others run; a row that goes on, or comes back, keeps its own."""
    rows = Rows(4, 1)
    tables = [np.full(9, value, dtype=np.uint8) for value in (0, ENDS, MAY_END, ENDS | MAY_END)]
    long = started(rows, tables[0])
    for turn in range(50):
        short = [started(rows, tables[1 + (turn + place) % 3].copy()) for place in range(2)]
        short.append(started(rows, short[0].request.flags))
        here = np.array([one.row for one in (long, *short)])
        meaning = rows.flags(here, np.zeros(4, dtype=np.int64))
        assert meaning.tolist() == [one.request.flags[0] for one in (long, *short)]
        assert len(rows._flag_tables) == 3
        for one, left in zip(short, (3, 2, 1), strict=True):
            rows.stop(one.row)
            assert len(rows._flag_tables) == left
        assert rows.flags(here[:1], np.zeros(1, dtype=np.int64)).tolist() == [0]
    rows.stop(long.row)
    assert not rows._flag_tables
