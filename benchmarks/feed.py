"""Does the store keep the training step fed, and what bounds the rate: the step, the disk or the feed?

    python benchmarks/feed.py --d-model 2304 --d-sae 16384 --k 64 --batch 8192 --tokens 1000000 --memory-mb 2048
    python benchmarks/feed.py --d-model 64 --d-sae 256 --k 8 --batch 512 --tokens 100000 --memory-mb 4     a quick one
    python benchmarks/feed.py --blocks host ...     blocks in main memory, though there is an accelerator

1. Writes a store of random bfloat16 activations in --where with the project's own writer. 2. Times the bare step
(`step_tok_s`): the batches are on the device. 3. Reads the shards as plain files, several at a time (`disk`), reads
all chunks through the store (`reader`), and runs the feed and the step as `sae.train` does, without evaluation, log
and checkpoints (`train`); once with the store dropped from the page cache before each (`cold`) and once with it there
(`warm`). 4. Runs the feed without the step (`feed_tok_s_warm`): what it could do at most.

Rates are tokens a second; `gb_s` are 1e9 bytes of activations. `train` counts whole blocks: from the first batch of
the first block to that of the last, so that each block was read while another one was trained on. `bound` is `step` or
`disk`, whichever is slower alone, and `feed` if training is below 0.9 of that; `ratio_to_bound` is training over the
slower of the two. `still_cached` is the share of shards whose start was in the page cache after it was dropped: above
0, `cold` is not cold. Prints one JSON line. Left out: object storage, and what is learnt.
"""

import argparse
import itertools
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from _results import device_name, record
from _steps import Settings, figures, measure
from train_step import HOOK_POINT, LONG, Parser, at_least, make_config

from activations.errors import SaekitError
from activations.store import ActivationStore
from activations.store_schema import HookState, ModelRef, StoreMeta, StoreState, to_bfloat16_bits, to_float32
from activations.store_writer import Group, StoreWriter
from sae.config import TrainConfig
from sae.data import TokenOrder
from sae.feed import GATHERERS, READERS, InFlight, cores, feed, fits_on_device
from sae.run import Run, prepare
from sae.step import Step, TrainState, create, make_step, start

ROWS, CTX = 16, 1024
"""sequences a commit, and tokens a sequence"""
FED = 0.9
"""share of the bound from which on the feed is no bound"""
WARM_EPOCHS = 3


