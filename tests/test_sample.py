"""Sampling in every implementation: against fp64 and numpy's integers, draws against exact
distributions, the noise against what noise must be, and rows that are not as they should be.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rmr1 import _C
from rmr1.kernels.dispatch import use
from rmr1.kernels.sample import Drawn, noise, sample

# numpy's, in Triton's interpreter, where a row holds infinities.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")

NAN, INF = float("nan"), float("inf")
Settings = dict[str, float]
OFF: Settings = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
SETTINGS: list[Settings] = [
    {},
    {"temperature": 0.5},
    {"temperature": 2.0},
    {"top_k": 7},
    {"top_p": 0.6},
    {"top_p": 0.95},
    {"min_p": 0.1},
    {"temperature": 1.3, "top_k": 20, "top_p": 0.8, "min_p": 0.05},
]


@pytest.fixture(params=["reference", "baseline", "avx2", "avx512", "triton"])
def implementation(request: pytest.FixtureRequest) -> Iterator[str]:
    """The reference, the native kernel in every instruction set that is here, and Triton."""
    name = request.param
    native = name not in ("reference", "triton")
    if native and not _C.force_isa(name):
        pytest.skip(f"this processor has no {name}")
    with use("native" if native else name):
        yield name
    _C.force_isa("best")


def columns(rows: int, settings: Settings) -> dict[str, Tensor]:
    """The settings, alike for all rows."""
    dtypes = {"top_k": torch.int32}
    return {
        name: torch.full((rows,), value, dtype=dtypes.get(name, torch.float32))
        for name, value in {**OFF, **settings}.items()
    }


def draw(logits: Tensor, settings: Settings | None = None, keys: Tensor | None = None) -> Drawn:
    """One token a row; the keys count up."""
    keys = torch.arange(len(logits)) if keys is None else keys
    return sample(logits, keys, **columns(len(logits), settings or {}))


def draws(logits: Tensor, settings: Settings, count: int) -> Tensor:
    """Many tokens of one row of logits."""
    return draw(logits.expand(count, -1), settings).tokens


def kept(logits: Tensor, settings: Settings) -> Tensor:
    """What the filters leave of one row, by the plainest route, in fp64: bool [V]."""
    given = {**OFF, **settings}
    p = torch.softmax(logits.double() / given["temperature"], -1)
    left = torch.isfinite(logits)
    if given["top_k"]:
        left &= logits >= logits.sort(descending=True)[0][: int(given["top_k"])][-1]
    if given["top_p"] < 1:
        values, which = logits.unique(return_inverse=True)  # ascending; ties are one value
        mass = torch.zeros(len(values), dtype=torch.float64).index_add(0, which, p * left)
        larger = mass.flip(0).cumsum(0).flip(0) - mass
        left &= (larger < given["top_p"] * mass.sum())[which]
    return left & (p >= given["min_p"] * p.max())


def splitmix(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 on uint64."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def exact_uniforms(keys: Tensor, words: int) -> Tensor:
    """w of every token, rounded to fp32, with numpy's unsigned integers: fp64 [B, V]."""
    key = splitmix(keys.numpy().view(np.uint64))[:, None]
    x = np.arange(words, dtype=np.uint32) ^ key.astype(np.uint32)
    x = (x ^ (x >> np.uint32(17))) * np.uint32(0xED5AD4BB) ^ (key >> np.uint64(32)).astype("u4")
    x = (x ^ (x >> np.uint32(11))) * np.uint32(0xAC4C1B51)
    x = (x ^ (x >> np.uint32(15))) * np.uint32(0x31848BAB)
    bits = (x ^ (x >> np.uint32(14))) >> np.uint32(1)
    w = (bits.astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-31)
    return torch.from_numpy(np.minimum(w, np.float32(1 - 2.0**-24)).astype(np.float64))


def exact_noise(keys: Tensor, words: int) -> Tensor:
    return -(-torch.log1p(-exact_uniforms(keys, words))).log()


