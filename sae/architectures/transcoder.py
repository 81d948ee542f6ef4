"""Transcoders: they read one hook point and reconstruct another, such as an MLP's output from what it reads.

    pre   = (x - mean x) @ W_enc + b_enc,  latents as in BatchTopK
    y_hat = latents @ W_dec + b_dec (+ (x - mean x) @ W_skip.T for the skip transcoder)

The mean of the inputs is folded into the biases when the SAE is saved. W_skip starts at 0, and takes up what is linear
in x, so that latents need not. Source: Dunefsky et al. 2024, arXiv:2406.11944; Paulo et al. 2025, arXiv:2501.18823.
"""

from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Key

from sae.architectures.base import Means, Reads, Scaling
from sae.architectures.batchtopk import BatchTopK
from sae.artefact import SaeArtefact
from sae.config import SaeConfig
from sae.kernels import Codes


class Transcoder(BatchTopK):
    """From one hook point to another, through BatchTopK latents."""

    reads: ClassVar[Reads] = "pair"

    mean_in: nnx.BatchStat[Float[Array, " d_in"]]

    def __init__(self, config: SaeConfig, means: Means, key: Key[Array, ""]):
        """As BatchTopK; inputs are centred on their mean, which stays as it is."""
        super().__init__(config, means, key)
        self.mean_in = nnx.BatchStat(jnp.array(means.inputs, jnp.float32))

    @property
    def centre(self) -> Float[Array, " d_in"]:
        """The mean of the inputs."""
        return self.mean_in[...]

    def folded(self, scaling: Scaling) -> dict[str, Any]:
        """Without a subtraction: b_enc - mean_in @ W_enc."""
        fields = super().folded(scaling)
        b_enc = fields["b_enc"] - (np.asarray(self.centre) / scaling.inputs) @ fields["W_enc"]
        return fields | {"b_enc": b_enc, "apply_b_dec_to_input": False, "transcodes": True}

    def adopt(self, artefact: SaeArtefact, scaling: Scaling) -> None:
        """The reverse."""
        super().adopt(artefact, scaling)
        self.b_enc[...] += self.centre @ self.W_enc[...]


class SkipTranscoder(Transcoder):
    """A transcoder with a linear path beside its latents."""

    W_skip: nnx.Param[Float[Array, "d_out d_in"]]

    def __init__(self, config: SaeConfig, means: Means, key: Key[Array, ""]):
        """As a transcoder; the linear path starts at 0."""
        super().__init__(config, means, key)
        self.W_skip = nnx.Param(jnp.zeros((len(means.outputs), len(means.inputs))))

    def errors(
        self, codes: Codes, x: Float[Array, "batch d_in"], y: Float[Array, "batch d_out"]
    ) -> tuple[Float[Array, ""], Float[Array, "batch d_out"]]:
        """As of all, of what the linear path leaves."""
        return super().errors(codes, x, y - (x - self.centre) @ self.W_skip[...].T)

    def folded(self, scaling: Scaling) -> dict[str, Any]:
        """W_skip s_in / s_out, and b_dec less what the linear path makes of the mean."""
        fields = super().folded(scaling)
        W_skip = np.asarray(self.W_skip[...]) * np.outer(1 / scaling.outputs, scaling.inputs)
        b_dec = fields["b_dec"] - W_skip @ (np.asarray(self.centre) / scaling.inputs)
        return fields | {"b_dec": b_dec, "W_skip": W_skip}

    def adopt(self, artefact: SaeArtefact, scaling: Scaling) -> None:
        """The reverse; a transcoder without a linear path starts it at 0."""
        super().adopt(artefact, scaling)
        W_skip = np.zeros(self.W_skip[...].shape, np.float32) if artefact.W_skip is None else artefact.W_skip
        self.W_skip[...] = jnp.asarray(W_skip * np.outer(scaling.outputs, 1 / scaling.inputs))
        self.b_dec[...] += self.W_skip[...] @ self.centre
