"""The PyTorch view against its formulas, written out in numpy."""

from typing import Any

import numpy as np
import pytest
import torch

from activations.errors import ShapeError
from sae.artefact import KINDS, SaeArtefact
from sae.torch_view import TorchSae


def random_artefact(name: str, **changes: Any) -> SaeArtefact:
    kind, rng = KINDS[name], np.random.default_rng(0)
    d_out = 5 if kind.transcodes else 6
    shapes = {"W_enc": (6, 20), "b_enc": (20,), "W_dec": (20, d_out), "b_dec": (d_out,)}
    shapes |= {"W_skip": (d_out, 6)} if kind.skips else {}
    fields: dict[str, Any] = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    fields |= {"transcodes": kind.transcodes, "apply_b_dec_to_input": not kind.transcodes}
    if kind.architecture == "jumprelu":
        fields["threshold"] = rng.uniform(0, 2, 20).astype(np.float32)
    k = 4 if kind.architecture == "topk" else None
    return SaeArtefact(architecture=kind.architecture, k=k, **fields | changes)


def reference(artefact: SaeArtefact, x: np.ndarray) -> np.ndarray:
    centred = x - artefact.b_dec if artefact.apply_b_dec_to_input else x
    pre = centred @ artefact.W_enc + artefact.b_enc
    if artefact.architecture == "standard":
        return np.maximum(pre, 0)
    if artefact.threshold is not None:
        return np.where(pre > artefact.threshold, np.maximum(pre, 0), 0)
    assert artefact.k is not None
    cutoff = np.sort(pre, axis=-1)[..., -artefact.k][..., None]
    return np.where(pre >= cutoff, np.maximum(pre, 0), 0)


@pytest.fixture(params=KINDS)
def artefact(request: pytest.FixtureRequest) -> SaeArtefact:
    return random_artefact(request.param)


@pytest.fixture
def x() -> np.ndarray:
    return np.random.default_rng(1).normal(size=(5, 3, 6)).astype(np.float32)


def test_all_of_it_follows_the_formulas(artefact: SaeArtefact, x: np.ndarray) -> None:
    sae, latents = TorchSae(artefact), reference(artefact, x)
    np.testing.assert_allclose(sae.encode(torch.tensor(x)), latents, atol=1e-5)
    decoded = latents @ artefact.W_dec + artefact.b_dec
    np.testing.assert_allclose(sae.decode(torch.tensor(latents)), decoded, atol=1e-5)
    whole = decoded if artefact.W_skip is None else decoded + np.einsum("...i,oi->...o", x, artefact.W_skip)
    np.testing.assert_allclose(sae.reconstruct(torch.tensor(x), torch.tensor(latents)), whole, atol=1e-5)
    np.testing.assert_allclose(sae(torch.tensor(x)), whole, atol=1e-4)


@pytest.mark.parametrize("name", ["standard", "topk", "jumprelu"])
def test_b_dec_is_subtracted_only_where_it_is_said(name: str, x: np.ndarray) -> None:
    plain = random_artefact(name, apply_b_dec_to_input=False)
    np.testing.assert_allclose(TorchSae(plain).encode(torch.tensor(x)), reference(plain, x), atol=1e-5)
    assert not np.allclose(reference(plain, x), reference(random_artefact(name), x), atol=0.1)


def test_some_latents_equal_a_part_of_all(artefact: SaeArtefact, x: np.ndarray) -> None:
    sae, chosen = TorchSae(artefact), torch.tensor([3, 17, 3])
    torch.testing.assert_close(sae.encode_some(torch.tensor(x), chosen), sae.encode(torch.tensor(x))[..., chosen])


def test_threshold_is_strict_and_zero_is_inactive() -> None:
    one = {name: np.ones(shape, np.float32) for name, shape in {"W_enc": (1, 2), "W_dec": (2, 1)}.items()}
    zero = {"b_enc": np.zeros(2, np.float32), "b_dec": np.zeros(1, np.float32)}
    threshold = np.array([1.0, -1.0], np.float32)
    sae = TorchSae(SaeArtefact(architecture="jumprelu", threshold=threshold, **one, **zero))
    assert sae.encode(torch.tensor([[1.0], [1.5], [-0.5]])).tolist() == [[0, 1], [1.5, 1.5], [0, 0]]


def test_half_precision_activations_are_encoded_in_float32(artefact: SaeArtefact, x: np.ndarray) -> None:
    half, sae = torch.tensor(x).bfloat16(), TorchSae(artefact)
    assert torch.equal(sae.encode(half), sae.encode(half.float()))
    assert torch.equal(sae(half), sae(half.float()))


def test_another_width_is_refused(artefact: SaeArtefact) -> None:
    with pytest.raises(ShapeError, match="width d_model=6, got 5"):
        TorchSae(artefact).encode(torch.zeros(2, 5))


def test_the_view_has_no_gradients_and_moves_as_a_module(artefact: SaeArtefact) -> None:
    sae = TorchSae(artefact)
    assert not list(sae.parameters())
    assert sae.state_dict().keys() == artefact.tensors().keys()
    assert (sae.d_model, sae.d_sae) == (6, 20)
