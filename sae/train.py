"""Train SAEs on an activation store, one for each hook point and point of a sweep, in one pass over its tokens.

1. Check the config against the store, before anything is written (`sae.run`). 2. Resume from the newest checkpoint, if
there is one. 3. For each step: take batch i from the feed (`sae.feed`), and a step of each SAE; now and then log,
evaluate on held-out tokens, keep a checkpoint. 4. Save each SAE with its provenance and metrics under OUT/sae.

A ring (`sae.live`) is trained on while it is harvested: the loop waits where it is ahead, and each checkpoint lets the
ring release what lies before it. Batch i and the step are pure functions, so a resumed run gives the same bits as one
that was never stopped. The SAEs of a sweep (`sae.sweep`) are one state and one step; one that diverges does not stop
the others, and is not saved once its weights are no numbers. Several processes (`sae.hosts`) take the same steps, each
with its part of the batch and of the state; the first of them measures, logs and saves.
"""

import math
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from activations.errors import DeviceMemoryError, InterruptedRunError, NumericsError, SaekitError
from activations.ring import POLL_S
from sae import hosts
from sae.artefact import SaeArtefact
from sae.checkpoints import Checkpoints, States
from sae.config import TrainConfig
from sae.feed import DeviceActivations, InFlight, feed
from sae.jax_view import JaxSae
from sae.kernels import why_not_triton
from sae.log import Row, Write, run_log
from sae.metrics import Evaluation, density_histogram
from sae.provenance import provenance
from sae.run import Job, Run, prepare
from sae.step import (
    Plan,
    Step,
    StepMetrics,
    TrainState,
    assemble,
    create,
    make_step,
    schedule,
    start,
    where_tokens_go,
)
from sae.sweep import is_sweep, make_sweep_step, owned, points, stack, widest
from sae.watch import View, live_view
from sae.wiring import side_by_side

DIVERGED = 1e3
"""a loss this large, where predicting the mean costs 1, does not come back"""
EVAL_CELLS = 2**24
"""latents that an evaluation holds at a time"""


class TrainedSae(NamedTuple):
    """One SAE of a run."""

    artefact: SaeArtefact
    path: Path
    """where it was saved"""
    metrics: dict[str, float]
    """held-out fvu, l0, dead_fraction and dense_fraction, and how the training went"""


class TrainResult(NamedTuple):
    """What a run leaves."""

    saes: dict[str, TrainedSae]
    """by the hook points that it was trained for; in a sweep by its directory in sae/, without those that diverged"""
    n_steps: int
    """steps of the whole run"""
    resumed_from: int
    """step that this call began after"""


def train(config: TrainConfig) -> TrainResult:
    """Train, or resume training, and save to `config.out`.

    Raises: MissingArtefactError, HookPointError, ShapeError, ConfigError or MismatchError before anything is written;
    NumericsError naming the last good checkpoint; DeviceMemoryError saying which settings to lower;
    InterruptedRunError after Ctrl-C, with a checkpoint kept. Of several processes also HostLostError if one never came.
    """
    with hosts.together(config.compute.patience_s):
        return _train(config)


def _train(config: TrainConfig) -> TrainResult:
    hosts.at("reading the store")
    run = prepare(config)
    hosts.agree(_told(run))
    with Checkpoints(config, run.store.fingerprint) as checkpoints:
        if hosts.is_first():
            _say_what_is_missing(config)
            config.save(config.out / "config.yaml")
        resumed_from = checkpoints.last
        unsaved = [name for name, job in run.jobs.items() if resumed_from < run.n_steps or not job.path.exists()]
        if unsaved:
            with _device_memory(config):
                states, tok_s = _loop(run, checkpoints)
                for name in unsaved:
                    _save(run, run.jobs[name], run.state(name, states), tok_s)
        run.order.finish()
    hosts.meet("all SAEs saved")
    saved = {name: SaeArtefact.load(job.path) for name, job in run.jobs.items() if job.path.exists()}
    saes = {name: TrainedSae(sae, run.jobs[name].path, sae.metadata["metrics"]) for name, sae in saved.items()}
    return TrainResult(saes, run.n_steps, resumed_from)


