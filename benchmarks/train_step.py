"""How long is one training step, beside those of the peers?

    python benchmarks/train_step.py --arch topk --d-model 576 --d-sae 4608 --k 32 --batch 2048
    python benchmarks/train_step.py ... --peers                   also SAELens and sparsify, where they know --arch
    python benchmarks/train_step.py ... --dead 0.3                with so many latents dead, so that AuxK has work
    python benchmarks/train_step.py ... --kernels triton --check 200        does it learn as the plain path does?

A step is all of it: forward, backward, clipping, Adam, the decoder's norms, the count of idle latents; the data is on
the device already (`_steps.py` says what it is, several batches in turn). Ours is `sae.step.make_step` with the
defaults of `TrainConfig` and the state in the middle of a long run, where k is no longer annealed and no latent is dead
but those of --dead, which a bias keeps off. Peers run first, each as a script in `peers/` and an environment of its own
(SAELENS_PYTHON, SPARSIFY_PYTHON; else .venv-saelens and .venv-sparsify), since JAX takes most of a GPU's memory.

Prints one JSON line a trainer: medians of the repeats, and each in `all_ms`; `tf32` is whether products of float32 use
it. A trainer that fails has a line with `failed`. `ratio_to_fastest_peer` is of tokens a second, above 1 where ours is
faster. `--check` trains twice, with --kernels and on the plain path, from the same start on the same batches: `loss`
and `loss_plain` are means over the last 10 steps. How much of their difference is chance, `difference_by_nudge` tells:
that of the plain path to itself from an encoder that is larger by a millionth. `--set compute.latent_parallel=2` takes
two devices. Left out: reading data, and what is learnt (`quality.py`).
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
import torch
from _results import device_name, record
from _steps import HIGHEST, LOWEST, NOISE, SLEEPING, Settings, figures, measure, recipe

from activations.errors import SaekitError
from activations.store_schema import HookState
from sae.architectures import ARCHITECTURES
from sae.config import TrainConfig
from sae.step import Plan, Step, TrainState, create, make_step, scaling_on_device, start, where_tokens_go
from sae.wiring import Wiring

ROOT = Path(__file__).resolve().parent
HOOK_POINT = "resid_post.0"
PLAIN = "xla"
LONG = 100_000
"""steps of the run whose middle is timed"""
LONGEST_IDLE = 2**30
"""idle tokens of a dead latent: as many as are counted"""
NUDGE = 1e-6
LAST = 10
"""steps whose losses --check compares"""
PEER_S = 900
"""seconds that a peer may take"""


class Peer(NamedTuple):
    """A script in `peers/`, and what to ask of it."""

    variable: str
    """names the Python of its environment"""
    archs: tuple[str, ...]
    asked: tuple[dict[str, Any], ...]
    """one run for each of these"""


PEERS = {
    "saelens": Peer("SAELENS_PYTHON", ("topk", "batchtopk"), ({"autocast": False}, {"autocast": True})),
    "sparsify": Peer("SPARSIFY_PYTHON", ("topk",), ({},)),
}


# --- peers -----------------------------------------------------------------------------------------------------------


def time_peers(settings: Settings, names: list[str]) -> Iterator[dict[str, Any]]:
    """A line for each run of the peers, one after the other."""
    device = device_name("cuda" if torch.cuda.is_available() else "cpu")  # without JAX, which would take the memory
    for name in names:
        for asked in PEERS[name].asked:
            yield {"who": name, **_shape(settings), **time_peer(name, settings, asked), **asked, "device": device}


def time_peer(name: str, settings: Settings, asked: dict[str, Any]) -> dict[str, Any]:
    """Figures of one peer, or why there are none."""
    variable = PEERS[name].variable
    python = Path(os.environ.get(variable, ROOT.parent / f".venv-{name}" / "bin" / "python"))
    if not python.exists():
        return {"failed": f"no environment: set {variable} to a Python that imports {name}"}
    request = json.dumps({"settings": asdict(settings), **asked})
    command = [str(python), str(ROOT / "peers" / f"{name}_step.py"), request]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=PEER_S, env={**os.environ, "PYTHONPATH": path}
        )
    except subprocess.TimeoutExpired:
        return {"failed": f"no answer in {PEER_S} s"}
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        return {"failed": _reason(done.stderr) or f"exit code {done.returncode}"}
    return json.loads(lines[-1])


def _reason(text: str) -> str:
    """The last line that says something, as a traceback's does."""
    return next((line.strip()[:300] for line in reversed(text.splitlines()) if line.strip()), "")


# --- ours ------------------------------------------------------------------------------------------------------------


class Data(NamedTuple):
    """Batches on the device, and what a plan needs to know of them."""

    batches: list[jax.Array]
    stats: dict[str, Any]
    """HookStats by hook point"""