def write_store(where: Path, d_model: int, tokens: int) -> ActivationStore:
    """At least so many random tokens; each commit holds the same ones in another order."""
    meta = StoreMeta(
        model=ModelRef(id="random", fingerprint="f", n_layers=1, d_model=d_model), tokenizer_fingerprint="t", text="x",
        text_fingerprint="x", hook_points=(HOOK_POINT,), ctx=CTX, store_dtype="bfloat16", compute_dtype="float32",
        batch_tokens=1, commit_sequences=ROWS, outlier_norm=10.0,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    kept = to_bfloat16_bits(rng.standard_normal((ROWS, CTX, d_model), dtype=np.float32))
    mask = np.ones((ROWS, CTX), bool)
    mask[:, 0] = False
    used = to_float32(kept)[mask]
    norms, total = np.linalg.norm(used, axis=1), used.sum(axis=0, dtype=np.float64)
    hook, ids = HookState(), np.zeros((ROWS, CTX), np.int32)
    with StoreWriter.open(where, meta) as writer:
        for number in range(-(-tokens // len(used))):
            hook = hook.add(norms, total)
            state = StoreState(hooks={HOOK_POINT: hook}, tokens=hook.n_tokens)
            writer.append(Group(ids, mask, ids[:, 0] + number, {HOOK_POINT: np.roll(kept, number, axis=0)}), state)
        writer.finish(complete=True)
    return ActivationStore.open(where)


# --- the disk --------------------------------------------------------------------------------------------------------


def shards(store: ActivationStore) -> list[Path]:
    """Files of the activations."""
    return sorted(path for path in (Path(store.path) / HOOK_POINT).iterdir() if path.suffix != ".json")


def drop_from_cache(files: list[Path]) -> float:
    """Ask the kernel to forget files that are synced; returns the share of which it still has the start."""
    still = 0
    for path in files:
        with path.open("rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            try:
                still += os.preadv(file.fileno(), [bytearray(4096)], 0, os.RWF_NOWAIT) > 0
            except BlockingIOError:  # it would have to wait for the disk
                continue
    return round(still / len(files), 3)


def read_files(files: list[Path]) -> float:
    """Seconds of plain reads, several files at a time."""
    local = [bytearray(2**24) for _ in range(GATHERERS)]

    def read(number: int) -> None:
        for path in files[number::GATHERERS]:
            with path.open("rb", buffering=0) as file:
                while file.readinto(local[number]):
                    pass

    with ThreadPoolExecutor(GATHERERS) as pool:
        began = time.perf_counter()
        list(pool.map(read, range(GATHERERS)))
        return time.perf_counter() - began


def read_store(store: ActivationStore) -> float:
    """Seconds of reading all chunks through the store, to memory that is there already."""
    rooms = [store.room(ROWS) for _ in range(READERS)]
    for room in rooms:
        room.values.fill(1)

    def read(number: int) -> None:
        for first in range(number * ROWS, store.n_sequences, READERS * ROWS):
            store.read_into(rooms[number], HOOK_POINT, first)

    with ThreadPoolExecutor(READERS) as pool:
        began = time.perf_counter()
        list(pool.map(read, range(READERS)))
        return time.perf_counter() - began


# --- training --------------------------------------------------------------------------------------------------------


class Trainer:
    """The step of a run, and its state."""

    def __init__(self, run: Run):
        """Start it."""
        (job,) = run.jobs.values()
        self._scaling = job.scaling
        self._step: Step = make_step(run.config, job.plan)
        self.state: TrainState = start(run.config, job.plan, create(run.config, job.plan))

    def step(self, batch: jax.Array) -> Any:
        """Take a step, and return its metrics."""
        self.state, metrics = self._step(self.state, batch, batch, self._scaling)
        return metrics


def stretch(order: TokenOrder, epochs: int) -> int:
    """Batches of so many epochs up to the first one of the last block; at least two."""
    blocks = [block.n_batches for epoch in range(epochs) for block in order.epoch(epoch) if block.n_batches]
    return max(sum(blocks[:-1]) + 1, 2) if len(blocks) > 1 else sum(blocks)


def time_bare_step(trainer: Trainer, order: TokenOrder, settings: Settings) -> float:
    """Tokens a second with the batches on the device."""
    with feed(order, 0, 2) as fed:
        batches = [batch[HOOK_POINT] for batch in fed]

    def steps(n: int) -> None:
        for batch in itertools.islice(itertools.cycle(batches), n):
            trainer.step(batch)
        jax.block_until_ready(trainer.state)

    return figures(settings, measure(steps, settings))["tok_s"]


def time_batches(
    order: TokenOrder, epochs: int, batch_size: int, use: Callable[[jax.Array], Any], on_device: bool
) -> float:
    """Tokens a second of the feed and what is done with each batch."""
    n, in_flight, began = stretch(order, epochs), InFlight(), 0.0
    result: Any = None
    with feed(order, 0, n, blocks_on_device=on_device) as batches:
        for i, batch in enumerate(batches):
            result = use(batch[HOOK_POINT])
            in_flight.add(result)
            if i == 0:
                jax.block_until_ready(result)
                began = time.perf_counter()
        jax.block_until_ready(result)
        return (n - 1) * batch_size / (time.perf_counter() - began)


def rates(
    order: TokenOrder, store: ActivationStore, trainer: Trainer, batch: int, on_device: bool, is_cold: bool
) -> dict[str, Any]:
    """Tokens a second of the disk, of the reader, and of training."""
    files = shards(store)
    n_bytes, n_tokens = sum(path.stat().st_size for path in files), int(store.mask().sum())
    found: dict[str, Any] = {}
    dropped = []
    for what, read in (("disk", lambda: read_files(files)), ("reader", lambda: read_store(store))):
        if is_cold:
            dropped.append(drop_from_cache(files))
        seconds = read()
        found |= {f"{what}_tok_s": round(n_tokens / seconds), f"{what}_gb_s": round(n_bytes / seconds / 1e9, 3)}
    if is_cold:
        dropped.append(drop_from_cache(files))
    found["train_tok_s"] = round(time_batches(order, 1 if is_cold else WARM_EPOCHS, batch, trainer.step, on_device))
    return found | ({"still_cached": max(dropped)} if is_cold else {})


def judged(found: dict[str, Any], step_tok_s: float) -> dict[str, Any]:
    """What binds the training, and how near to it the training is.

    >>> judged({"disk_tok_s": 100, "train_tok_s": 95}, 200)
    {'bound': 'disk', 'ratio_to_bound': 0.95}
    >>> judged({"disk_tok_s": 300, "train_tok_s": 95}, 200)
    {'bound': 'feed', 'ratio_to_bound': 0.475}
    """
    alone = {"step": step_tok_s, "disk": found["disk_tok_s"]}
    slowest = min(alone, key=lambda name: alone[name])
    ratio = found["train_tok_s"] / alone[slowest]
    return {"bound": slowest if ratio >= FED else "feed", "ratio_to_bound": round(ratio, 3)}


def line(settings: Settings, config: TrainConfig, store: ActivationStore, blocks: str) -> dict[str, Any]:
    """All figures."""
    run = prepare(config)
    order = run.order
    assert isinstance(order, TokenOrder)
    on_device = fits_on_device(order) if blocks == "auto" else blocks == "device"
    trainer = Trainer(run)
    step_tok_s = time_bare_step(trainer, order, settings)
    made: dict[str, Any] = {"blocks": "device" if on_device else "host", "step_tok_s": step_tok_s}
    for heat in ("cold", "warm"):
        found = rates(order, store, trainer, settings.batch, on_device, heat == "cold")
        made |= {f"{name}_{heat}": value for name, value in {**found, **judged(found, step_tok_s)}.items()}
    feed_tok_s = round(time_batches(order, WARM_EPOCHS, settings.batch, lambda batch: batch, on_device))
    return made | {"feed_tok_s_warm": feed_tok_s}


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = Parser(description="Time training from a store.", allow_abbrev=False)
    for name in ("d-model", "d-sae", "k", "batch"):
        parser.add_argument(f"--{name}", type=at_least(1), default=getattr(Settings, name.replace("-", "_")))
    parser.add_argument("--tokens", type=at_least(1), default=200_000, help="of the store, at least")
    parser.add_argument(
        "--memory-mb", type=at_least(1), default=64, help="as in TrainConfig; several blocks are needed"
    )
    parser.add_argument("--blocks", choices=("auto", "host", "device"), default="auto", help="where blocks are held")
    parser.add_argument("--where", type=Path, help="directory on the disk to measure; the store is deleted afterwards")
    parser.add_argument("--record", action="store_true", help="also append to results/<device>.csv")
    arguments = parser.parse_args(words)
    if arguments.k >= arguments.d_sae:
        parser.error(f"--k: expected less than --d-sae, {arguments.d_sae}, got {arguments.k}")
    return arguments


def main(words: list[str] | None = None) -> None:
    """Time what the command line asks for."""
    arguments = parse(words)
    settings = Settings(d_model=arguments.d_model, d_sae=arguments.d_sae, k=arguments.k, batch=arguments.batch)
    try:
        with tempfile.TemporaryDirectory(dir=arguments.where) as folder:
            store = write_store(Path(folder) / "store", settings.d_model, arguments.tokens)
            given = {"store": store.path, "memory_mb": arguments.memory_mb, "sae.k_anneal": 0.0}
            found = line(settings, make_config(settings, given, LONG), store, arguments.blocks)
    except SaekitError as error:
        sys.exit(str(error))
    device = device_name("cuda" if jax.default_backend() == "gpu" else "cpu")
    shape = {name: getattr(arguments, name) for name in ("d_model", "d_sae", "k", "batch", "tokens", "memory_mb")}
    whole = {**shape, "cores": cores(), **found, "device": device}
    if arguments.record:
        record("feed", whole)
    sys.stdout.write(json.dumps(whole) + "\n")


if __name__ == "__main__":
    main()
