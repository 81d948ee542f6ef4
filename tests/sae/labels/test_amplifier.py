"""Texts of an amplified latent are what the model writes with its decoder row added, and are asked for like answers."""

import asyncio

import torch

from activations.generate import generate
from activations.hook_points import HookPoint
from activations.hooks import capture, edit, run_until
from sae.artefact import SaeArtefact
from sae.labels.amplifier import NOTHING, PROMPTS, Amplifier, amplified
from sae.labels.chat import Reply, key_of
from sae.labels.config import ScoringConfig
from sae.torch_view import TorchSae
from sae.wiring import Wiring
from tests.sae.labels.conftest import HOOK, Indexed

DOSE, SIZE = 3.0, 12


def amplifier(indexed: Indexed, **settings: float) -> Amplifier:
    sae = TorchSae(SaeArtefact.load(indexed.sae))
    scoring = ScoringConfig.model_validate({"n_prompts": 2, "max_new_tokens": SIZE, "dose": DOSE, **settings})
    return Amplifier(indexed.loaded, sae, Wiring.parse(HOOK), "5ae", scoring, 0)


def by_hand(indexed: Indexed, latent: int, prompt: str, seed: int) -> str:
    """One text, with the whole prompt run again for its norm."""
    loaded, point = indexed.loaded, HookPoint.parse(HOOK)
    ids = torch.tensor([loaded.tokenizer(prompt)["input_ids"]])
    with capture(loaded.model, loaded.family, [point]) as captured:
        run_until(loaded.model, {"input_ids": ids})
    row = TorchSae(SaeArtefact.load(indexed.sae)).W_dec[latent]
    delta = DOSE * captured[point][0, 1:].norm(dim=1).mean() * row / row.norm()

    def add(h: torch.Tensor) -> torch.Tensor:
        h = h + delta
        if h.shape[1] == ids.shape[1]:
            h[:, 0] -= delta
        return h

    with edit(loaded.model, loaded.family, point, add):
        return generate(loaded, [prompt], max_new_tokens=SIZE, seed=seed)[0]


def answers(chat: Amplifier, latents: list[int]) -> dict[tuple[int, str], Reply]:
    requests = [request for latent in latents for request in chat.requests(latent)]

    async def collect() -> dict[tuple[int, str], Reply]:
        return {(each.latent, each.messages[-1].content): reply async for each, reply in chat.answers(requests)}

    return asyncio.run(collect())


def test_texts_equal_those_by_hand(indexed: Indexed) -> None:
    for number, prompt in enumerate(PROMPTS[:2]):
        found = {latent: answers(amplifier(indexed), [latent])[latent, prompt].text for latent in (2, 7)}
        assert found == {latent: by_hand(indexed, latent, prompt, number) for latent in (2, 7)}
        assert found[2] != found[7]


def test_nothing_amplified_is_the_model_as_it_is(indexed: Indexed) -> None:
    reply = answers(amplifier(indexed), [NOTHING])[NOTHING, PROMPTS[0]]
    assert reply.text == generate(indexed.loaded, [PROMPTS[0]], max_new_tokens=SIZE, seed=0)[0]


def test_every_row_of_a_batch_has_its_own_latent(indexed: Indexed) -> None:
    rows = TorchSae(SaeArtefact.load(indexed.sae)).W_dec[[2, 2, 7]]
    texts = amplified(indexed.loaded, Wiring.parse(HOOK), rows * torch.tensor([[1], [0], [5]]), PROMPTS[0], 1e3, 8, 0)
    assert len(set(texts)) == 3


def test_texts_are_free_and_their_keys_hold_all_that_decides_them(indexed: Indexed) -> None:
    chat = amplifier(indexed)
    replies = answers(chat, [NOTHING, 2, 3])
    assert len(replies) == 6
    assert {(reply.tokens_in, reply.tokens_out) for reply in replies.values()} == {(0, 0)}
    keys = {key_of(chat, request.messages) for latent in (NOTHING, 2, 3) for request in chat.requests(latent)}
    keys |= {key_of(amplifier(indexed, dose=1.0), request.messages) for request in chat.requests(2)}
    assert len(keys) == 8
    assert chat.count(chat.requests(2)[0].messages) == chat.max_answer_tokens == 0
