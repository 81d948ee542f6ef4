"""Directions: from latents, from contrast pairs, and what is refused."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from activations.errors import MismatchError, TextError, UnknownNameError
from activations.hook_points import HookPoint
from activations.models import LoadedModel
from activations.store_schema import ModelRef
from sae.artefact import SaeArtefact
from steer.vectors import (
    ContrastPair,
    SteeringVector,
    contrast_names,
    encode_pair,
    from_contrast,
    from_latent,
    load_pairs,
    places_of,
)

PAIRS = [
    ContrastPair("The river", " ran on to the sea.", " stood still.", "fit"),
    ContrastPair("A cat", " sat and looked on.", " was not there.", "fit"),
    ContrastPair("The mill", " unused", " unused too", "heldout"),
]


def artefact() -> SaeArtefact:
    rng = np.random.default_rng(0)
    W_dec = rng.standard_normal((8, 4)).astype(np.float32) * 3
    zeros = {"b_enc": np.zeros(8, np.float32), "b_dec": np.zeros(4, np.float32)}
    return SaeArtefact("topk", W_dec.T.copy(), W_dec=W_dec, k=2, metadata={"hook_point": "resid_post.1"}, **zeros)


MODEL = ModelRef(id="m", fingerprint="f", n_layers=3, d_model=4)


def test_a_latents_vector_is_its_unit_decoder_row() -> None:
    sae = artefact()
    vector = from_latent(sae, 5, MODEL, mean_norm=10.0)
    np.testing.assert_allclose(vector.direction, sae.W_dec[5] / np.linalg.norm(sae.W_dec[5]), rtol=1e-6)
    assert (vector.hook_point, vector.source["latent"]) == ("resid_post.1", 5)


def wired(hook_point: str) -> SaeArtefact:
    sae = artefact()
    transcodes = {"transcodes": True, "apply_b_dec_to_input": False} if "->" in hook_point else {}
    return replace(sae, metadata={"hook_point": hook_point}, **transcodes)


def test_a_transcoders_latent_belongs_where_it_writes() -> None:
    sae = wired("resid_mid.1->mlp_out.1")
    assert places_of(sae) == (HookPoint("resid_mid", 1), HookPoint("mlp_out", 1))
    assert from_latent(sae, 5, MODEL, mean_norm=10.0).hook_point == "mlp_out.1"
    assert places_of(artefact()) == (HookPoint("resid_post", 1),) * 2


@pytest.mark.parametrize(
    ("hook_point", "says"),
    [
        ("resid_post.1+resid_post.2", "one that reads 2"),
        ("resid_post.1+resid_post.2->resid_post.3", "one that reads 2"),
        ("resid_post.0->mlp_out.1+mlp_out.2+mlp_out.3", "one that writes 3"),
    ],
)
def test_an_sae_of_several_hook_points_does_not_steer(hook_point: str, says: str) -> None:
    with pytest.raises(MismatchError, match=f"{re.escape(hook_point)}: expected one hook point .*{says}"):
        from_latent(wired(hook_point), 5, MODEL, mean_norm=10.0)


@pytest.mark.parametrize("latent", [-1, 8])
def test_a_latent_that_is_not_there(latent: int) -> None:
    with pytest.raises(UnknownNameError, match="0 to 7"):
        from_latent(artefact(), latent, MODEL, 1.0)


def test_dose_is_the_coefficient_over_the_mean_norm() -> None:
    vector = from_latent(artefact(), 0, MODEL, mean_norm=10.0)
    assert vector.dose(-5.0) == 0.5
    assert vector.coefficient_of(0.5) == 5.0


def test_a_contrast_is_the_difference_of_means_over_the_fit_pairs(tiny: LoadedModel) -> None:
    vector = from_contrast(tiny, "resid_post.2", "flow", PAIRS)

    def tokens(side: str) -> torch.Tensor:
        rows = []
        for pair in PAIRS[:2]:
            ids, start = encode_pair(tiny, pair.prompt, getattr(pair, side))
            states = tiny.model(ids, output_hidden_states=True).hidden_states
            rows.append(states[3][0, start:])
        return torch.cat(rows)

    positive, negative = tokens("positive"), tokens("negative")
    expected = positive.mean(0) - negative.mean(0)
    np.testing.assert_allclose(vector.direction, (expected / expected.norm()).numpy(), atol=1e-5)
    sides = [float((side @ torch.from_numpy(vector.direction)).mean()) for side in (positive, negative)]
    assert sides[0] > vector.source["midpoint"] > sides[1]
    assert vector.source["midpoint"] == pytest.approx(np.mean(sides), abs=1e-4)
    assert np.linalg.norm(vector.direction) == pytest.approx(1, abs=1e-6)


def test_a_contrast_without_fit_pairs(tiny: LoadedModel) -> None:
    with pytest.raises(TextError, match="'fit'"):
        from_contrast(tiny, "resid_post.2", "none", PAIRS[2:])


def test_a_continuation_starts_behind_its_prompt(tiny: LoadedModel) -> None:
    ids, start = encode_pair(tiny, "The river", " ran on")
    assert tiny.tokenizer.decode(ids[0, :start].tolist()) == "The river"


@pytest.mark.parametrize("name", contrast_names())
def test_shipped_pairs(name: str) -> None:
    pairs = load_pairs(name)
    fit, heldout = ([pair for pair in pairs if pair.split == split] for split in ("fit", "heldout"))
    assert (len(fit), len(heldout)) == (40, 24)
    assert not {pair.prompt for pair in fit} & {pair.prompt for pair in heldout}
    assert all(pair.positive.startswith(" ") and pair.negative.startswith(" ") for pair in pairs)


def test_two_contrasts_are_shipped() -> None:
    assert contrast_names() == ["formal_vs_casual", "joyful_vs_gloomy"]


def test_pairs_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text(json.dumps({"prompt": "a", "positive": " b", "negative": " c"}) + "\n\n")
    assert load_pairs(str(path)) == [ContrastPair("a", " b", " c", "fit")]


@pytest.mark.parametrize(
    "line", ["{", "[]", '{"prompt": "a", "positive": " b"}', '{"prompt": "", "positive": 1, "negative": 2}']
)
def test_a_bad_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text(f'{{"prompt": "a", "positive": " b", "negative": " c"}}\n{line}\n')
    with pytest.raises(TextError, match="line 2"):
        load_pairs(str(path))


def test_unknown_contrasts_and_files(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="joyful_vs_gloomy"):
        load_pairs("jolly")
    with pytest.raises(TextError, match="readable"):
        load_pairs(str(tmp_path / "none.jsonl"))


def test_vectors_are_plain_data(vector: SteeringVector) -> None:
    json.dumps(vector.source)
