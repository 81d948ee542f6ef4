"""JAX and PyTorch give the same numbers from the same saved SAE. The only folder where both frameworks meet."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from sae.architectures import ARCHITECTURES, find
from sae.artefact import SaeArtefact
from sae.config import SaeConfig
from sae.torch_view import TorchSae

D_MODEL, D_SAE, K = 32, 96, 8


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_jax_equals_torch_on_random_saes(name: str, seed: int, tmp_path: Path) -> None:
    keys = jax.random.split(jax.random.key(seed), 4)
    sae = find(name)(SaeConfig(architecture=name, d_sae=D_SAE, k=K), jax.random.normal(keys[0], (D_MODEL,)), keys[1])
    sae.b_enc[...] = 0.1 * jax.random.normal(keys[2], (D_SAE,))
    x = jax.random.normal(keys[3], (200, D_MODEL))
    for batch in (x, x[:100]):  # after two different ones, a running threshold equals no pre-activation
        sae.observe(sae.select(sae.preactivations(batch)))
    sae.to_artefact(1.0, {}).save(tmp_path / "sae")

    view = TorchSae(SaeArtefact.load(tmp_path / "sae"))
    latents = view.encode(torch.tensor(np.asarray(x)))
    np.testing.assert_allclose(latents, sae.encode(x), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(view.decode(latents), sae.decode(jnp.asarray(latents)), rtol=1e-5, atol=1e-5)
    assert (latents > 0).any()
