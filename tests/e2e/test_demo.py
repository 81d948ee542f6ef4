"""The demo on the real model, at a small budget: every artefact, honest figures, and steering that is causal."""

import json
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from activations.models import LoadedModel, load_model
from activations.store import ActivationStore
from sae.artefact import SaeArtefact
from sae.index_db import FeatureIndex
from steer import demo
from steer.config import ChatConfig, DemoConfig
from steer.demo import run_demo, transcript
from steer.generate import generate
from steer.library import load_library
from steer.making.config import MeasureConfig
from steer.operations import Intervention
from steer.runtime import steering

MEASURE = MeasureConfig(doses=(0.5,), select_prompts=2, heldout_prompts=8, max_new_tokens=20, n_random=2)
SMALL: dict[str, Any] = {
    "layer": 12,
    "min_tokens": 10_000,
    "max_tokens": 10_000,
    "train_tokens": 60_000,
    "expansion": 1,
    "k": 16,
    "ce_sequences": 2,
    "candidates": 6,
    "measure": MEASURE,
}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> DemoConfig:
    return DemoConfig(out=tmp_path_factory.mktemp("demo"), **SMALL)


@pytest.fixture(scope="module", autouse=True)
def in_float32() -> Iterator[None]:
    """Also where the processor would have the demo in bfloat16, so that its figures compare with those of `smollm2`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "load_model", partial(load_model, dtype="float32"))
        yield


@pytest.fixture(scope="module")
def summary(config: DemoConfig) -> dict[str, Any]:
    return run_demo(config)


def test_the_summary_holds_what_it_must(config: DemoConfig, summary: dict[str, Any]) -> None:
    assert json.loads((config.out / "summary.json").read_text()) == summary
    figures = ("tokens_harvested", "harvest_tok_s", "train_tok_s", "l0", "n_latents", "wall_s", "peak_rss_mb")
    assert all(summary[key] > 0 for key in figures)
    assert summary["n_latents"] == 576
    for key in ("steering", "steering_contrast"):
        wanted = {"kind", "latent_or_vector", "coefficient", "dose", "effect", "random_control_effect", "kl"}
        assert wanted <= summary[key].keys()
        assert summary[key]["kl"] > 0


def test_the_sae_is_better_than_nothing_and_worse_than_the_model(summary: dict[str, Any]) -> None:
    assert 0 < summary["fvu"] < 0.6
    assert 8 < summary["l0"] < 32
    ce = summary["ce"]
    assert ce["clean"] < ce["sae"] < ce["mean"] < ce["zero"]
    assert 0.3 < summary["ce_loss_recovered"] < 1


def test_steering_does_what_random_directions_do_not(summary: dict[str, Any]) -> None:
    contrast = summary["steering_contrast"]
    assert contrast["effect"] > max(0.05, *contrast["random_control_effects"])
    assert contrast["effect_ci95"][0] > contrast["random_control_effect"]


def test_every_artefact_opens(config: DemoConfig, summary: dict[str, Any], smollm2: LoadedModel) -> None:
    store = ActivationStore.open(config.out / "store")
    artefact = SaeArtefact.load(config.out / "sae" / "sae")
    library = load_library(config.out / "library")
    index = FeatureIndex.open(config.out / "index")
    assert store.state.tokens == summary["tokens_harvested"]
    assert artefact.d_sae == index.info["d_sae"] == summary["n_latents"]
    assert index.info["sae_sha256"] == artefact.sha256
    assert len(library) == 2
    for vector in library.values():
        assert vector.model.fingerprint == smollm2.fingerprint
    index.close()


def test_the_report_is_one_file_that_opens_offline(config: DemoConfig, summary: dict[str, Any]) -> None:
    page = (config.out / "report.html").read_text()
    assert f"{summary['fvu']:.3f}" in page
    assert page.count("<svg") > 5
    assert not any(mark in page for mark in ("<script", "src=", "@import", "url(http", "<link"))


def test_the_transcript_names_real_commands(config: DemoConfig, summary: dict[str, Any]) -> None:
    text = transcript(config, summary)
    assert "saekit chat --set library=" in text
    assert "None" not in text


def test_the_store_equals_a_plain_forward(config: DemoConfig, summary: dict[str, Any], smollm2: LoadedModel) -> None:
    store = ActivationStore.open(config.out / "store")
    for i in range(0, store.n_sequences, store.n_sequences // 6):
        mask = store.mask(i, i + 1)[0]
        length = int(np.flatnonzero(mask).max()) + 1
        tokens = torch.from_numpy(store.tokens(i, i + 1)[:, :length]).long()
        with torch.no_grad():
            states = smollm2.model(tokens, output_hidden_states=True).hidden_states
        expected = states[13][0].bfloat16().float().numpy()
        ours = store.activations("resid_post.12", i, i + 1)[0, :length]
        # Batches of another shape may add up in another order, which moves a value by one bfloat16 step at most.
        np.testing.assert_allclose(ours[mask[:length]], expected[mask[:length]], rtol=2**-7, atol=1e-2)
        assert (ours == expected).mean() > 0.98


def test_coefficient_zero_and_the_cache_on_the_real_model(
    config: DemoConfig, summary: dict[str, Any], smollm2: LoadedModel
) -> None:
    vector = next(iter(load_library(config.out / "library").values()))
    prompts = ["The letter said that", "At noon"]
    plain = generate(smollm2, prompts, max_new_tokens=8, temperature=0.0)
    assert (
        generate(smollm2, prompts, max_new_tokens=8, temperature=0.0, interventions=[Intervention.of(vector, 0.0)])
        == plain
    )
    ids = torch.tensor([smollm2.tokenizer("The letter said that nobody would come before the evening")["input_ids"]])
    with torch.no_grad(), steering(smollm2, [Intervention.of(vector, vector.coefficient)]):
        whole = smollm2.model(ids).logits
        cache, parts = None, []
        for stop in (3, 4, 5, ids.shape[1]):
            start = sum(part.shape[1] for part in parts)
            out = smollm2.model(ids[:, start:stop], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            parts.append(out.logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=2e-3, rtol=1e-3)


def test_chat_is_steered(config: DemoConfig, summary: dict[str, Any], smollm2: LoadedModel) -> None:
    from steer.chat.session import Chat

    steered = ChatConfig(library=config.out / "library", vectors=("joyful_vs_gloomy",), max_new_tokens=12)
    unsteered = ChatConfig(max_new_tokens=12)
    question = "How was your day?"
    assert Chat(steered, smollm2).answer(question) != Chat(unsteered, smollm2).answer(question)


def test_a_second_run_goes_on_from_what_is_there(config: DemoConfig, summary: dict[str, Any]) -> None:
    before = ActivationStore.open(config.out / "store").fingerprint
    weights = SaeArtefact.load(config.out / "sae" / "sae").sha256
    again = run_demo(config)
    assert ActivationStore.open(config.out / "store").fingerprint == before
    assert SaeArtefact.load(config.out / "sae" / "sae").sha256 == weights
    assert again["fvu"] == pytest.approx(summary["fvu"])
