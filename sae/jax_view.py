"""A saved SAE in JAX, for measuring it while it is trained; no PyTorch.

The arithmetic is that of `sae.artefact.SaeArtefact`, in float32, which a GPU's own default would round. Left out:
training.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from sae.artefact import SaeArtefact
from sae.kernels import Codes, densify


class JaxSae:
    """Encode and reconstruct raw activations with a saved SAE."""

    def __init__(self, artefact: SaeArtefact):
        """Take the weights over."""
        self._kind = artefact.architecture, artefact.k, artefact.apply_b_dec_to_input
        self._weights = {name: jnp.asarray(tensor) for name, tensor in artefact.tensors().items()}

    def encode(self, x: Float[Array, "batch d_in"]) -> Float[Array, "batch d_sae"]:
        """All latents of each token."""
        return _encode(self._kind, self._weights, x)

    def reconstruct(
        self, x: Float[Array, "batch d_in"], latents: Float[Array, "batch d_sae"]
    ) -> Float[Array, "batch d_out"]:
        """latents @ W_dec + b_dec, and x @ W_skip.T where there is one."""
        return _reconstruct(self._weights, x, latents)


@partial(jax.jit, static_argnums=0)
def _encode(kind: tuple[str, int | None, bool], weights: dict[str, Array], x: Array) -> Array:
    architecture, k, is_centred = kind
    with jax.default_matmul_precision("float32"):
        pre = (x - weights["b_dec"] if is_centred else x) @ weights["W_enc"] + weights["b_enc"]
    positive = jax.nn.relu(pre)
    if architecture == "standard":
        return positive
    if architecture == "jumprelu":
        return jnp.where(pre > weights["threshold"], positive, 0)
    assert k is not None
    return densify(Codes(*lax.top_k(positive, k)), pre.shape[1])


@jax.jit
def _reconstruct(weights: dict[str, Array], x: Array, latents: Array) -> Array:
    with jax.default_matmul_precision("float32"):
        y = latents @ weights["W_dec"] + weights["b_dec"]
        return y + x @ weights["W_skip"].T if "W_skip" in weights else y
