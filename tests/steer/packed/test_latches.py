"""Latches of many requests that come in parts are those of each text by itself."""

import random
from itertools import chain
from typing import Any

import pytest
import torch

from steer.packed.latches import Latched, Part
from steer.scopes import NONE, Latch, Scope, latch_table, latches_of, run_latches

TEXTS = [
    "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nThe mill<|im_end|>\n<|im_start|>user\nand",
    "<|im_start|>assistant\nThe river<|im_end|>\n",
    "The sea",
    "<|im_start|>system\nBe.<|im_end|>\n<|im_start|>user\nthe dog<|im_end|>\n<|im_start|>assistant\nA cat sat",
    "<|im_start|>user\nThe mill",
]
SCOPES = [["user"], ["assistant"], ["assistant"], ["assistant", "user", "system"], []]


Told = list[tuple[int, tuple[Latch, ...], int, list[int]]]
"""of each request in a pass its number, its latches, the position of its first token, and its tokens"""


def run(latched: Latched, told: Told) -> list[list[list[bool]]]:
    """One pass; by request, what its flags say of each token."""
    ids = torch.tensor([*chain(*(ids for *_, ids in told))], dtype=torch.int32)
    position = torch.tensor([*chain(*(range(start, start + len(ids)) for _, _, start, ids in told))])
    flags, at, parts = torch.ones(len(ids) + 3, 4, dtype=torch.bool), 0, []
    for number, latches, _, own in told:
        parts.append(Part(number, latches, at, len(own)))
        at += len(own)
    latched.run([part for part in parts if part.latches], ids, position, flags)
    assert flags[at:].all(), "of other tokens nothing is said"
    for part in parts:
        assert flags[part.start : part.start + part.n, len(part.latches) :].all(), "nor in the columns of gates"
    return [flags[part.start : part.start + part.n, : len(part.latches)].tolist() for part in parts]


def plainly(latches: tuple[Latch, ...], ids: list[int]) -> list[list[bool]]:
    """Over the whole text at once."""
    table, index = latch_table(latches), torch.arange(len(ids))[None]
    start = torch.zeros(1, len(latches), dtype=torch.bool), torch.full((1, table.tokens.shape[1]), NONE)
    return run_latches(table, torch.tensor([ids]), index, *start).inside[0].tolist()


@pytest.mark.parametrize("most", [1, 4, 100])
def test_in_parts_of_any_length_beside_others(tiny_tokenizer: Any, most: int) -> None:
    texts = [tiny_tokenizer.encode(text) for text in TEXTS]
    latches = [
        tuple(latch for scope in scopes for latch, _ in latches_of(Scope.parse(scope), tiny_tokenizer))
        for scopes in SCOPES
    ]
    latched, rng, done = Latched(), random.Random(most), [0] * len(texts)
    found: list[list[list[bool]]] = [[] for _ in texts]
    while any(n < len(ids) for n, ids in zip(done, texts, strict=True)):
        left = [i for i, ids in enumerate(texts) if done[i] < len(ids)]
        order = rng.sample(left, rng.randrange(1, len(left) + 1))
        told: Told = []
        for i in order:
            ids = texts[i][done[i] : done[i] + rng.randrange(1, most + 1)]
            told.append((i + 1, latches[i], done[i], ids))
            done[i] += len(ids)
        for i, inside in zip(order, run(latched, told), strict=True):
            found[i] += inside
    for ids, own, got in zip(texts, latches, found, strict=True):
        assert got == (plainly(own, ids) if own else [[]] * len(ids))
    assert [any(map(any, each)) for each in found] == [True, True, False, True, False]


def test_a_text_that_begins_again_and_one_that_was_forgotten_have_no_past(tiny_tokenizer: Any) -> None:
    ((latch, _),) = latches_of(Scope.parse("assistant"), tiny_tokenizer)
    latched, ids, plain = Latched(), tiny_tokenizer.encode(TEXTS[1][:-12]), tiny_tokenizer.encode("The sea")

    def inside(start: int, own: list[int]) -> list[bool]:
        ((*flags,),) = run(latched, [(1, (latch,), start, own)])
        return [flag for (flag,) in flags]

    assert inside(0, ids)[-1]
    assert all(inside(len(ids), plain))
    assert not any(inside(0, plain))
    inside(0, ids)
    latched.forget(1)
    assert not any(inside(len(ids), plain))
