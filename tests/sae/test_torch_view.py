"""The PyTorch view against its formulas, written out in numpy."""

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch

from activations.errors import ShapeError
from sae.artefact import SaeArtefact
from sae.torch_view import TorchSae


def random_artefact(architecture: Any, seed: int = 0) -> SaeArtefact:
    rng = np.random.default_rng(seed)
    jump = architecture == "jumprelu"
    shapes = {"W_enc": (6, 20), "b_enc": (20,), "W_dec": (20, 6), "b_dec": (6,)}
    tensors: dict[str, Any] = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    threshold = rng.uniform(0, 2, 20).astype(np.float32) if jump else None
    return SaeArtefact(architecture=architecture, threshold=threshold, k=None if jump else 4, **tensors)


def reference(artefact: SaeArtefact, x: np.ndarray) -> np.ndarray:
    pre = (x - artefact.b_dec) @ artefact.W_enc + artefact.b_enc
    if artefact.threshold is not None:
        return np.where(pre > artefact.threshold, np.maximum(pre, 0), 0)
    assert artefact.k is not None
    cutoff = np.sort(pre, axis=-1)[..., -artefact.k][..., None]
    return np.where(pre >= cutoff, np.maximum(pre, 0), 0)


@pytest.fixture(params=["topk", "jumprelu"])
def artefact(request: pytest.FixtureRequest) -> SaeArtefact:
    return random_artefact(request.param)


@pytest.fixture
def x() -> np.ndarray:
    return np.random.default_rng(1).normal(size=(5, 3, 6)).astype(np.float32)


def test_encode_and_decode_follow_the_formulas(artefact: SaeArtefact, x: np.ndarray) -> None:
    sae, latents = TorchSae(artefact), reference(artefact, x)
    np.testing.assert_allclose(sae.encode(torch.tensor(x)), latents, atol=1e-5)
    decoded = latents @ artefact.W_dec + artefact.b_dec
    np.testing.assert_allclose(sae.decode(torch.tensor(latents)), decoded, atol=1e-5)
    np.testing.assert_allclose(sae(torch.tensor(x)), decoded, atol=1e-4)


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
    half = torch.tensor(x).bfloat16()
    assert torch.equal(TorchSae(artefact).encode(half), TorchSae(artefact).encode(half.float()))


def test_another_width_is_refused(artefact: SaeArtefact) -> None:
    with pytest.raises(ShapeError, match="width d_model=6, got 5"):
        TorchSae(artefact).encode(torch.zeros(2, 5))


def test_the_view_has_no_gradients_and_moves_as_a_module(artefact: SaeArtefact) -> None:
    sae = TorchSae(artefact)
    assert not list(sae.parameters())
    assert sae.state_dict().keys() == artefact.tensors().keys()
    assert (sae.d_model, sae.d_sae) == (6, 20)


def test_torch_view_does_not_import_jax() -> None:
    code = "import sys, sae.torch_view; assert not {'jax', 'flax'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)
