"""A training run before its first step: what it trains, once the config is checked against its store.

1. Wait for the held-out part of a ring; any other store has to be complete. 2. Make a job of each hook point and point
of a sweep, and check it. 3. Lay out the order of tokens, and read those held out. Nothing is written.
"""

import sys
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import jax

from activations.errors import ConfigError, MismatchError
from activations.ring import POLL_S
from activations.store import ActivationStore
from activations.store_schema import HookStats
from sae import hosts
from sae.architectures import check_wiring
from sae.architectures.base import Scaling
from sae.artefact import SaeArtefact
from sae.checkpoints import States
from sae.config import ComputeConfig, TrainConfig
from sae.data import Activations, DataOrder, TokenOrder, held_out, holdout, statistics
from sae.formats import read_any
from sae.kernels import using
from sae.live import LiveOrder, check_length
from sae.step import Plan, TrainState, create, grid_of, scaling_on_device, start
from sae.sweep import check as check_sweep
from sae.sweep import is_sweep, points, unstack
from sae.wiring import Wiring


@dataclass(frozen=True)
class Job:
    """One SAE of a run."""

    wiring: Wiring
    plan: Plan
    path: Path
    config: TrainConfig
    """the run's, but for what the SAE has of its own in a sweep"""

    @cached_property
    def scaling(self) -> Scaling:
        """That of the plan, on the devices."""
        return scaling_on_device(self.config, self.plan)

    @cached_property
    def like(self) -> TrainState:
        """Shapes of its state."""
        return jax.eval_shape(lambda: start(self.config, self.plan, create(self.config, self.plan)))


@dataclass(frozen=True)
class Run:
    """A config that was checked against its store."""

    config: TrainConfig
    store: ActivationStore
    order: DataOrder
    stats: dict[str, HookStats]
    jobs: dict[str, Job]
    """by name, which rows of the log and the result go by"""
    held_out: Activations
    initial: SaeArtefact | None

    @property
    def n_steps(self) -> int:
        """Steps of the whole run."""
        return next(iter(self.jobs.values())).plan.n_steps

    @cached_property
    def stacks(self) -> dict[str, dict[str, Job]]:
        """Names and jobs of what shares a state: one SAE, or all of a sweep that are wired alike; by their wiring."""
        stacks: dict[str, dict[str, Job]] = {}
        for name, job in self.jobs.items():
            stacks.setdefault(str(job.wiring), {})[name] = job
        return stacks

    def state(self, name: str, states: States) -> TrainState:
        """The state of one SAE."""
        job, wiring = self.jobs[name], str(self.jobs[name].wiring)
        if not is_sweep(self.config):
            return states[wiring]
        return unstack(states[wiring], list(self.stacks[wiring]).index(name), job.like)


def prepare(config: TrainConfig) -> Run:
    """Check a config against its store and this machine, without writing anything."""
    with using(config.compute.kernels, grid_of(config)):  # raises where these can't run
        pass
    store = ActivationStore.open(config.store)
    if store.meta.ring:
        _check_alone(config)
        store = _begun(store)
        check_length(store, config.train_tokens)
    elif not store.is_complete:
        got = f"one that stopped after {store.n_sequences} sequences"
        raise MismatchError(config.store, expected="a finished harvest", got=got, fix="Run saekit harvest again.")
    wirings = _wirings(config)
    names = tuple(dict.fromkeys(name for wiring in wirings for name in wiring.hook_points))
    stats = {name: statistics(store, name) for name in names}
    jobs = _jobs(config, wirings, stats)
    initial = read_any(config.finetune) if config.finetune else None
    for job in jobs.values():
        _check(config, job, initial)
    first, stop = held_out(store, config.holdout_fraction)
    x = holdout(store, names, first, stop, config.eval_tokens)
    return Run(config, store, _order(config, store, names, first), stats, jobs, x, initial)


def _wirings(config: TrainConfig) -> list[Wiring]:
    wirings = [Wiring.parse(text) for text in config.hook_points]
    for wiring in wirings:
        check_wiring(config.sae.architecture, wiring)
    if len(set(wirings)) < len(wirings):
        got = ", ".join(config.hook_points)
        raise ConfigError("hook_points", expected="each one once", got=got, fix="Drop the repeats.")
    return wirings


def _jobs(config: TrainConfig, wirings: list[Wiring], stats: dict[str, HookStats]) -> dict[str, Job]:
    check_sweep(config)
    jobs = {}
    for wiring in wirings:
        for point, own in points(config).items():
            folders = [wiring.file_name] * (len(wirings) > 1) + [point] * bool(point)
            parts = [str(wiring)] * (len(wirings) > 1 or not point) + [point] * bool(point)
            path = config.out.joinpath("sae", *folders)
            jobs["/".join(parts)] = Job(wiring, Plan.make(own, wiring, stats), path, own)
    return jobs


def _check(config: TrainConfig, job: Job, initial: SaeArtefact | None) -> None:
    d_in, d_out = len(job.plan.scaling.inputs), len(job.plan.scaling.outputs)
    k, d_sae = job.config.sae.k, job.config.sae.width(d_in)
    if k >= d_sae:
        where = "sweep.k" if config.sweep.k else "sae.k"
        raise ConfigError(where, expected=f"less than d_sae={d_sae}", got=k, fix="Lower k or raise d_sae.")
    _check_devices(config.compute, config.batch_size, d_sae)
    if initial is not None:
        wanted, got = (d_in, d_sae, d_out), (initial.d_model, initial.d_sae, initial.d_out)
        if wanted != got or initial.transcodes != job.wiring.transcodes:
            kind = {False: "an SAE", True: "a transcoder"}
            raise MismatchError(
                f"finetune: {config.finetune}",
                expected=f"{kind[job.wiring.transcodes]} of widths d_in, d_sae, d_out = {wanted}",
                got=f"{kind[initial.transcodes]} of {got}",
                fix="Set sae.d_sae and hook_points to fit it.",
            )
    _ = job.like  # whatever an architecture has against its settings


def _check_devices(compute: ComputeConfig, batch_size: int, d_sae: int) -> None:
    fix = "Change it, or compute.data_parallel and compute.latent_parallel."
    if d_sae % compute.n_devices:
        expected = f"a multiple of the {compute.n_devices} devices, which share the latents"
        raise ConfigError("sae.d_sae", expected=expected, got=d_sae, fix=fix)
    if batch_size % compute.data_parallel:
        expected = f"a multiple of compute.data_parallel={compute.data_parallel}"
        raise ConfigError("batch_size", expected=expected, got=batch_size, fix=fix)


def _order(config: TrainConfig, store: ActivationStore, names: tuple[str, ...], stop: int) -> DataOrder:
    common: dict[str, int] = {"batch_size": config.batch_size, "seed": config.seed, "memory_mb": config.memory_mb}
    if store.meta.ring:
        return LiveOrder(store, names, owner=str(config.out.absolute()), **common)
    return TokenOrder(store, names, stop=stop, **common)


def _check_alone(config: TrainConfig) -> None:
    if hosts.several():
        fix = "Train on a ring in one process, with all devices of its host, or harvest a whole store."
        raise ConfigError(config.store, expected="a whole store", got="a ring, with several processes", fix=fix)


def _begun(store: ActivationStore) -> ActivationStore:
    """A ring whose held-out part is harvested; waits for it."""
    said = False
    while store.n_sequences < store.meta.pinned_sequences and not store.is_complete:
        if not said:
            sys.stderr.write(f"  waiting for the harvest of {store.path}\n")
        said = True
        time.sleep(POLL_S)
        store = ActivationStore.open(store.path)
    return store