# --- The draw and its log-probabilities ----------------------------------------------------------


def assert_exact(logits: Tensor, keys: Tensor, settings: Settings) -> None:
    """The winner of fp64 scores, but for scores within 1e-5; both log-probabilities."""
    found = draw(logits, settings, keys)
    z = logits.double() / {**OFF, **settings}["temperature"]
    left = torch.stack([kept(row, settings) for row in logits])
    scores = (z - z.amax(-1, keepdim=True) + exact_noise(keys, z.shape[1])).masked_fill(~left, -INF)
    at = found.tokens[:, None]
    assert (scores.gather(1, at).squeeze(1) >= scores.amax(-1) - 1e-5).all()
    for logprobs, among in ((found.logprobs, z), (found.sampled_logprobs, z.where(left, -INF))):
        exact = torch.log_softmax(among, -1).gather(1, at).squeeze(1)
        torch.testing.assert_close(logprobs.double(), exact, atol=1e-5, rtol=0)
    assert [x.dtype for x in found] == [torch.int64, torch.float32, torch.float32]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("words", [1, 17, 1025])
def test_equals_fp64(words: int, settings: Settings, implementation: str) -> None:
    torch.manual_seed(words)
    rows = 2 if implementation == "triton" else 40
    keys = torch.randint(-(2**62), 2**62, (rows,))
    assert_exact(torch.randn(rows, words) * 2, keys, settings)


@pytest.mark.parametrize("settings", [SETTINGS[0], SETTINGS[3], SETTINGS[5], SETTINGS[7]], ids=str)
@pytest.mark.parametrize("scale", [0.1, 2.5])
def test_a_real_vocabulary(settings: Settings, scale: float, implementation: str) -> None:
    if implementation == "triton":
        pytest.skip("minutes in the interpreter")
    torch.manual_seed(3)
    logits = torch.randn(4, 49_152) * scale
    logits[0, 40_000] = 12.0
    assert_exact(logits, torch.randint(-(2**62), 2**62, (4,)), settings)


@pytest.mark.parametrize("sign", [-1, 1])
def test_the_winner_is_decided_to_the_fifth_digit(sign: int, implementation: str) -> None:
    """The second token is raised until it loses, or wins, by 1e-5."""
    rows, words = (3, 64) if implementation == "triton" else (300, 4096)
    keys = torch.arange(rows) * 7919 - 5
    two, order = exact_noise(keys, words).topk(2)
    logits = torch.zeros(rows, words).double()
    logits.scatter_(1, order[:, 1:], two[:, :1] - two[:, 1:] + sign * 1e-5)
    assert torch.equal(draw(logits.float(), keys=keys).tokens, order[:, (sign + 1) // 2])


@pytest.mark.parametrize("settings", [{}, {"top_k": 3, "top_p": 0.5, "min_p": 0.9}], ids=str)
def test_temperature_zero_is_greedy(settings: Settings, implementation: str) -> None:
    torch.manual_seed(0)
    logits = torch.randn(3, 1025) * 3
    logits[1, [900, 70]] = logits[1].max() + 1  # the lower of two
    tokens, logprobs, sampled = draw(logits, {**settings, "temperature": 0.0})
    assert tokens.tolist() == [int(logits[0].argmax()), 70, int(logits[2].argmax())]
    exact = torch.log_softmax(logits.double(), -1).gather(1, tokens[:, None]).squeeze(1)
    torch.testing.assert_close(logprobs.double(), exact, atol=1e-5, rtol=0)
    assert torch.equal(sampled, torch.zeros(3))


def test_filters_at_their_ends(implementation: str) -> None:
    torch.manual_seed(1)
    logits = torch.randn(2 if implementation == "triton" else 20, 300)
    greedy = draw(logits, {"temperature": 0.0}).tokens
    for settings in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}, {"temperature": 1e-30}):
        found = draw(logits, settings)
        assert torch.equal(found.tokens, greedy), settings
        if "temperature" not in settings:
            assert (found.sampled_logprobs == 0).all()
    free = draw(logits)
    assert not torch.equal(free.tokens, greedy)
    for settings in ({"top_k": 300}, {"top_k": 2**31 - 1}, {"min_p": 1e-30}):
        for one, other in zip(draw(logits, settings), free, strict=True):
            torch.testing.assert_close(one, other, atol=1e-6, rtol=0)


