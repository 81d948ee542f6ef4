"""One training step as a pure, jitted function of (state, batch).

1. scale inputs and targets; 2. losses and gradients, with matrix products in bfloat16 where that is faster; 3. clip,
and a step of Adam for what is not frozen, with decoder rows held at norm 1; 4. count how long each latent has been
idle. SAEs of equal shapes share one compiled step. With several devices (`sae.kernels.devices`) the state is split over
them, and the step is the same. Left out: data, evaluation and all that has side effects.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from activations.errors import NumericsError
from activations.store_schema import HookStats
from sae import kernels
from sae.architectures import find
from sae.architectures.base import Context, Means, Rows, Scaling, SparseCoder
from sae.config import SaeConfig, TrainConfig
from sae.kernels.devices import BY_TOKEN, at_rest, make_grid, place
from sae.metrics import DENSE
from sae.orthogonality import alikeness
from sae.wiring import Wiring

FROZEN = {"none": (), "encoder": ("W_enc",), "decoder": ("W_dec",)}


class Moments(NamedTuple):
    """Running means of Adam, as trees of the weights."""

    mean: Any
    """of gradients"""
    square: Any
    """of squared gradients"""


class TrainState(NamedTuple):
    """Everything that a step changes and a checkpoint keeps."""

    params: Any
    """weights, as an nnx state, but W_enc with a row a latent, as its gradient comes, since transposing costs a pass"""
    statistics: Any
    """other variables of the SAE, such as a running threshold"""
    moments: Moments
    """Adam's, of each weight"""
    idle: Int[Array, " d_sae"]
    """tokens since each latent was last active"""
    step: Int[Array, ""]
    """steps taken"""


class Own(NamedTuple):
    """What one SAE of a sweep has of its own; none: all of them have what the config and the plan say."""

    k: Float[Array, ""] | None = None
    """active latents a token; at most that of the config"""
    lr: Float[Array, ""] | None = None
    """peak learning rate"""
    d_sae: Int[Array, ""] | None = None
    """number of latents, which come first; the others are never active and count nowhere"""
    some_dead: Bool[Array, ""] | None = None
    """whether any SAE of the sweep has a dead latent; of all of them, not of one"""


class StepMetrics(NamedTuple):
    """Scalars of one step, before its update."""

    loss: Float[Array, ""]
    terms: dict[str, Float[Array, ""]]
    """parts of the loss by name, unweighted"""
    l0: Float[Array, ""]
    dead_fraction: Float[Array, ""]
    dense_fraction: Float[Array, ""]
    grad_norm: Float[Array, ""]


ALONE = Own()
"""of an SAE that is trained alone"""
NEVER_IDLE = -1
"""idle tokens of what is no latent, so that it is never dead"""
Step = Callable[[TrainState, Any, Any, Scaling], tuple[TrainState, StepMetrics]]
"""(state, raw inputs, raw targets, their scaling) -> (next state, metrics)"""


