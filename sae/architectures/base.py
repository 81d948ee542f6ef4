"""What all sparse autoencoders here share: parameters, the revival of dead latents, and the way to disk.

    pre     = (x - centre) @ W_enc + b_enc
    latents = activation(pre), where most are 0
    y_hat   = latents @ W_dec + b_dec
    loss    = ||y - y_hat||^2 / variance + aux_coefficient * aux + what an architecture adds

An autoencoder reconstructs what it reads: y is x and the centre is b_dec. The trainer scales inputs and targets to unit
variance a dimension; `to_artefact` folds those scales away. An architecture is a subclass of `Selecting`
(sae/architectures/selecting.py), which keeps the k largest latents, or of `Penalised` (sae/architectures/penalised.py),
which lets a penalty push latents to 0. Left out: the optimiser and the data.
"""

from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key

from sae.artefact import SaeArtefact, SavedArchitecture
from sae.config import SaeConfig
from sae.formats.folds import with_subtraction
from sae.kernels import project, unit_rows

Reads = Literal["one", "pair", "several"]


class Scaling(NamedTuple):
    """What raw activations are multiplied by, so that they vary by 1 a dimension on average."""

    inputs: Float[np.ndarray, " d_in"]
    outputs: Float[np.ndarray, " d_out"]


class Means(NamedTuple):
    """Dataset means after scaling; an SAE copies what it takes over, since training consumes its weights."""

    inputs: Float[np.ndarray | Array, " d_in"]
    outputs: Float[np.ndarray | Array, " d_out"]


class Rows(NamedTuple):
    """Weights of some latents."""

    W_enc: Float[Array, "n d_in"]
    b_enc: Float[Array, " n"]
    W_dec: Float[Array, "n d_out"]


class Context(NamedTuple):
    """What a training step knows besides its batch."""

    variance: float | Float[Array, ""]
    """mean ||y - mean y||^2 over the store, after scaling"""
    idle: Int[Array, " d_sae"]
    """tokens since each latent was last active"""
    dead_after: int | Int[Array, ""]
    """how many such tokens make a latent dead"""
    step: int | Int[Array, ""]
    """steps taken before this one"""
    n_steps: int
    """steps of the whole run"""
    k: Float[Array, ""] | None = None
    """in a sweep of k: this SAE's own, where the config has the largest"""
    some_dead: Bool[Array, ""] | None = None
    """in a sweep: whether any of its SAEs has a dead latent, so that all take the same branch"""
    oldest: Rows | None = None
    """weights of `SparseCoder.oldest`, where their gradients are wanted apart from the others"""


class Output(NamedTuple):
    """What one batch gives."""

    loss: Float[Array, ""]
    """what training minimises"""
    terms: dict[str, Float[Array, ""]]
    """by name: fvu (mean squared error over the variance of the store), aux (the share of the residual that dead
    latents leave unexplained; 0 if none is dead), and what an architecture adds to its loss, unweighted"""
    l0: Float[Array, ""]
    """mean number of active latents a token"""
    active: Int[Array, " d_sae"]
    """tokens of the batch on which each latent is active"""
    observed: dict[str, Float[Array, ""]]
    """what `observe` needs besides, by name"""


