"""Several SAEs that differ in k, learning rate, seed or width, trained as one on one stream of activations.

1. `points` makes of a config with a sweep one config for each SAE; 2. `stack` puts their states together, each array
with an axis in front; 3. `make_sweep_step` compiles a step of all of them on the same batch. On an accelerator that is
one batched step, whose matrix products fill it where those of one small SAE do not; a CPU has nothing to spare, and
takes one SAE after the other. 4. `unstack` gives one of them back.

What an SAE has of its own reaches the step as a number of its own (`sae.step.Own`); everything else is the code of an
SAE that is trained alone, and the result is that of one (tests/sae/test_sweep.py). An SAE that is narrower than the
widest is padded: latents that follow its own have zero weights and a bias of -inf, so that they are never active and
get no gradient. Left out: sweeps of anything that changes what is computed, such as the architecture.
"""

from collections.abc import Sequence
from functools import partial
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from activations.errors import ConfigError
from sae.architectures import find
from sae.architectures.base import Scaling
from sae.config import SweepConfig, TrainConfig
from sae.step import NEVER_IDLE, Own, Plan, Step, StepMetrics, TrainState, step_of


def is_sweep(config: TrainConfig) -> bool:
    """Whether the config asks for a sweep."""
    return config.sweep != SweepConfig()


def points(config: TrainConfig) -> dict[str, TrainConfig]:
    """The config of each SAE, by a name that is safe in paths and says what is swept; without a sweep, `config` by "".

    Trained alone, each gives the SAE that it is in the sweep.

    >>> list(points(TrainConfig(sweep=SweepConfig(k=(16, 32), lr=(0.001,)))))
    ['k=16,lr=0.001', 'k=32,lr=0.001']
    """
    given = {name: values for name, values in config.sweep if values is not None}
    chosen = [dict(zip(given, values, strict=True)) for values in product(*given.values())]
    return {",".join(f"{name}={value}" for name, value in own.items()): _point(config, **own) for own in chosen}


def _point(
    config: TrainConfig,
    k: int | None = None,
    lr: float | None = None,
    seed: int | None = None,
    d_sae: int | None = None,
) -> TrainConfig:
    own = {name: value for name, value in (("k", k), ("d_sae", d_sae)) if value is not None}
    return config.model_copy(
        update={
            "sae": config.sae.model_copy(update=own),
            "lr": config.lr if lr is None else lr,
            "sweep": SweepConfig(seed=None if seed is None else (seed,)),
        }
    )


def check(config: TrainConfig) -> None:
    """Raise ConfigError for a sweep that cannot be."""
    sweep, name = config.sweep, config.sae.architecture
    if sweep.seed and config.finetune:
        got, fix = "a sweep of seeds", "Drop one of them."
        raise ConfigError("sweep.seed", expected="no finetune, which leaves nothing random", got=got, fix=fix)
    if is_sweep(config) and config.compute.n_devices > 1:
        where, fix = "compute", "Set data_parallel and latent_parallel to 1."
        raise ConfigError(where, expected="one device with a sweep", got=f"{config.compute.n_devices}", fix=fix)
    where, got, fix = "sweep.d_sae", sweep.d_sae, "Run once for each width."
    if got and not find(name).widens:
        raise ConfigError(where, expected=f"one width for {name}, which splits it into groups", got=list(got), fix=fix)
    if got and config.sae.orthogonality:
        expected = "one width with sae.orthogonality, which deals out all latents"
        raise ConfigError(where, expected=expected, got=list(got), fix=fix)


def widest(config: TrainConfig) -> TrainConfig:
    """The config of the sweep as a whole: whatever sets a shape is the largest of all."""
    own = {name: max(values) for name, values in (("k", config.sweep.k), ("d_sae", config.sweep.d_sae)) if values}
    return config.model_copy(update={"sae": config.sae.model_copy(update=own)})


def owned(configs: Sequence[TrainConfig], plans: Sequence[Plan]) -> Own:
    """What the SAEs have of their own, stacked; none where they all have the same."""

    def stacked(values: list[Any], dtype: Any) -> Array | None:
        return jnp.array(values, dtype) if len(set(values)) > 1 else None

    return Own(
        k=stacked([config.sae.k for config in configs], jnp.float32),
        lr=stacked([plan.lr for plan in plans], jnp.float32),
        d_sae=stacked([config.sae.d_sae for config in configs], jnp.int32),
    )


def make_sweep_step(config: TrainConfig, plan: Plan, own: Own) -> Step:
    """Compile a step of all SAEs of a sweep, whose states are stacked; it consumes the states it is given.

    Args:
      config: as `widest` makes it.
      plan: of any of the SAEs.
      own: what they have of their own.
    """
    step = step_of(config, plan)

    def all_steps(
        states: TrainState, inputs: Array, targets: Array, scaling: Scaling, own: Own
    ) -> tuple[TrainState, StepMetrics]:
        # The same for all, so that what depends on these is decided once.
        done, some_dead = states.step[0], (states.idle >= plan.dead_after).any()

        def one(its: tuple[TrainState, Own]) -> tuple[TrainState, StepMetrics]:
            return step(its[0]._replace(step=done), inputs, targets, scaling, its[1]._replace(some_dead=some_dead))

        return lax.platform_dependent((states, own), cpu=partial(lax.map, one), default=jax.vmap(one))

    return partial(jax.jit(all_steps, donate_argnums=0), own=own)


def stack(states: Sequence[TrainState]) -> TrainState:
    """States of SAEs as one; those of narrower ones are padded with latents that are never active."""

    def put(*leaves: Array) -> Array:
        shape = tuple(max(sizes) for sizes in zip(*(leaf.shape for leaf in leaves), strict=True))
        wide = [jnp.zeros(shape, leaf.dtype).at[tuple(map(slice, leaf.shape))].set(leaf) for leaf in leaves]
        return jnp.stack(wide)

    stacked = jax.tree.map(put, *states)
    widths = jnp.array([len(state.idle) for state in states])
    exists = jnp.arange(stacked.idle.shape[1]) < widths[:, None]
    b_enc = stacked.params["b_enc"]
    b_enc[...] = jnp.where(exists, b_enc[...], -jnp.inf)
    return stacked._replace(idle=jnp.where(exists, stacked.idle, NEVER_IDLE))


def unstack(states: TrainState, i: int, like: TrainState) -> TrainState:
    """The state of the i-th SAE, in the shapes of `like`."""
    return jax.tree.map(lambda leaf, own: leaf[(i, *map(slice, own.shape))], states, like)
