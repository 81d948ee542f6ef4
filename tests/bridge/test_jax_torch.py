"""JAX and PyTorch give the same numbers from the same saved SAE. The only folder where both frameworks meet."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from sae.architectures import ARCHITECTURES, find
from sae.architectures.base import Context, Means, Scaling
from sae.artefact import SaeArtefact
from sae.config import SaeConfig
from sae.jax_view import JaxSae
from sae.torch_view import TorchSae

D_IN, D_SAE, K = 32, 96, 8
D_OUT = {"transcoder": 24, "skip_transcoder": 24}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_jax_equals_torch_on_random_saes(name: str, seed: int, tmp_path: Path) -> None:
    keys = jax.random.split(jax.random.key(seed), 5)
    d_out = D_OUT.get(name, D_IN)
    mean = jax.random.normal(keys[0], (D_IN,))
    sae = find(name)(SaeConfig(architecture=name, d_sae=D_SAE, k=K), Means(mean, mean[:d_out]), keys[1])
    sae.b_enc[...] = 0.1 * jax.random.normal(keys[2], (D_SAE,))
    if name == "skip_transcoder":
        sae.W_skip[...] = 0.1 * jax.random.normal(keys[4], (d_out, D_IN))  # type: ignore[attr-defined]
    x = jax.random.normal(keys[3], (200, D_IN))
    context = Context(1.0, jnp.zeros(D_SAE, jnp.int32), 10**6, 0, 100)
    for batch in (x, x[:100]):  # after two different ones, a running threshold equals no pre-activation
        sae.observe(sae.loss(batch, batch[:, :d_out], context), context)
    scaling = Scaling(np.full(D_IN, 0.5, np.float32), np.full(d_out, 0.7 if name in D_OUT else 0.5, np.float32))
    sae.to_artefact(scaling, {}).save(tmp_path / "sae")

    artefact = SaeArtefact.load(tmp_path / "sae")
    ours, theirs = JaxSae(artefact), TorchSae(artefact)
    latents = theirs.encode(torch.tensor(np.asarray(x)))
    np.testing.assert_allclose(latents, ours.encode(x), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
        theirs.reconstruct(torch.tensor(np.asarray(x)), latents),
        ours.reconstruct(x, jnp.asarray(latents)),
        rtol=1e-5,
        atol=1e-5,
    )
    assert (latents > 0).any()
