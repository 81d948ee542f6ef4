"""What a training run would take, found out before it starts.

Flow: 1. check the config against the store, as training does; 2. trace the first state of each SAE, and add up its
arrays. Left out: writing anything, a ring, which training would take over, and time, which depends on the machine.
"""

import math
from typing import Any, NamedTuple

import jax

from activations.store import ActivationStore
from sae.config import TrainConfig
from sae.data import TokenOrder
from sae.run import Job, prepare


class SaePlan(NamedTuple):
    """One SAE of a run."""

    d_in: int
    d_sae: int
    d_out: int
    lr: float
    """peak learning rate"""
    state_mb: float
    """megabytes of weights and Adam's moments, which are also what a checkpoint keeps"""


class TrainPlan(NamedTuple):
    """What a run would do."""

    n_steps: int
    tokens: int
    """tokens trained on, counted again in each epoch"""
    epochs: float
    """passes over the store's training tokens"""
    memory_mb: float
    """megabytes that all SAEs hold during a step: their states, and the gradient and one copy of the latents of those
    that take it at once, which is one, or on an accelerator all of a sweep at a hook point"""
    saes: dict[str, SaePlan]
    """by the hook points that they are trained for; in a sweep by their directories in sae/"""

    def figures(self) -> dict[str, Any]:
        """All of it, ready for JSON."""
        return {**self._asdict(), "saes": {name: sae._asdict() for name, sae in self.saes.items()}}


def plan(config: TrainConfig) -> TrainPlan | None:
    """Check a config against its store, and say what training would take; none for a ring, which is not checked.

    Raises: whatever `sae.train.train` raises before it writes.
    """
    if ActivationStore.open(config.store).meta.ring:
        return None
    run = prepare(config)
    assert isinstance(run.order, TokenOrder)
    saes = {name: _sae(job) for name, job in run.jobs.items()}
    held = [_held(config.batch_size, [saes[name] for name in jobs]) for jobs in run.stacks.values()]
    memory_mb = sum(states for states, _ in held) + max(step for _, step in held)
    tokens = run.n_steps * config.batch_size
    return TrainPlan(run.n_steps, tokens, tokens / run.order.n_tokens, memory_mb, saes)


def _sae(job: Job) -> SaePlan:
    n_bytes = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(job.like))
    d_in, d_out = len(job.plan.scaling.inputs), len(job.plan.scaling.outputs)
    return SaePlan(d_in, job.config.sae.width(d_in), d_out, float(job.plan.lr), n_bytes / 2**20)


def _held(batch_size: int, saes: list[SaePlan]) -> tuple[float, float]:
    """Megabytes of the states of SAEs that take a step at once, and of what the step adds; as wide as the widest."""
    states = len(saes) * max(sae.state_mb for sae in saes)
    latents = len(saes) * max(sae.d_sae for sae in saes) * batch_size * 4 / 2**20
    return states, states / 3 + latents
