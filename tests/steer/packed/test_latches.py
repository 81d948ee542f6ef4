"""Latches of many requests that come in parts are those of each text by itself."""

import random
from typing import Any

import pytest
import torch

from steer.packed.latches import Latched, Part
from steer.scopes import NONE, Scope, latch_table, latches_of, run_latches

TEXTS = [
    "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nThe mill<|im_end|>\n<|im_start|>user\nand",
    "<|im_start|>assistant\nThe river<|im_end|>\n",
    "The sea",
    "<|im_start|>system\nBe.<|im_end|>\n<|im_start|>user\nthe dog<|im_end|>\n<|im_start|>assistant\nA cat sat",
]
SCOPES = ["user", "assistant", "assistant", "assistant"]


@pytest.mark.parametrize("most", [1, 4, 100])
def test_in_parts_of_any_length_beside_others(tiny_tokenizer: Any, most: int) -> None:
    texts = [tiny_tokenizer.encode(text) for text in TEXTS]
    latches = [tuple(latch for latch, _ in latches_of(Scope.parse(scope), tiny_tokenizer)) for scope in SCOPES]
    latched, rng, done = Latched(), random.Random(most), [0] * len(texts)
    found: list[list[bool]] = [[] for _ in texts]
    while any(n < len(ids) for n, ids in zip(done, texts, strict=True)):
        parts, order = [], rng.sample(range(len(texts)), rng.randrange(1, len(texts) + 1))
        order = [i for i in order if done[i] < len(texts[i])]
        for i in order:
            ids = texts[i][done[i] : done[i] + rng.randrange(1, most + 1)]
            parts.append(Part(i + 1, latches[i], done[i], ids))
            done[i] += len(ids)
        for i, inside in zip(order, latched.run(parts), strict=True):
            found[i] += inside[:, 0].tolist()
    for ids, own, got in zip(texts, latches, found, strict=True):
        table, index = latch_table(own), torch.arange(len(ids))[None]
        start = torch.zeros(1, len(own), dtype=torch.bool), torch.full((1, table.tokens.shape[1]), NONE)
        assert got == run_latches(table, torch.tensor([ids]), index, *start).inside[0, :, 0].tolist()
    assert [any(each) for each in found] == [True, True, False, True]


def test_a_text_that_begins_again_and_one_that_was_forgotten_have_no_past(tiny_tokenizer: Any) -> None:
    ((latch, _),) = latches_of(Scope.parse("assistant"), tiny_tokenizer)
    latched, ids, plain = Latched(), tiny_tokenizer.encode(TEXTS[1][:-12]), tiny_tokenizer.encode("The sea")
    assert latched.run([Part(1, (latch,), 0, ids)])[0][-1]
    assert latched.run([Part(1, (latch,), len(ids), plain)])[0].all()
    assert not latched.run([Part(1, (latch,), 0, plain)])[0].any()
    latched.run([Part(1, (latch,), 0, ids)])
    latched.forget(1)
    assert not latched.run([Part(1, (latch,), len(ids), plain)])[0].any()