def make_data(settings: Settings) -> Data:
    """Draw the batches."""
    rates, scale = recipe(settings)
    keys = jax.random.split(jax.random.key(settings.seed), settings.n_batches + 1)
    directions = jax.random.normal(keys[0], (settings.n_features, settings.d_model))
    directions *= scale / jnp.linalg.norm(directions, axis=1, keepdims=True)

    @jax.jit
    def batch(key: jax.Array, directions: jax.Array) -> jax.Array:
        fires, size, noise = jax.random.split(key, 3)
        shape = settings.batch, settings.n_features
        magnitudes = jax.random.uniform(size, shape, minval=LOWEST, maxval=HIGHEST)
        made = jnp.where(jax.random.bernoulli(fires, rates, shape), magnitudes, 0) @ directions
        return made + NOISE * jax.random.normal(noise, made.shape)

    batches = [batch(key, directions) for key in keys[1:]]
    x = np.asarray(batches[0])
    stats = HookState().add(np.linalg.norm(x, axis=1), x.sum(axis=0, dtype=np.float64)).stats()
    return Data(batches, {HOOK_POINT: stats})


def make_config(settings: Settings, given: dict[str, Any], n_steps: int) -> TrainConfig:
    """The config of a run of so many steps; `given` are fields by name."""
    tokens = n_steps * settings.batch
    fields_of_run = {
        "hook_points": [HOOK_POINT],
        "sae.architecture": settings.arch,
        "sae.d_sae": settings.d_sae,
        "sae.k": settings.k,
        "batch_size": settings.batch,
        "train_tokens": tokens,
        "dead_fraction": min(LONGEST_IDLE / 2 / tokens, 1.0),  # else some would be dead that --dead does not name
        "seed": settings.seed,
        **given,
    }
    return TrainConfig.load(overrides=[f"{key}={json.dumps(value)}" for key, value in fields_of_run.items()])


class Trainer:
    """A run of ours: its state, its compiled step, and the batches in turn."""

    def __init__(self, settings: Settings, config: TrainConfig, data: Data, at: int = 0):
        """Start it after `at` steps, as far as schedules of the architecture are concerned."""
        self._plan = Plan.make(config, Wiring.parse(HOOK_POINT), data.stats)
        self._step: Step = make_step(config, self._plan)
        self._scaling = scaling_on_device(config, self._plan)
        state = start(config, self._plan, create(config, self._plan))
        self.state = put_to_sleep(state, settings.n_dead)._replace(step=state.step + at)
        self._batches = itertools.cycle(jax.device_put(data.batches, where_tokens_go(config)))

    def run(self, n: int) -> None:
        """Take n steps and wait for them."""
        for batch in itertools.islice(self._batches, n):
            self.state, _ = self._step(self.state, batch, batch, self._scaling)
        jax.block_until_ready(self.state)

    @property
    def dead_latents(self) -> int:
        """Latents that are dead now."""
        return int((self.state.idle >= self._plan.dead_after).sum())

    def losses(self, n: int) -> list[float]:
        """Losses of n steps."""
        found = []
        for batch in itertools.islice(self._batches, n):
            self.state, metrics = self._step(self.state, batch, batch, self._scaling)
            found.append(metrics.loss)
        return [float(loss) for loss in found]


def put_to_sleep(state: TrainState, n: int) -> TrainState:
    """Make the first n latents count as dead for good: idle for long, with a bias that never lets them be active."""
    state.params["b_enc"][...] = state.params["b_enc"][...].at[:n].set(SLEEPING)
    return state._replace(idle=state.idle.at[:n].set(LONGEST_IDLE))