def _told(run: Run) -> dict[str, Any]:
    """What processes that train together have to have in common."""
    versions = {"jax": jax.__version__, "saekit": version("saekit")}
    return run.config.model_dump(mode="json", exclude={"store"}) | versions | {"store": run.store.fingerprint}


def _say_what_is_missing(config: TrainConfig) -> None:
    if config.compute.kernels == "auto" and jax.default_backend() == "gpu" and (missing := why_not_triton()):
        sys.stderr.write(f"  slower kernels: {missing}\n")


def _save(run: Run, job: Job, state: TrainState, tok_s: float) -> None:
    config, n_tokens = job.config, run.n_steps * run.config.batch_size
    if is_sweep(run.config) and not _is_finite(state):
        return
    hosts.at(f"saving {job.path}")
    state = _to_read(state)
    if not hosts.is_first():
        return
    metrics = {**evaluate(run, job, state).summary(), "train_tok_s": tok_s, "train_tokens": n_tokens}
    sae, about = assemble(config.sae, state), provenance(config, job.wiring, run.store, run.stats, metrics)
    sae.to_artefact(job.plan.scaling, about).save(job.path)


def _to_read(state: TrainState) -> TrainState:
    """The state with weights that this process can read, all of which have to ask."""
    params, statistics = hosts.whole((state.params, state.statistics))
    return state._replace(params=params, statistics=statistics)


