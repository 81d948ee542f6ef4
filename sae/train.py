"""Train one SAE on one hook point of an activation store.

1. Check the config against the store, before anything is written. 2. Resume from the newest checkpoint, if there is
one. 3. For each step: read batch i, take a step; now and then log, evaluate on held-out tokens, keep a checkpoint.
4. Save the SAE with its provenance and metrics to OUT/sae.

A ring (`sae.live`) is trained on while it is harvested: the loop waits where it is ahead, and each checkpoint lets the
ring release what lies before it. Batch i and the step are pure functions, so a resumed run gives the same bits as one
that was never stopped. Left out: sweeps, several devices.
"""

import math
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from activations.errors import ConfigError, InterruptedRunError, MismatchError, NumericsError
from activations.progress import progress
from activations.ring import POLL_S
from activations.store import ActivationStore
from activations.store_schema import HookStats
from sae.architectures import find
from sae.artefact import SaeArtefact
from sae.checkpoints import Checkpoints
from sae.config import TrainConfig
from sae.data import DataOrder, TokenOrder, held_out, holdout, statistics
from sae.live import LiveOrder, check_length
from sae.log import Row, run_log
from sae.metrics import Evaluation
from sae.provenance import provenance
from sae.step import Plan, StepMetrics, TrainState, assemble, make_step, schedule, start

DIVERGED = 1e3
"""a loss this large, where predicting the mean costs 1, does not come back"""
EVAL_BATCH = 2048


class TrainResult(NamedTuple):
    """What a run leaves."""

    artefact: SaeArtefact
    """the trained SAE"""
    path: Path
    """where it was saved"""
    metrics: Row
    """held-out fvu, l0 and dead_fraction, and how the training went"""
    n_steps: int
    """steps of the whole run"""
    resumed_from: int
    """step that this call began after"""


@dataclass(frozen=True)
class Run:
    """A config that was checked against its store."""

    config: TrainConfig
    store: ActivationStore
    order: DataOrder
    stats: HookStats
    plan: Plan
    held_out: Float[np.ndarray, "token d_model"]


def train(config: TrainConfig) -> TrainResult:
    """Train, or resume training, and save to `config.out`.

    Raises: MissingArtefactError, HookPointError, ShapeError, ConfigError or MismatchError before anything is written;
    NumericsError naming the last good checkpoint; InterruptedRunError after Ctrl-C, with a checkpoint kept.
    """
    run, path = prepare(config), config.out / "sae"
    config.out.mkdir(parents=True, exist_ok=True)
    with Checkpoints(config, run.store.fingerprint) as checkpoints:
        config.save(config.out / "config.yaml")
        resumed_from = checkpoints.last
        if resumed_from < run.plan.n_steps or not path.exists():
            state, tok_s = _loop(run, checkpoints)
            _save(run, state, tok_s, path)
        run.order.finish()
    artefact = SaeArtefact.load(path)
    return TrainResult(artefact, path, artefact.metadata["metrics"], run.plan.n_steps, resumed_from)


def _save(run: Run, state: TrainState, tok_s: float, path: Path) -> None:
    config, n_tokens = run.config, run.plan.n_steps * run.config.batch_size
    metrics: Row = {**evaluate(run, state), "train_tok_s": tok_s, "train_tokens": n_tokens}
    sae = assemble(config, run.plan, state)
    sae.to_artefact(run.plan.scale, provenance(config, run.store, run.stats, metrics)).save(path)


def prepare(config: TrainConfig) -> Run:
    """Check a config against its store, without writing anything."""
    store = ActivationStore.open(config.store)
    if store.meta.ring:
        store = _begun(store)
        check_length(store, config.train_tokens)
    elif not store.is_complete:
        got = f"one that stopped after {store.n_sequences} sequences"
        raise MismatchError(config.store, expected="a finished harvest", got=got, fix="Run saekit harvest again.")
    stats = statistics(store, config.hook_point)
    find(config.sae.architecture)
    d_sae = config.sae.width(store.d_model)
    if config.sae.k >= d_sae:
        raise ConfigError("sae.k", expected=f"less than d_sae={d_sae}", got=config.sae.k, fix="Lower k or raise d_sae.")
    start, stop = held_out(store, config.holdout_fraction)
    x = holdout(store, config.hook_point, start, stop, config.eval_tokens)
    return Run(config, store, _order(config, store, start), stats, Plan.make(config, stats), x)