def test_ties_with_the_last_token_are_kept(implementation: str) -> None:
    count = 2 if implementation == "triton" else 400
    logits = torch.tensor([0.0, 2.0, 1.0, 1.0, 1.0, -0.0, 0.0])
    log = torch.log_softmax(logits, -1)
    for settings, tokens in (
        ({"top_k": 2}, [1, 2, 3, 4]),
        ({"top_k": 5}, [0, 1, 2, 3, 4, 5, 6]),  # 0 and -0 are equal
        ({"top_p": 0.5}, [1, 2, 3, 4]),
        ({"top_k": 2, "top_p": 0.4}, [1]),
    ):
        found = draw(logits.expand(count, -1), settings)
        assert set(found.tokens.tolist()) <= set(tokens)
        if count > 100:
            assert set(found.tokens.tolist()) == set(tokens)
        expected = log[found.tokens] - log[tokens].logsumexp(0)
        torch.testing.assert_close(found.sampled_logprobs, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("value", [0.0, -3.7, 1e30])
@pytest.mark.parametrize("settings", [{}, {"top_k": 5}, {"top_p": 0.3}, {"min_p": 0.5}], ids=str)
def test_all_logits_equal(value: float, settings: Settings, implementation: str) -> None:
    rows, words = (1, 130) if implementation == "triton" else (3, 50_000)
    found = draw(torch.full((rows, words), value), settings)
    assert torch.equal(found.tokens, noise(torch.arange(rows), words).argmax(-1))
    for one in found[1:]:  # all are ties, so every filter keeps all
        torch.testing.assert_close(one, torch.full((rows,), -np.log(words)).float())


@pytest.mark.parametrize("settings", SETTINGS[::2] + SETTINGS[-1:], ids=str)
def test_extreme_logits(settings: Settings, implementation: str) -> None:
    words = 70
    logits = torch.full((4, words), -INF)
    logits[0, 7] = -1e30
    logits[1] = torch.where(torch.arange(words) % 2 == 0, 1e30, -1e30)
    logits[2, ::3] = 3e38 * torch.linspace(-1, 1, 24)
    logits[3, 60:] = torch.linspace(-1, 1, 10)
    tokens, logprobs, sampled = draw(logits, settings)
    assert tokens[0] == 7
    assert tokens[1] % 2 == 0
    assert tokens[2] == 69
    assert tokens[3] >= 60
    assert torch.allclose(logprobs[:3], torch.tensor([0, -np.log(35), 0]).float())
    assert (sampled >= logprobs - 1e-6).all()


@pytest.mark.parametrize(
    "settings", [{}, SETTINGS[3], SETTINGS[5], SETTINGS[7], {"temperature": 0.0}], ids=str
)
def test_a_row_that_cannot_be_drawn_from(settings: Settings, implementation: str) -> None:
    torch.manual_seed(2)
    logits = torch.randn(6, 100)
    logits[0, 63] = NAN
    logits[1, 99] = INF
    logits[2] = -INF
    logits[3] = NAN
    logits[5, 20] = -INF
    tokens, logprobs, sampled = draw(logits, settings)
    assert (tokens == -1).tolist() == [True] * 4 + [False] * 2
    assert logprobs.isnan().tolist() == sampled.isnan().tolist() == [True] * 4 + [False] * 2
    assert ((tokens[4:] >= 0) & (tokens[4:] < 100)).all()


# --- Many draws ----------------------------------------------------------------------------------


def chi_square(counts: Tensor, p: Tensor) -> float:
    """The p-value of counts under a distribution; tokens expected less than five times are one."""
    assert counts[p == 0].sum() == 0
    expected = p * counts.sum()
    rare = expected < 5
    pairs = [*zip(counts[~rare], expected[~rare], strict=True)]
    if rare.any() and expected[rare].sum() > 0:
        pairs.append((counts[rare].sum(), expected[rare].sum()))
    if len(pairs) == 1:
        return 1.0
    statistic = sum((float(n) - float(e)) ** 2 / float(e) for n, e in pairs)
    half = torch.tensor([(len(pairs) - 1) / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(*half))


def fit(logits: Tensor, truth: Tensor, settings: Settings, count: int) -> float:
    """How well draws from `logits` fit the exact distribution of `truth`."""
    counts = torch.bincount(draws(logits, settings, count), minlength=len(logits)).double()
    z = truth.double() / {**OFF, **settings}["temperature"]
    return chi_square(counts, torch.softmax(z.where(kept(truth, settings), -INF), -1))


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_100k_draws_fit_the_exact_distribution(settings: Settings, implementation: str) -> None:
    if implementation == "triton":
        pytest.skip("hours in the interpreter")
    torch.manual_seed(5)
    logits = torch.randn(53) * 1.5
    count = 10_000 if implementation == "reference" else 100_000
    assert fit(logits, logits, settings, count) > 1e-4


def test_a_slightly_wrong_distribution_does_not_fit() -> None:
    torch.manual_seed(5)
    truth = torch.randn(53) * 1.5
    wrong = truth.clone()
    wrong[truth.argmax()] += 0.1
    assert fit(wrong, truth, {}, 100_000) < 1e-4
    assert fit(truth * 1.05, truth, {"top_k": 7}, 100_000) < 1e-4


def test_rare_tokens_keep_their_share() -> None:
    # Half of the mass on 100,000 tokens of 5e-6 each.
    logits = torch.zeros(100_001)
    logits[0] = np.log(100_000)
    tokens = draws(logits, {}, 2000)
    rare = tokens[tokens > 0]
    assert abs(len(rare) - 1000) < 5 * 500**0.5
    assert chi_square(torch.bincount((rare - 1) // 5000).double(), torch.full((20,), 0.05)) > 1e-4
    assert len(rare.unique()) > len(rare) - 30


# --- Rows ----------------------------------------------------------------------------------------


def mixed() -> tuple[Tensor, dict[str, Tensor]]:
    """Twelve rows that have nothing in common."""
    torch.manual_seed(6)
    logits = torch.randn(12, 333) * torch.tensor([0.05, 1, 4]).repeat(4)[:, None]
    logits[5] = 1.0
    logits[7, 3] = NAN
    temperature = torch.tensor([1, 0.7, 0, 2]).repeat(3)
    settings = {
        "keys": torch.arange(12) * 2**33 - 3,
        "temperature": temperature,
        "top_k": torch.tensor([0, 5, 400, 40, 1, 0] * 2).int(),
        "top_p": torch.tensor([1, 0.9, 0.3, 1, 0.95, 1] * 2),
        "min_p": torch.tensor([0, 0, 0.2, 0, 0.01] * 2 + [0, 0.3]),
    }
    return logits, settings


def test_a_row_draws_the_same_whatever_stands_beside_it(implementation: str) -> None:
    logits, settings = mixed()
    if implementation == "triton":
        logits, settings = logits[6:9], {name: x[6:9] for name, x in settings.items()}
    together = sample(logits, **settings)
    for row in range(len(logits)):
        alone = sample(logits[row : row + 1], **{k: x[row : row + 1] for k, x in settings.items()})
        for one, other in zip(alone, together, strict=True):
            assert torch.equal(one[0].nan_to_num(7), other[row].nan_to_num(7))


def test_neither_threads_nor_order_matter() -> None:
    logits, settings = mixed()
    back = {name: x.flip(0) for name, x in settings.items()}
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    many = sample(logits.repeat(20, 1), **{name: x.repeat(20) for name, x in settings.items()})
    torch.set_num_threads(before)
    turned = sample(logits.flip(0), **back)
    for one, other, more in zip(sample(logits, **settings), turned, many, strict=True):
        assert torch.equal(one.nan_to_num(7), other.flip(0).nan_to_num(7))
        assert torch.equal(one.nan_to_num(7).repeat(20), more.nan_to_num(7))


def test_strides_gradients_and_what_is_given_is_not_changed(implementation: str) -> None:
    logits, settings = mixed()
    if implementation == "triton":
        logits, settings = logits[6:9], {name: x[6:9] for name, x in settings.items()}
    wide = torch.full((len(logits), 400), 50.0)
    wide[:, 10:343] = logits
    every_other = {name: x.repeat_interleave(2)[::2] for name, x in settings.items()}
    given = [logits, wide[:, 10:343], logits.T.contiguous().T, logits.clone().requires_grad_()]
    copies = [x.clone() for x in given]
    first, *others = (sample(x, **every_other) for x in given)
    for found in others:
        assert torch.equal(found.tokens, first.tokens)
        for one, other in zip(first, found, strict=True):
            torch.testing.assert_close(one, other, atol=1e-6, rtol=0, equal_nan=True)
            assert not other.requires_grad
    for one, copy in zip(given, copies, strict=True):
        assert torch.equal(one.nan_to_num(7), copy.nan_to_num(7))
    assert [len(x) for x in draw(torch.zeros(0, 5))] == [0, 0, 0]


def test_other_dtypes_on_a_cpu_are_read_as_fp32() -> None:
    torch.manual_seed(8)
    logits = torch.randn(5, 100).bfloat16()
    for one, other in zip(draw(logits), draw(logits.float()), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=0)


# --- The noise -----------------------------------------------------------------------------------


def test_noise_equals_numpys_integers_and_its_range() -> None:
    keys = torch.tensor([0, 1, -1, 2**63 - 1, -(2**63), 123456789 << 20])
    torch.testing.assert_close(
        noise(keys, 5000).double(), exact_noise(keys, 5000), atol=3e-6, rtol=3e-7
    )
    top = -torch.tensor([2.0**-32]).log()
    assert noise(torch.arange(50), 50_000).max() < top < 22.181
    assert -torch.tensor([24 * np.log(2)]).log() > -2.82


def uniform(w: Tensor, bins: int = 200) -> float:
    counts = torch.histc(w.float(), bins, 0, 1).double()
    return chi_square(counts, torch.full((bins,), 1 / bins).double())


def independent(a: Tensor, b: Tensor, bins: int = 20) -> float:
    at = (a * bins).long() * bins + (b * bins).long()
    counts = torch.bincount(at.flatten(), minlength=bins**2).double()
    return chi_square(counts, torch.full((bins**2,), 1 / bins**2).double())


KEYS = {
    "counters": np.arange(60_000, dtype=np.uint64),
    "counters in the high half": np.arange(60_000, dtype=np.uint64) << np.uint64(32),
    "SplitMix64": splitmix(np.arange(60_000, dtype=np.uint64)),
}


@pytest.mark.parametrize("name", KEYS)
def test_noise_over_keys(name: str) -> None:
    w = exact_uniforms(torch.from_numpy(KEYS[name].view(np.int64)), 5)
    for token in range(5):
        assert uniform(w[:, token]) > 1e-4
        assert independent(w[1:, token], w[:-1, token]) > 1e-4
    # Neighbouring tokens, and neighbours in both, which share a sum or a difference.
    for a, b in ((w[:, 1:], w[:, :-1]), (w[1:, 1:], w[:-1, :-1]), (w[1:, :-1], w[:-1, 1:])):
        assert independent(a, b) > 1e-4


@pytest.mark.parametrize("key", [0, 1, 2, -1, 1 << 32])
def test_noise_over_tokens(key: int) -> None:
    w = exact_uniforms(torch.tensor([key]), 1 << 17)[0]
    assert uniform(w) > 1e-4
    for distance in (1, 2, 64, 1 << 12, 1 << 16):
        a, b = w.view(-1, 2, distance).unbind(1)
        assert independent(a, b) > 1e-4
        assert independent(w[distance:], w[:-distance]) > 1e-4


def test_the_test_of_the_noise_can_fail() -> None:
    torch.manual_seed(9)
    w = torch.rand(60_000, dtype=torch.float64)
    assert uniform(w**1.03) < 1e-4
    assert independent(w, (w + 0.9 * torch.rand(60_000, dtype=torch.float64)) % 1) < 1e-4


# --- Bad input -----------------------------------------------------------------------------------

GOOD: dict[str, Tensor] = {"logits": torch.zeros(2, 4), "keys": torch.arange(2), **columns(2, {})}
ONES = torch.ones(2)
BAD: list[tuple[str, Tensor, str]] = [
    ("logits", torch.zeros(4), r"logits must be floating \[B, V\] .*got .*\[4\]"),
    ("logits", torch.zeros(2, 0), r"V above 0, .*\[2, 0\]"),
    ("logits", torch.zeros(2, 4).long(), "logits must be floating .*int64"),
    ("keys", torch.arange(3), r"keys must be \[B\] torch.int64 .*got \[3\]"),
    ("keys", ONES, "keys must be .*got .*float32"),
    ("keys", torch.arange(2, device="meta"), "keys must be .*on meta"),
    ("top_k", torch.arange(2), "top_k must be .*torch.int32 .*got .*torch.int64"),
    ("top_k", torch.tensor([0, -1]).int(), "top_k must be at least 0, got -1 in row 1"),
    ("temperature", ONES[:, None], r"temperature must be \[B\] .*got \[2, 1\]"),
    ("temperature", ONES.double(), "temperature must be .*float32 .*got .*float64"),
    ("min_p", ONES.to("meta"), "min_p must be .*on meta"),
    *[
        (name, torch.tensor([1.0, value]), f"{name} must be .*, got {value} in row 1")
        for name, values in (
            ("temperature", (-0.5, NAN, INF)),
            ("top_p", (0.0, 1.5, -1.0, NAN)),
            ("min_p", (-0.5, 2.0, NAN)),
        )
        for value in values
    ],
]


@pytest.mark.parametrize(("name", "value", "words"), BAD)
def test_bad_input_is_named(name: str, value: Any, words: str, implementation: str) -> None:
    with pytest.raises(ValueError, match=f"^sample: .*{words}"):
        sample(**{**GOOD, name: value})


def test_the_first_bad_value_of_many_rows_is_named() -> None:
    rows = 1000
    settings = columns(rows, {})
    settings["min_p"][[999, 400]] = torch.tensor([2.0, -1.0])
    settings["top_k"][700] = -3
    settings["top_p"][400] = 1.25
    logits, keys = torch.zeros(rows, 4), torch.arange(rows)
    for fixed, words in (
        ({}, r"top_p must be above 0 and at most 1, got 1\.25 in row 400"),
        ({"top_p": 1.0}, r"min_p must be between 0 and 1, got -1\.0 in row 400"),
        ({"min_p": 0.0}, "top_k must be at least 0, got -3 in row 700"),
        ({"top_k": 0}, r"min_p must be between 0 and 1, got 2\.0 in row 999"),
    ):
        for name, value in fixed.items():
            settings[name][:900] = value
        with pytest.raises(ValueError, match=f"^sample: {words}"):
            sample(logits, keys, **settings)
    settings["min_p"][999] = 0.1
    assert (sample(logits, keys, **settings).tokens >= 0).all()


def test_values_are_looked_at_without_a_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither as Python numbers nor one by one."""
    monkeypatch.setattr(Tensor, "tolist", lambda _: pytest.fail("read row by row"))
    monkeypatch.setattr(Tensor, "item", lambda _: pytest.fail("read row by row"))
    draw(torch.zeros(50, 4))