def evaluate(run: Run, job: Job, state: TrainState) -> Evaluation:
    """Measure the SAE on held-out tokens, as it will be used: in its saved form, each token alone."""
    artefact = assemble(job.config.sae, state).to_artefact(job.plan.scaling, {})
    sae, wiring = JaxSae(artefact), job.wiring
    mean = np.concatenate([run.stats[name].mean for name in wiring.writes])
    evaluation = Evaluation(mean, artefact.d_sae)
    x, y = (side_by_side(run.held_out, names) for names in (wiring.reads, wiring.writes))
    rows = max(1, EVAL_CELLS // artefact.d_sae)
    for i in range(0, len(x), rows):
        hosts.busy()
        part = jnp.asarray(x[i : i + rows])
        latents = sae.encode(part)
        evaluation.add(y[i : i + rows], np.asarray(sae.reconstruct(part, latents)), np.asarray(latents))
    return evaluation


def _first_states(run: Run) -> States:
    states = {}
    for wiring, jobs in run.stacks.items():
        first = [_first_state(run, job) for job in jobs.values()]
        states[wiring] = stack(first) if is_sweep(run.config) else first[0]
    return states


def _first_state(run: Run, job: Job) -> TrainState:
    sae = create(job.config, job.plan)
    if run.initial is not None:
        sae.adopt(run.initial, job.plan.scaling)
    nnx.update(sae, hosts.of_first(nnx.state(sae)))
    return start(job.config, job.plan, sae)


def _step(run: Run) -> Step:
    """The compiled step: of one SAE, or of all of a sweep that are wired alike."""
    jobs = list(next(iter(run.stacks.values())).values())
    plan = jobs[0].plan
    if not is_sweep(run.config):
        return make_step(run.config, plan)
    return make_sweep_step(widest(run.config), plan, owned([job.config for job in jobs], [job.plan for job in jobs]))


def _plans(run: Run) -> dict[str, Plan]:
    """The plan that the step of each SAE has: all hook points share those of the first."""
    first = list(next(iter(run.stacks.values())).values())
    return {name: job.plan for jobs in run.stacks.values() for name, job in zip(jobs, first, strict=True)}


def _loop(run: Run, checkpoints: Checkpoints) -> tuple[States, float]:
    """Steps from the newest checkpoint to the last; returns the states and the tokens a second."""
    config, n_steps, first = run.config, run.n_steps, checkpoints.last
    hosts.at("its first weights")
    states, said = checkpoints.restore(_first_states(run)), set[str]()
    step, speed, in_flight = _step(run), Speed(config.batch_size), InFlight()
    lrs = {name: schedule(config, plan) for name, plan in _plans(run).items()}
    with (
        _reports(run, first) as (log, view),
        _ctrl_c() as stopped,
        feed(run.order, first, n_steps, where_tokens_go(config)) as batches,
    ):
        for i in range(first + 1, n_steps + 1):
            _wait(run, checkpoints, states, i - 1, stopped)
            hosts.at(f"batch {i}")
            batch = next(batches)
            hosts.at(f"step {i}")
            metrics = _step_all(run, step, states, batch)
            in_flight.add(metrics)
            view.step(i)
            speed.count(metrics)
            last, stop = i == n_steps, hosts.stop_after(i, stopped.is_set())
            measure, keep = last or i % config.eval_every == 0, last or stop or i % config.checkpoint_every == 0
            if measure or keep or i % config.log_every == 0:
                hosts.at(f"the numbers of step {i}")
                pace = {"tok_s": speed.tok_s, "eta_s": speed.eta_s(n_steps - i)}
                measured = _by_sae(run, metrics)
                bad = {name for name, scalars in measured.items() if not _is_good(scalars)}
                for name, job in run.jobs.items():
                    at = {"step": i, "tokens": i * config.batch_size, "lr": float(lrs[name](i - 1))}
                    row: Row = {**at, **_names(run, name, job), **measured[name], **pace}
                    if name in bad and (not is_sweep(config) or len(bad) == len(measured)):
                        raise _diverged(name, row, checkpoints)
                    if measure and name not in bad:
                        state = _to_read(run.state(name, states))
                        row = {**row, **(_held_out(evaluate(run, job, state)) if hosts.is_first() else {})}
                    if measure or i % config.log_every == 0:
                        log(row)
                        view.row(row)
                said = _say_diverged(bad, said, i)
            if keep:
                hosts.at(f"the checkpoint of step {i}")
                run.order.release(checkpoints.save(i, states))
            if stop and not last:
                raise _interrupted(run, i)
        run.order.release(checkpoints.last)
    return states, speed.tok_s


@contextmanager
def _reports(run: Run, first: int) -> Iterator[tuple[Write, View]]:
    """The log and the view of a run; those of other processes than the first do nothing."""
    config, heading = run.config, "SAE" if is_sweep(run.config) else "hook point"
    if not hosts.is_first():
        yield _Unseen().row, _Unseen()
        return
    with (
        run_log(config, first) as log,
        live_view("train", list(run.jobs), run.n_steps, first, config.batch_size, heading) as view,
    ):
        yield log, view


class _Unseen:
    """A view that shows nothing."""

    def step(self, i: int) -> None:
        pass

    def row(self, row: Row) -> None:
        pass


def _step_all(run: Run, step: Step, states: States, batch: DeviceActivations) -> dict[str, StepMetrics]:
    """One step of each SAE, on the same tokens."""
    metrics = {}
    for name, jobs in run.stacks.items():
        job = next(iter(jobs.values()))
        inputs = _joined(batch, job.wiring.reads)
        targets = _joined(batch, job.wiring.writes) if job.wiring.transcodes else inputs
        states[name], metrics[name] = step(states[name], inputs, targets, job.scaling)
    return metrics


def _joined(batch: DeviceActivations, names: tuple[str, ...]) -> Float[Array, "token d"]:
    """As `side_by_side`, on the device."""
    return batch[names[0]] if len(names) == 1 else jnp.concatenate([batch[name] for name in names], axis=-1)


def _wait(run: Run, checkpoints: Checkpoints, states: States, done: int, stopped: threading.Event) -> None:
    """Wait for batch `done`; what was used so far makes room for it once a checkpoint is kept."""
    if run.order.is_ready(done):
        return
    checkpoints.save(done, states)
    run.order.release(checkpoints.last)
    while not run.order.is_ready(done):
        if stopped.wait(POLL_S):
            raise _interrupted(run, done)


def _interrupted(run: Run, done: int) -> InterruptedRunError:
    expected, got = f"{run.n_steps} steps", f"a stop after {done}"
    return InterruptedRunError(run.config.out, expected=expected, got=got, fix="Run it again to resume.")


class Speed:
    """Tokens a second since the first step, which compiles."""

    def __init__(self, batch_size: int):
        self._batch_size, self._steps, self._began = batch_size, -1, 0.0

    def count(self, metrics: Any) -> None:
        """Count one step in."""
        if self._steps < 0:
            jax.block_until_ready(metrics)
            self._began = time.perf_counter()
        self._steps += 1

    @property
    def tok_s(self) -> float:
        """0 until the second step."""
        return max(self._steps, 0) * self._batch_size / max(time.perf_counter() - self._began, 1e-9)

    def eta_s(self, steps: int) -> float:
        """Seconds that so many more steps will take; 0 while that is unknown."""
        return steps * self._batch_size / self.tok_s if self.tok_s else 0.0


def _by_sae(run: Run, metrics: dict[str, StepMetrics]) -> dict[str, dict[str, float]]:
    """Numbers of a step by SAE."""
    scalars = {}
    for wiring, jobs in run.stacks.items():
        plain = {name: value for name, value in metrics[wiring]._asdict().items() if name != "terms"}
        values = {name: np.ravel(value).tolist() for name, value in {**plain, **metrics[wiring].terms}.items()}
        for i, name in enumerate(jobs):
            scalars[name] = {key: value[i] for key, value in values.items()}
    return scalars


def _names(run: Run, name: str, job: Job) -> Row:
    """Whose row it is."""
    return {"hook_point": str(job.wiring)} | ({"sae": name} if is_sweep(run.config) else {})


def _held_out(evaluation: Evaluation) -> Row:
    measured = {**evaluation.summary(), "density_histogram": density_histogram(evaluation.density)}
    return {f"holdout_{name}": value for name, value in measured.items()}


def _is_good(scalars: dict[str, float]) -> bool:
    return all(map(math.isfinite, scalars.values())) and scalars["loss"] < DIVERGED


def _is_finite(state: TrainState) -> bool:
    return all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(state.params))


