"""Vectors: from latents, their dose, and what is refused."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest

from activations.errors import MismatchError, UnknownNameError
from activations.hook_points import HookPoint
from activations.store_schema import ModelRef
from sae.artefact import SaeArtefact
from steer.latents import places_of
from steer.vectors import SteeringVector, from_latent


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


def test_vectors_are_plain_data(vector: SteeringVector) -> None:
    json.dumps(vector.source)
