"""One training step as a pure, jitted function of (state, batch).

1. scale the batch; 2. losses and gradients; 3. project the decoder's gradient, clip, Adam; 4. decoder rows back to norm
1; 5. count how long each latent has been idle. Left out: data, evaluation and everything with side effects.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int

from activations.errors import NumericsError
from activations.store_schema import HookStats
from sae.architectures import find
from sae.architectures.base import SparseCoder, project_gradient, unit_rows
from sae.config import TrainConfig
from sae.kernels import Codes


class TrainState(NamedTuple):
    """Everything that a step changes and a checkpoint keeps."""

    params: Any
    """weights, as an nnx state"""
    statistics: Any
    """other variables of the SAE, such as a running threshold"""
    optimizer: Any
    """Adam's moments and step count"""
    idle: Int[Array, " d_sae"]
    """tokens since each latent was last active"""


class StepMetrics(NamedTuple):
    """Scalars of one step, before its update."""

    loss: Float[Array, ""]
    fvu: Float[Array, ""]
    aux: Float[Array, ""]
    l0: Float[Array, ""]
    dead_fraction: Float[Array, ""]
    grad_norm: Float[Array, ""]


Step = Callable[[TrainState, Float[np.ndarray, "batch d_model"]], tuple[TrainState, StepMetrics]]


@dataclass(frozen=True)
class Plan:
    """Numbers that a run derives from its config and its store."""

    n_steps: int
    lr: float
    """peak learning rate"""
    scale: float
    """what raw activations are multiplied by, so that they vary by 1 a dimension"""
    variance: float
    """mean ||x - mean||^2 after scaling, which is d_model"""
    mean: Float[np.ndarray, " d_model"]
    """dataset mean after scaling"""
    dead_after: int
    """idle tokens that make a latent dead"""

    @classmethod
    def make(cls, config: TrainConfig, stats: HookStats) -> "Plan":
        """Derive them."""
        d_model, variance = len(stats.mean), stats.mean_sq_norm - float(stats.mean @ stats.mean)
        if not variance > 1e-9 * stats.mean_sq_norm:
            fix = "Harvest another hook point or more text."
            raise NumericsError("variance of the activations", expected="more than 0", got=f"{variance:g}", fix=fix)
        scale = float(np.sqrt(d_model / variance))
        return cls(
            n_steps=max(config.train_tokens // config.batch_size, 1),
            lr=config.lr if config.lr is not None else automatic_lr(config.sae.width(d_model)),
            scale=scale,
            variance=float(d_model),
            mean=(stats.mean * scale).astype(np.float32),
            dead_after=max(round(config.dead_fraction * config.train_tokens), 1),
        )


def automatic_lr(d_sae: int) -> float:
    """Peak learning rate, proportional to 1/sqrt(d_sae) as in Gao et al. 2024; the factor was measured (docs/LOG.md).

    >>> automatic_lr(2**14)
    0.001125
    """
    return 1.125e-3 * (2**14 / d_sae) ** 0.5


def schedule(config: TrainConfig, plan: Plan) -> Callable[[Any], Any]:
    """Linear rise, constant, linear fall to zero."""
    warmup, decay = (round(share * plan.n_steps) for share in (config.warmup_fraction, config.decay_fraction))
    rise = optax.linear_schedule(plan.lr / max(warmup, 1), plan.lr, warmup)
    fall = optax.linear_schedule(plan.lr, 0.0, max(decay, 1))
    return optax.join_schedules([rise, fall], [plan.n_steps - decay])


def start(config: TrainConfig, plan: Plan) -> TrainState:
    """The state before the first step."""
    sae = find(config.sae.architecture)(config.sae, jnp.asarray(plan.mean), jax.random.key(config.seed))
    _, params, statistics = nnx.split(sae, nnx.Param, ...)
    idle = jnp.zeros(len(sae.b_enc[...]), jnp.int32)
    return TrainState(params, statistics, _optimizer(config, plan).init(params), idle)


def assemble(config: TrainConfig, plan: Plan, state: TrainState) -> SparseCoder:
    """The SAE with the weights of `state`."""
    make = find(config.sae.architecture)
    blank = nnx.eval_shape(lambda: make(config.sae, jnp.asarray(plan.mean), jax.random.key(0)))
    return nnx.merge(nnx.graphdef(blank), state.params, state.statistics)


def make_step(config: TrainConfig, plan: Plan) -> Step:
    """Compile the training step; it consumes the state it is given."""
    optimizer = _optimizer(config, plan)

    def loss(params: Any, state: TrainState, x: Array) -> tuple[Array, Any]:
        sae = assemble(config, plan, state._replace(params=params))
        out = sae.loss(x, plan.variance, state.idle, plan.dead_after)
        return out.loss, out

    def step(state: TrainState, raw: Array) -> tuple[TrainState, StepMetrics]:
        x = raw * plan.scale
        (_, out), grads = jax.value_and_grad(loss, has_aux=True)(state.params, state, x)
        grads["W_dec"][...] = project_gradient(state.params["W_dec"][...], grads["W_dec"][...])
        updates, moments = optimizer.update(grads, state.optimizer, state.params)
        params: Any = optax.apply_updates(state.params, updates)
        params["W_dec"][...] = unit_rows(params["W_dec"][...])
        sae = assemble(config, plan, state._replace(params=params))
        sae.observe(out.codes)
        idle = count_idle(state.idle, out.codes)
        _, params, statistics = nnx.split(sae, nnx.Param, ...)
        l0 = (out.codes.values > 0).sum(axis=1).mean()
        dead = (idle >= plan.dead_after).mean()
        metrics = StepMetrics(out.loss, out.fvu, out.aux, l0, dead, optax.tree.norm(grads))
        return TrainState(params, statistics, moments, idle), metrics

    return jax.jit(step, donate_argnums=0)


def count_idle(idle: Int[Array, " d_sae"], codes: Codes) -> Int[Array, " d_sae"]:
    """Add the batch to the idle tokens of each latent; active ones start again from 0.

    >>> count_idle(jnp.array([5, 5]), Codes(jnp.array([[2.0]]), jnp.array([[1]]))).tolist()
    [6, 0]
    """
    fired = jnp.zeros(len(idle), bool).at[codes.indices].max(codes.values > 0)
    longest = 2**30  # far from overflow, and longer than any run needs to tell
    return jnp.where(fired, 0, jnp.minimum(idle + len(codes.values), longest))


def _optimizer(config: TrainConfig, plan: Plan) -> optax.GradientTransformation:
    return optax.chain(optax.clip_by_global_norm(config.grad_clip), optax.adam(schedule(config, plan)))