def _order(config: TrainConfig, store: ActivationStore, stop: int) -> DataOrder:
    common: dict[str, int] = {"batch_size": config.batch_size, "seed": config.seed, "memory_mb": config.memory_mb}
    if store.meta.ring:
        return LiveOrder(store, config.hook_point, owner=str(config.out.absolute()), **common)
    return TokenOrder(store, config.hook_point, stop=stop, **common)


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


def evaluate(run: Run, state: TrainState) -> dict[str, float]:
    """Measure the SAE on held-out tokens, as it will be used: each token alone."""
    sae = assemble(run.config, run.plan, state)
    evaluation = Evaluation(run.plan.mean, len(state.idle))
    for i in range(0, len(run.held_out), EVAL_BATCH):
        x = run.held_out[i : i + EVAL_BATCH] * np.float32(run.plan.scale)
        latents = sae.encode(jnp.asarray(x))
        evaluation.add(x, np.asarray(sae.decode(latents)), np.asarray(latents))
    return evaluation.summary()


def _loop(run: Run, checkpoints: Checkpoints) -> tuple[TrainState, float]:
    """Steps from the newest checkpoint to the last; returns the state and the tokens a second."""
    config, n_steps, first = run.config, run.plan.n_steps, checkpoints.last
    state = checkpoints.restore(start(config, run.plan))
    step, lr = make_step(config, run.plan), schedule(config, run.plan)
    speed = Speed(config.batch_size)
    with (
        run_log(config, first) as log,
        _ctrl_c() as stopped,
        progress("train", (n_steps - first) * config.batch_size, "tok") as advance,
    ):
        for i in range(first + 1, n_steps + 1):
            _wait(run, checkpoints, state, i - 1, stopped)
            state, metrics = step(state, run.order.batch(i - 1))
            advance(config.batch_size)
            speed.count(metrics)
            last, stop = i == n_steps, stopped.is_set()
            measure, keep = last or i % config.eval_every == 0, last or stop or i % config.checkpoint_every == 0
            if measure or keep or i % config.log_every == 0:
                row: Row = {"step": i, "tokens": i * config.batch_size, "lr": float(lr(i - 1)), **_scalars(metrics)}
                _check_numerics(row, checkpoints)
                held_out = {f"holdout_{name}": value for name, value in evaluate(run, state).items()} if measure else {}
                if measure or i % config.log_every == 0:
                    log({**row, **held_out, "tok_s": speed.tok_s})
            if keep:
                checkpoints.save(i, state)
                run.order.release(i)
            if stop and not last:
                raise _interrupted(run, i)
    return state, speed.tok_s


def _wait(run: Run, checkpoints: Checkpoints, state: TrainState, done: int, stopped: threading.Event) -> None:
    """Wait for batch `done`; what was used so far makes room for it once a checkpoint is kept."""
    if run.order.is_ready(done):
        return
    checkpoints.save(done, state)
    run.order.release(done)
    while not run.order.is_ready(done):
        if stopped.wait(POLL_S):
            raise _interrupted(run, done)


def _interrupted(run: Run, done: int) -> InterruptedRunError:
    expected, got = f"{run.plan.n_steps} steps", f"a stop after {done}"
    return InterruptedRunError(run.config.out, expected=expected, got=got, fix="Run it again to resume.")


class Speed:
    """Tokens a second since the first step, which compiles."""

    def __init__(self, batch_size: int):
        self._batch_size, self._steps, self._began = batch_size, -1, 0.0

    def count(self, metrics: StepMetrics) -> None:
        """Count one step in."""
        if self._steps < 0:
            jax.block_until_ready(metrics)
            self._began = time.perf_counter()
        self._steps += 1

    @property
    def tok_s(self) -> float:
        """0 until the second step."""
        return max(self._steps, 0) * self._batch_size / max(time.perf_counter() - self._began, 1e-9)


def _scalars(metrics: StepMetrics) -> dict[str, float]:
    return {name: float(value) for name, value in metrics._asdict().items()}


def _check_numerics(row: Row, checkpoints: Checkpoints) -> None:
    if all(math.isfinite(value) for value in row.values()) and row["loss"] < DIVERGED:
        return
    good = f"checkpoint {checkpoints.path / str(checkpoints.last)} is good" if checkpoints.last else "there is none"
    raise NumericsError(
        f"step {row['step']}",
        expected=f"a finite loss below {DIVERGED:g}",
        got=f"loss {row['loss']:g}, gradient norm {row['grad_norm']:g}",
        fix=f"Lower lr, or check the store; of the checkpoints kept: {good}.",
    )


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

    signal.signal(signal.SIGINT, on_signal)
    try:
        yield stopped
    finally:
        signal.signal(signal.SIGINT, before)