class SparseCoder(nnx.Module):
    """Parameters of a sparse autoencoder; subclasses say which latents are active and what they are trained with."""

    reads: ClassVar[Reads] = "one"
    """one: an autoencoder of one hook point; pair: from one to another; several: an autoencoder of several"""
    widens: ClassVar[bool] = True
    """whether latents that are never active may be appended without a change to the others; sweeps of d_sae do that"""

    W_enc: nnx.Param[Float[Array, "d_in d_sae"]]
    b_enc: nnx.Param[Float[Array, " d_sae"]]
    W_dec: nnx.Param[Float[Array, "d_sae d_out"]]
    b_dec: nnx.Param[Float[Array, " d_out"]]

    def __init__(self, config: SaeConfig, means: Means, key: Key[Array, ""]):
        """Start from random unit decoder rows, the encoder tied to them, and b_dec at the dataset mean."""
        d_in, d_out = len(means.inputs), len(means.outputs)
        rows = unit_rows(jax.random.normal(key, (config.width(d_in), d_out)))
        tied = rows if d_in == d_out else unit_rows(jax.random.normal(key, (len(rows), d_in)))
        self.config = config
        self.W_enc, self.b_enc = nnx.Param(tied.T), nnx.Param(jnp.zeros(len(rows)))
        self.W_dec, self.b_dec = nnx.Param(rows), nnx.Param(jnp.array(means.outputs, jnp.float32))

    @property
    def d_sae(self) -> int:
        """Number of latents."""
        return self.W_dec[...].shape[0]

    def aim(self, context: Context) -> int | Float[Array, ""]:
        """Active latents a token to aim at."""
        return self.config.k if context.k is None else context.k

    @property
    def centre(self) -> Float[Array, " d_in"]:
        """What is subtracted from inputs before the encoder."""
        return self.b_dec[...]

    def preactivations(self, x: Float[Array, "batch d_in"]) -> Float[Array, "batch d_sae"]:
        """(x - centre) @ W_enc + b_enc."""
        return project(x, self.W_enc[...], self.centre) + self.b_enc[...]

    def loss(self, x: Float[Array, "batch d_in"], y: Float[Array, "batch d_out"], context: Context) -> Output:
        """Losses of a batch of scaled inputs and targets."""
        raise NotImplementedError

    def observe(self, output: Output, context: Context) -> None:
        """Update running statistics after a training step; most architectures have none."""

    def oldest(self, idle: Int[Array, " d_sae"]) -> Int[Array, " aux_k"]:
        """The aux_k latents that have been idle longest."""
        return lax.top_k(idle, min(self.config.aux_k, len(idle)))[1]

    def rows(self, latents: Int[Array, " n"]) -> Rows:
        """Their weights."""
        return Rows(self.W_enc[...].T[latents], self.b_enc[...][latents], self.W_dec[...][latents])

    def revival(
        self, x: Float[Array, "batch d_in"], residual: Float[Array, "batch d_out"], context: Context
    ) -> Float[Array, ""]:
        """AuxK: the share of the residual's variance that dead latents leave unexplained, or 0 if none is dead.

        ||r - relu(pre) @ W_dec||^2 / ||r - mean r||^2 over the aux_k longest idle dead latents; gradients reach their
        encoder columns and decoder rows, and nothing else. Source: Gao et al. 2024, arXiv:2406.04093, A.2, who choose
        the aux_k dead latents anew for each token; here a queue does, since a second top-k costs as much as the first.
        """
        residual = lax.stop_gradient(residual)
        latents = self.oldest(context.idle)
        dead = context.idle[latents] >= context.dead_after
        rows = self.rows(latents) if context.oldest is None else context.oldest

        def unexplained() -> Array:
            pre = (x - lax.stop_gradient(self.centre)) @ rows.W_enc.T + rows.b_enc
            error = residual - jnp.where(dead, jax.nn.relu(pre), 0) @ rows.W_dec
            centred = residual - residual.mean(axis=0)
            return jnp.where(dead.any(), (error**2).sum() / jnp.maximum((centred**2).sum(), 1e-12), 0)

        some_dead = dead.any() if context.some_dead is None else context.some_dead
        return lax.cond(some_dead, unexplained, lambda: jnp.float32(0))

    def saved(self) -> tuple[SavedArchitecture, np.ndarray | None, int | None]:
        """Name of the saved form, its thresholds or none, its k or none."""
        raise NotImplementedError

    def saved_encoder(self) -> tuple[Float[np.ndarray, "d_in d_sae"], Float[np.ndarray, " d_sae"]]:
        """W_enc and b_enc of the saved form."""
        return np.asarray(self.W_enc[...]), np.asarray(self.b_enc[...])

    def to_artefact(self, scaling: Scaling, metadata: dict[str, Any]) -> SaeArtefact:
        """The SAE as it is saved: it reads and writes raw activations, and its decoder rows have norm 1."""
        return SaeArtefact(**self.folded(scaling), metadata=metadata)

    def folded(self, scaling: Scaling) -> dict[str, Any]:
        """Fields of the artefact but its metadata, with the scales of inputs and outputs folded into the weights.

        With n the norm of a row of W_dec / s_out: W_enc s_in n, b_enc n, threshold n, W_dec / (s_out n), b_dec / s_out.
        """
        architecture, threshold, k = self.saved()
        (W_enc, b_enc), W_dec = self.saved_encoder(), np.asarray(self.W_dec[...])
        norm = _row_norms(W_dec, scaling.outputs)
        return {
            "architecture": architecture,
            "W_enc": W_enc * np.outer(scaling.inputs, norm),
            "b_enc": b_enc * norm,
            "W_dec": W_dec / np.outer(norm, scaling.outputs),
            "b_dec": np.asarray(self.b_dec[...]) / scaling.outputs,
            "threshold": None if threshold is None else threshold * norm,
            "k": k,
        }

    def adopt(self, artefact: SaeArtefact, scaling: Scaling) -> None:
        """Start from the weights of a saved SAE instead of random ones.

        The reverse of `folded`; rows of any norm become unit rows without changing what the SAE computes.
        """
        artefact = with_subtraction(artefact)
        rows = artefact.W_dec * scaling.outputs
        norm = np.maximum(np.linalg.norm(rows, axis=1), 1e-12)
        self.W_dec[...] = jnp.asarray(rows / norm[:, None])
        self.W_enc[...] = jnp.asarray(artefact.W_enc / scaling.inputs[:, None] * norm)
        self.b_enc[...] = jnp.asarray(artefact.b_enc * norm)
        self.b_dec[...] = jnp.asarray(artefact.b_dec * scaling.outputs)
        if artefact.threshold is not None:
            self.adopt_threshold(jnp.asarray(artefact.threshold * norm))

    def adopt_threshold(self, threshold: Float[Array, " d_sae"]) -> None:
        """Start from these thresholds; most architectures have none."""


def _row_norms(W_dec: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Norms of the rows of W_dec / scale; exact where one scale serves all, since rows have norm 1."""
    if (scale == scale[0]).all():
        return np.full(len(W_dec), 1 / scale[0], np.float32)
    return np.linalg.norm(W_dec / scale, axis=1).astype(np.float32)
