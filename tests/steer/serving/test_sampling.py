"""The next token: a function of the seed, with the distribution that is asked for."""

from collections import Counter

import pytest
import torch
from torch import Tensor

from steer.serving.sampling import Sampler, Sampling, pick

LOGITS = torch.tensor([1.0, 3.0, 2.0, 0.0])


def draws(sampling: Sampling, n: int, logits: Tensor = LOGITS) -> list[int]:
    sampler = Sampler(sampling)
    return [pick([sampler], logits[None])[0].token for _ in range(n)]


def test_temperature_zero_takes_the_likeliest_and_the_lower_id_of_two() -> None:
    assert draws(Sampling(1, temperature=0.0), 2) == [1, 1]
    assert draws(Sampling(1, temperature=0.0), 1, torch.tensor([0.0, 2.0, 2.0])) == [1]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_come_as_often_as_the_softmax_says(temperature: float) -> None:
    n = 4000
    counts = Counter(draws(Sampling(1, temperature=temperature, seed=3), n))
    expected = (LOGITS / temperature).softmax(-1)
    shares = torch.tensor([counts[token] / n for token in range(4)])
    assert (shares - expected).abs().max() < 4 * (0.25 / n) ** 0.5  # 4 standard deviations at most


@pytest.mark.parametrize(("sampling", "allowed"), [
    (Sampling(1, top_k=2), {1, 2}), (Sampling(1, top_k=1), {1}), (Sampling(1, top_p=0.6), {1}),
    (Sampling(1, top_p=0.7), {1, 2}), (Sampling(1, top_p=1e-9), {1}), (Sampling(1, top_p=0.95, top_k=3), {0, 1, 2}),
])  # fmt: skip
def test_top_k_and_top_p_leave_exactly_these(sampling: Sampling, allowed: set[int]) -> None:
    assert set(draws(sampling, 500)) == allowed


@pytest.mark.parametrize("temperature", [1e-9, 1e-40, 5e-324])
def test_a_tiny_temperature_takes_the_likeliest(temperature: float) -> None:
    assert draws(Sampling(1, temperature=temperature), 3, LOGITS * 50) == [1, 1, 1]


def test_a_seed_gives_the_same_tokens_again_and_another_gives_others() -> None:
    flat = torch.zeros(1000)
    first = draws(Sampling(1, seed=1), 20, flat)
    assert first == draws(Sampling(1, seed=1), 20, flat)
    assert first != draws(Sampling(1, seed=2), 20, flat)


def test_penalties_lower_what_was_said_and_bias_adds() -> None:
    assert draws(Sampling(1, temperature=0.0, presence_penalty=1.5), 3) == [1, 2, 1]
    assert draws(Sampling(1, temperature=0.0, frequency_penalty=0.6), 4) == [1, 1, 2, 1]
    assert draws(Sampling(1, temperature=0.0, bias={3: 10.0}), 1) == [3]
    assert 1 not in draws(Sampling(1, bias={1: -100.0}), 200)


def test_log_probabilities_are_the_models_own_whatever_is_done_to_the_scores() -> None:
    (step,) = pick([Sampler(Sampling(1, temperature=0.0, bias={3: 10.0}, n_top=2))], LOGITS[None])
    own = LOGITS.log_softmax(-1)
    assert step.token == 3
    assert step.logprob == pytest.approx(float(own[3]))
    assert step.top == [(1, pytest.approx(float(own[1]))), (2, pytest.approx(float(own[2])))]
    assert pick([Sampler(Sampling(1))], LOGITS[None])[0].logprob is None


def test_the_logits_are_left_as_they_are() -> None:
    before = LOGITS.clone()
    draws(Sampling(1, temperature=0.3, top_p=0.5, presence_penalty=2.0, bias={0: 1.0}), 5)
    assert torch.equal(LOGITS, before)


def test_nothing_without_a_chance_is_ever_drawn() -> None:
    logits = torch.tensor([0.0, -torch.inf, 0.0, -torch.inf])
    assert set(draws(Sampling(1), 300, logits)) == {0, 2}


def test_rows_that_are_picked_at_once_are_those_of_each_alone() -> None:
    logits = torch.randn(7, 50, generator=torch.Generator().manual_seed(0))
    kinds = [
        Sampling(9, temperature=0.0), Sampling(9, seed=1, n_top=0), Sampling(9, top_p=0.8, seed=2, n_top=5),
        Sampling(9, temperature=0.0, presence_penalty=2.0), Sampling(9, top_k=3, seed=3),
        Sampling(9, temperature=0.0, n_top=20), Sampling(9, bias={4: 9.0}, seed=4),
    ]  # fmt: skip
    together, alone = [Sampler(kind) for kind in kinds], [Sampler(kind) for kind in kinds]
    for _ in range(4):
        found = pick(together, logits)
        wanted = [pick([each], row[None])[0] for each, row in zip(alone, logits, strict=True)]
        assert [step.token for step in found] == [step.token for step in wanted]
        for one, other, kind in zip(found, wanted, kinds, strict=True):
            assert (one.logprob is None) == (kind.n_top is None)
            assert len(one.top) == (kind.n_top or 0)
            assert one.logprob == (None if other.logprob is None else pytest.approx(other.logprob, abs=1e-6))
            assert [token for token, _ in one.top] == [token for token, _ in other.top]