@dataclass(frozen=True)
class Plan:
    """Numbers that a run derives from its config and its store, for one SAE."""

    n_steps: int
    lr: float | Float[Array, ""]
    """peak learning rate"""
    scaling: Scaling
    """what raw activations are multiplied by, so that they vary by 1 a dimension at each hook point"""
    means: Means
    """dataset means after scaling"""
    dead_after: int
    """idle tokens that make a latent dead"""

    @classmethod
    def make(cls, config: TrainConfig, wiring: Wiring, stats: Mapping[str, HookStats]) -> "Plan":
        """Derive them; raises NumericsError if activations do not vary."""
        scales = {name: _scale(name, stats[name]) for name in wiring.hook_points}

        def both(names: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
            scale = np.concatenate([np.full(len(stats[name].mean), scales[name]) for name in names])
            mean = np.concatenate([stats[name].mean for name in names]) * scale
            return scale.astype(np.float32), mean.astype(np.float32)

        (scale_in, mean_in), (scale_out, mean_out) = both(wiring.reads), both(wiring.writes)
        return cls(
            n_steps=steps_of(config),
            lr=peak_lr(config, config.sae.width(len(scale_in))),
            scaling=Scaling(scale_in, scale_out),
            means=Means(mean_in, mean_out),
            dead_after=max(round(config.dead_fraction * config.train_tokens), 1),
        )


def _scale(name: str, stats: HookStats) -> float:
    variance = stats.mean_sq_norm - float(stats.mean @ stats.mean)
    if not variance > 1e-9 * stats.mean_sq_norm:
        fix = "Harvest another hook point or more text."
        raise NumericsError(f"variance of {name}", expected="more than 0", got=f"{variance:g}", fix=fix)
    return float(np.sqrt(len(stats.mean) / variance))


def steps_of(config: TrainConfig) -> int:
    """Steps of a whole run."""
    return max(config.train_tokens // config.batch_size, 1)


def where_tokens_go(config: TrainConfig) -> NamedSharding | None:
    """How arrays with a row a token are split over several devices; None for one."""
    grid = grid_of(config)
    return None if grid is None else NamedSharding(grid, BY_TOKEN)


def scaling_on_device(config: TrainConfig, plan: Plan) -> Scaling:
    """The scaling of a plan on every device of the config.

    As numpy arrays it would be copied there again on each step, behind the activations that are on their way.
    """
    grid = grid_of(config)
    return jax.device_put(plan.scaling, None if grid is None else NamedSharding(grid, PartitionSpec()))


def peak_lr(config: TrainConfig, d_sae: int) -> float:
    """The learning rate of the config, or the automatic one."""
    return config.lr if config.lr is not None else automatic_lr(d_sae, steps_of(config))


def automatic_lr(d_sae: int, n_steps: int) -> float:
    """Peak learning rate: 1.5e-3 (2^14 / d_sae)^0.5, times (1200 / n_steps)^0.2 in runs of more than 1200 steps.

    The width's share is that of Gao et al. 2024; the factor and the length's share were measured (docs/LOG.md).

    >>> automatic_lr(2**14, 1000)
    0.0015
    """
    return 1.5e-3 * (2**14 / d_sae) ** 0.5 * min(1, 1200 / n_steps) ** 0.2


def schedule(config: TrainConfig, plan: Plan) -> Callable[[Any], Any]:
    """Linear rise, constant, linear fall to zero."""
    warmup, decay = (round(share * plan.n_steps) for share in (config.warmup_fraction, config.decay_fraction))
    rise = optax.linear_schedule(plan.lr / max(warmup, 1), plan.lr, warmup)
    fall = optax.linear_schedule(plan.lr, 0.0, max(decay, 1))
    return optax.join_schedules([rise, fall], [plan.n_steps - decay])


def create(config: TrainConfig, plan: Plan) -> SparseCoder:
    """The SAE before the first step, from random weights."""
    return find(config.sae.architecture)(config.sae, plan.means, jax.random.key(config.weights_seed))


def start(config: TrainConfig, plan: Plan, sae: SparseCoder) -> TrainState:
    """The state before the first step of `sae`, split over the devices of the config."""
    _, params, statistics = nnx.split(sae, nnx.Param, ...)
    params = place(_transposed(params), grid_of(config), sae.d_sae)
    moments = Moments(*(jax.tree.map(jnp.zeros_like, params) for _ in Moments._fields))
    rest = statistics, jnp.zeros(sae.d_sae, jnp.int32), jnp.int32(0)
    statistics, idle, step = place(rest, grid_of(config), sae.d_sae)
    return TrainState(params, statistics, moments, idle, step)


def assemble(config: SaeConfig, state: TrainState) -> SparseCoder:
    """The SAE with the weights of `state`."""
    d_in, d_out = state.params["W_enc"][...].shape[1], state.params["W_dec"][...].shape[1]
    means = Means(jnp.zeros(d_in), jnp.zeros(d_out))
    blank = nnx.eval_shape(lambda: find(config.architecture)(config, means, jax.random.key(0)))
    return nnx.merge(nnx.graphdef(blank), _transposed(state.params), state.statistics)


def _transposed(params: Any) -> Any:
    """The same weights with W_enc transposed."""
    return nnx.State(params | {"W_enc": params["W_enc"].replace(params["W_enc"][...].T)})


def make_step(config: TrainConfig, plan: Plan) -> Step:
    """Compile the training step; it consumes the state it is given."""
    return jax.jit(step_of(config, plan), donate_argnums=0)


def step_of(config: TrainConfig, plan: Plan) -> Callable[..., tuple[TrainState, StepMetrics]]:
    """The training step, to be compiled; its fifth argument, which may be left out, is what an SAE has of its own."""
    settings, grid = config.sae, grid_of(config)

    def loss(params: Any, oldest: Rows, state: TrainState, x: Array, y: Array, own: Own) -> tuple[Array, Any]:
        sae = assemble(settings, state._replace(params=params))
        out = sae.loss(x, y, _context(state, y.shape[1], own)._replace(oldest=oldest))
        if settings.orthogonality:
            alike = alikeness(params["W_dec"][...], state.step, settings, config.seed)
            out = out._replace(loss=out.loss + settings.orthogonality * alike, terms=out.terms | {"alike": alike})
        return out.loss, out

    def _context(state: TrainState, d_out: int, own: Own) -> Context:
        return Context(float(d_out), state.idle, plan.dead_after, state.step, plan.n_steps, own.k, own.some_dead)

    def step(
        state: TrainState, inputs: Array, targets: Array, scaling: Scaling, own: Own = ALONE
    ) -> tuple[TrainState, StepMetrics]:
        x, y = inputs * scaling.inputs, targets * scaling.outputs
        sae = assemble(settings, state)
        latents = sae.oldest(state.idle)
        with matmul(config), kernels.using(config.compute.kernels, grid):
            both = jax.value_and_grad(loss, (0, 1), has_aux=True)
            (_, out), (grads, to_oldest) = both(state.params, sae.rows(latents), state, x, y, own)
            for name, rows in to_oldest._asdict().items():  # a few rows, where one sum would be as large as the weights
                grads[name][...] = grads[name][...].at[latents].add(rows, unique_indices=True)
            rate = schedule(config, plan if own.lr is None else replace(plan, lr=own.lr))(state.step)
            params, moments, norm = advance(config, state, grads, rate)
        sae = assemble(settings, state._replace(params=params))
        sae.observe(out, _context(state, y.shape[1], own))
        idle = count_idle(state.idle, out.active, len(x))
        if own.d_sae is not None:
            idle = jnp.where(jnp.arange(len(idle)) < own.d_sae, idle, NEVER_IDLE)
        _, _, statistics = nnx.split(sae, nnx.Param, ...)
        dead, dense = (_share(which, own.d_sae) for which in (idle >= plan.dead_after, out.active > DENSE * len(x)))
        metrics = StepMetrics(out.loss, out.terms, out.l0, dead, dense, norm)
        state = TrainState(params, statistics, moments, idle, state.step + 1)
        if grid is not None:
            state = lax.with_sharding_constraint(state, at_rest(state, grid, len(idle)))
        return state, metrics

    return step


def grid_of(config: TrainConfig) -> Mesh | None:
    """The devices that take a step together; None for one."""
    return make_grid(config.compute.latent_parallel, config.compute.data_parallel)


def _share(which: Bool[Array, " d_sae"], of: Int[Array, ""] | None) -> Float[Array, ""]:
    return which.mean() if of is None else which.sum() / of


def advance(
    config: TrainConfig, state: TrainState, grads: Any, rate: Float[Array, ""]
) -> tuple[Any, Moments, Float[Array, ""]]:
    """Clip the gradient and take a step; the next weights and moments, and the gradient's norm before clipping."""
    learnt = {name: name == "W_dec" for name in state.params if name not in FROZEN[config.sae.frozen]}
    squares = [kernels.squared_norm(state.params[n][...], grads[n][...], unit) for n, unit in learnt.items()]
    norm = jnp.sqrt(jnp.stack(squares).sum())
    scale = jnp.where(norm < config.grad_clip, 1, config.grad_clip / norm)
    rates = kernels.Rates(scale, rate, config.beta1, config.beta2, state.step + 1)
    before = state.params, state.moments.mean, state.moments.square
    after = [dict(tree) for tree in before]
    for name, unit in learnt.items():
        W, mean, square = (tree[name][...] for tree in before)
        for tree, value in zip(after, kernels.descend(W, grads[name][...], mean, square, rates, unit), strict=True):
            tree[name] = tree[name].replace(value)
    params, *moments = (nnx.State(tree) for tree in after)
    return params, Moments(*moments), norm


def matmul(config: TrainConfig) -> AbstractContextManager[None]:
    """A context in which matrix products are computed in `compute.matmul`, always summed in float32."""
    wanted = config.compute.matmul
    low = wanted == "bfloat16" or (wanted == "auto" and jax.default_backend() != "cpu")
    return jax.default_matmul_precision(kernels.LOW if low else "float32")


def count_idle(idle: Int[Array, " d_sae"], active: Int[Array, " d_sae"], n_tokens: int) -> Int[Array, " d_sae"]:
    """Add the batch to the idle tokens of each latent; active ones start again from 0.

    >>> count_idle(jnp.array([5, 5]), jnp.array([0, 3]), 4).tolist()
    [9, 0]
    """
    longest = 2**30  # far from overflow, and longer than any run needs to tell
    return jnp.where(active > 0, 0, jnp.minimum(idle + n_tokens, longest))