def time_ours(settings: Settings, given: dict[str, Any], check: int, memory: bool) -> dict[str, Any]:
    """Figures of ours, or why there are none."""
    config = make_config(settings, given, LONG)
    try:
        data = make_data(settings)
        trainer = Trainer(settings, config, data, at=LONG // 2)
        line = {**figures(settings, measure(trainer.run, settings)), **about(config)}
        line["dead_latents"] = trainer.dead_latents
        if memory:
            line["peak_bytes"] = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
        del trainer
        return {**line, **(compare(settings, given, data, check) if check else {})}
    except jax.errors.JaxRuntimeError as error:
        return {"failed": str(error).splitlines()[0][:300]}


def compare(settings: Settings, given: dict[str, Any], data: Data, n_steps: int) -> dict[str, Any]:
    """Losses after `n_steps` with the kernels that are asked for, on the plain path, and on it from nudged weights."""

    def loss(fields: dict[str, Any], nudge: float = 0.0) -> float:
        trainer = Trainer(settings, make_config(settings, fields, n_steps), data)
        W_enc = trainer.state.params["W_enc"]
        W_enc[...] = W_enc[...] * (1 + nudge)
        return float(np.mean(trainer.losses(n_steps)[-LAST:]))

    on_plain = {**given, **kernels(PLAIN)}
    mine, plain, nudged = loss(given), loss(on_plain), loss(on_plain, NUDGE)
    return {
        "loss": mine,
        "loss_plain": plain,
        "loss_difference": abs(mine - plain) / plain,
        "difference_by_nudge": abs(nudged - plain) / plain,
    }


def kernels(name: str) -> dict[str, Any]:
    """The setting that asks for kernels; none for the default."""
    return {} if name == "auto" else {"compute.kernels": name}


def about(config: TrainConfig) -> dict[str, Any]:
    """What computes, and in what."""
    automatic = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return {
        "dtype": automatic if config.compute.matmul == "auto" else config.compute.matmul,
        "tf32": False,
        "kernels": config.compute.kernels,
        "optimizer": "adam",
        "versions": {name: version(name) for name in ("jax", "jaxlib", "flax", "optax")},
    }


# --- lines -----------------------------------------------------------------------------------------------------------


def _shape(settings: Settings) -> dict[str, Any]:
    return {name: getattr(settings, name) for name in ("arch", "d_model", "d_sae", "k", "batch", "dead")}


def lines(arguments: argparse.Namespace, settings: Settings, given: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A line a trainer, ours last."""
    fastest = 0
    for line in time_peers(settings, arguments.peer):
        fastest = max(fastest, line.get("tok_s", 0))
        yield line
    found = time_ours(settings, given, arguments.check, arguments.memory)
    line = {"who": "saekit", **_shape(settings), **found, "settings": given}
    line["device"] = device_name("cuda" if jax.default_backend() == "gpu" else "cpu")
    if fastest and "tok_s" in line:
        line["ratio_to_fastest_peer"] = round(line["tok_s"] / fastest, 3)
    yield line


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong."""

    def error(self, message: str) -> NoReturn:
        """Exit with 1."""
        sys.exit(f"train_step.py: {message}")


def at_least(least: int) -> Callable[[str], int]:
    """A parser of whole numbers from `least` on."""

    def parse(text: str) -> int:
        if not text.lstrip("-").isdigit() or int(text) < least:
            raise argparse.ArgumentTypeError(f"expected a whole number of at least {least}, got {text}")
        return int(text)

    return parse


def share(text: str) -> float:
    """A parser of shares below 1."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"expected a share of at least 0 and below 1, got {text}")
    return value


def setting(text: str) -> tuple[str, Any]:
    """A parser of KEY=VALUE; a value that is no JSON is text."""
    key, separator, value = text.partition("=")
    if not key or not separator:
        raise argparse.ArgumentTypeError(f"expected KEY=VALUE, got {text}")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    archs = [name for name, kind in ARCHITECTURES.items() if kind.reads == "one"]
    parser = Parser(description="Time one training step.", allow_abbrev=False)
    parser.add_argument("--arch", choices=archs, default=Settings.arch)
    for name in ("d-model", "d-sae", "k", "batch", "repeats"):
        parser.add_argument(f"--{name}", type=at_least(1), default=getattr(Settings, name.replace("-", "_")))
    parser.add_argument("--steps", type=at_least(1), help="steps a repeat; as many as take half a second unless given")
    parser.add_argument("--warm", type=at_least(1), default=Settings.warm, help="steps before the first repeat")
    parser.add_argument("--seed", type=at_least(0), default=Settings.seed)
    parser.add_argument("--dead", type=share, default=Settings.dead, help="share of the latents that stay dead")
    parser.add_argument("--kernels", choices=["auto", PLAIN, "triton"], default="auto")
    parser.add_argument(
        "--set", type=setting, action="append", default=[], metavar="KEY=VALUE", help="field of TrainConfig"
    )
    parser.add_argument("--peers", action="store_true", help="all peers that know the architecture")
    parser.add_argument("--peer", choices=list(PEERS), nargs="+", default=[], help="these peers")
    parser.add_argument("--check", type=at_least(1), default=0, metavar="STEPS", help="compare with the plain path")
    parser.add_argument("--memory", action="store_true", help="also the peak memory of the device, where JAX tells")
    parser.add_argument("--record", action="store_true", help="also append to results/<device>.csv")
    arguments = parser.parse_args(words)
    if arguments.k > arguments.d_sae:
        parser.error(f"--k: expected at most --d-sae, {arguments.d_sae}, got {arguments.k}")
    for name in arguments.peer:
        if arguments.arch not in PEERS[name].archs:
            parser.error(f"--peer {name}: expected --arch {' or '.join(PEERS[name].archs)}, got {arguments.arch}")
    if arguments.peers:
        arguments.peer = [name for name, peer in PEERS.items() if arguments.arch in peer.archs]
    return arguments


def main(words: list[str] | None = None) -> None:
    """Time what the command line asks for."""
    arguments = parse(words)
    settings = Settings(**{part.name: getattr(arguments, part.name) for part in fields(Settings)})
    given = {**dict(arguments.set), **kernels(arguments.kernels)}
    failed = False
    try:
        make_config(settings, given, LONG)  # a mistake is told before the peers run
        for line in lines(arguments, settings, given):
            if arguments.record:
                record("train_step", line)
            sys.stdout.write(json.dumps(line) + "\n")
            sys.stdout.flush()
            failed = "failed" in line  # ours is the last
    except SaekitError as error:
        sys.exit(str(error))
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