def _say_diverged(bad: set[str], said: set[str], step: int) -> set[str]:
    """Tell of the SAEs of a sweep that have diverged since; returns all that were told of."""
    for name in sorted(bad - said):
        sys.stderr.write(f"  {name} diverged by step {step}; the others go on\n")
    return said | bad


def _diverged(name: str, row: Row, checkpoints: Checkpoints) -> NumericsError:
    good = f"checkpoint {checkpoints.path / str(checkpoints.last)} is good" if checkpoints.last else "there is none"
    return NumericsError(
        f"{name}, step {row['step']}",
        expected=f"a finite loss below {DIVERGED:g}",
        got=f"loss {row['loss']:g}, gradient norm {row['grad_norm']:g}",
        fix=f"Lower lr, or check the store; of the checkpoints kept: {good}.",
    )


@contextmanager
def _device_memory(config: TrainConfig) -> Iterator[None]:
    """Turn a device that is out of memory into an error that says what to lower."""
    try:
        yield
    except SaekitError:
        raise
    except Exception as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        n_saes = len(config.hook_points) * len(points(config))
        raise DeviceMemoryError(
            f"{jax.devices()[0].device_kind}",
            expected="room for the weights, Adam's moments and a batch",
            got=f"out of memory at batch_size {config.batch_size}, {n_saes} SAEs",
            fix="Lower batch_size, sae.d_sae or the number of SAEs, or raise compute.latent_parallel; a checkpoint is "
            "resumed if there is one.",
        ) from error


@contextmanager
def _ctrl_c() -> Iterator[threading.Event]:
    """Yield an event that the first Ctrl-C sets, so that a step is never cut; the second one interrupts at once."""
    stopped = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stopped
        return
    before = signal.getsignal(signal.SIGINT)

    def on_signal(*_: object) -> None:
        stopped.set()
        signal.signal(signal.SIGINT, before)
        if hosts.several():
            signal.raise_signal(signal.SIGTERM)  # of which JAX tells the other processes

    signal.signal(signal.SIGINT, on_signal)
    try:
        yield stopped
    finally:
        signal.signal(signal.SIGINT, before)
