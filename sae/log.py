"""Where a run's numbers go: train.jsonl beside the output, and Weights & Biases if asked.

train.jsonl holds one JSON object an SAE and logged step. A resumed run first drops the rows after its checkpoint,
so the file ends up as if the run had never stopped, and goes on in the same Weights & Biases run. Weights & Biases is a
courtesy: when it fails, the run says so and goes on. It is given numbers and the config, and no code, patches or
console output. Left out: what the numbers mean (`sae.metrics`), showing them (`sae.watch`).
"""

import json
import math
import os
import secrets
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from sae.config import TrainConfig

Row = Mapping[str, Any]
Write = Callable[[Row], None]

OF_THE_RUN = ("tokens", "lr", "tok_s", "eta_s")
"""numbers that are the same for every SAE of a step; the learning rate only without a sweep"""
OF_AN_SAE = ("step", "hook_point", "sae")
"""what a row is of"""
START_S, FINISH_S = 20, 60
"""seconds that Weights & Biases may take to start, and to upload what is left at the end"""


@contextmanager
def run_log(config: TrainConfig, resumed_from: int) -> Iterator[Write]:
    """Yield a function that logs one row, which has a `step`, a `hook_point` and, in a sweep, an `sae`.

    A number that is not finite is written as null.

    Args:
      resumed_from: step of the checkpoint that the run goes on from, 0 if it starts.
    """
    path = config.out / "train.jsonl"
    kept = _drop_after(path, resumed_from)
    with open(path, "a", buffering=1, encoding="utf-8") as file, _wandb(config, kept) as publish:

        def write(row: Row) -> None:
            row = {name: None if _is_not_finite(value) else value for name, value in row.items()}
            file.write(json.dumps(row, allow_nan=False) + "\n")
            publish(row)

        yield write


def name_of(row: Row) -> str | None:
    """Whose row it is: in a sweep the SAE's name, else its hook point."""
    return row.get("sae", row.get("hook_point"))


def read_log(path: Path) -> list[dict[str, Any]]:
    """Rows of a train.jsonl; a last line that a crash cut short is left out."""
    return [json.loads(line) for line in _whole_lines(path)]


def _whole_lines(path: Path) -> list[str]:
    lines = path.read_text("utf-8", errors="replace").splitlines() if path.exists() else []
    return [line for line in lines if _is_row(line)]


def _is_row(line: str) -> bool:
    with suppress(ValueError):
        row = json.loads(line)
        return isinstance(row, dict) and "step" in row
    return False


def _drop_after(path: Path, step: int) -> list[Row]:
    """Leave the rows up to `step` in the file, all or nothing, and return them."""
    rows = [(line, json.loads(line)) for line in _whole_lines(path)]
    kept = [(line, row) for line, row in rows if row["step"] <= step]
    new = path.with_suffix(".new")
    with open(new, "w", encoding="utf-8") as file:
        file.writelines(line + "\n" for line, _ in kept)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)
    return [row for _, row in kept]


def _is_not_finite(value: object) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


@contextmanager
def _wandb(config: TrainConfig, earlier: list[Row]) -> Iterator[Write]:
    run = None if config.log.wandb == "disabled" else _forgiving(_start, config, earlier)
    exit_code = 1
    try:
        yield _publisher(run, config)
        exit_code = 0
    finally:
        if run is not None:
            with suppress(Exception):
                run.finish(exit_code=exit_code)


def _publisher(run: Any, config: TrainConfig) -> Write:
    alive = run is not None

    def publish(row: Row) -> None:
        nonlocal alive
        if alive:
            alive = _forgiving(_publish, run, row, config) is not None

    return publish


def _start(config: TrainConfig, earlier: list[Row]) -> Any:
    """Start or go on, and catch up: a service that was away, or files of an offline run, lack some of `earlier`."""
    import wandb

    # What is printed would be captured by wandb, escape codes of the live view included; a patch may hold anything.
    settings = wandb.Settings(
        init_timeout=START_S,
        finish_timeout=FINISH_S,
        silent=True,
        console="off",
        disable_git=True,
        disable_code=True,
    )
    run = wandb.init(
        project=config.log.project,
        mode=config.log.wandb,
        dir=config.out,
        id=_run_id(config.out / "wandb_id.txt", goes_on=bool(earlier)),
        resume="allow",
        config=config.model_dump(mode="json"),
        settings=settings,
    )
    if config.log.wandb == "online":
        sys.stderr.write(f"  wandb: {run.url}\n")
    if earlier:
        next_step = run.step
        for row in (row for row in earlier if row["step"] >= next_step):
            _publish(run, row, config)
    return run


def _run_id(path: Path, goes_on: bool) -> str:
    if not (goes_on and path.exists()):
        path.write_text(secrets.token_hex(4) + "\n")
    return path.read_text().strip()


def _publish(run: Any, row: Row, config: TrainConfig) -> bool:
    run.log(_metrics(row, len(config.hook_points) > 1 or "sae" in row), step=row["step"])
    return True


def _metrics(row: Row, several: bool) -> dict[str, Any]:
    """What Weights & Biases is given of a row; with several SAEs names say whose.

    >>> _metrics({"step": 10, "hook_point": "resid_post.3", "tokens": 20, "fvu": 0.5}, several=True)
    {'tokens': 20, 'resid_post.3/fvu': 0.5}
    >>> _metrics({"step": 10, "hook_point": "resid_post.3", "sae": "lr=0.1", "lr": 0.05, "tokens": 20}, several=True)
    {'lr=0.1/lr': 0.05, 'tokens': 20}
    """
    prefix = f"{name_of(row)}/" if several else ""
    common = [name for name in OF_THE_RUN if name != "lr" or "sae" not in row]
    named = {name: value for name, value in row.items() if name not in OF_AN_SAE and value is not None}
    return {name if name in common else prefix + name: _value(value) for name, value in named.items()}


def _value(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    import wandb

    edges = value["log10_edges"]
    # Latents with density 0 get a bin of their own, left of all others.
    edges = np.array([2 * edges[0] - edges[1], *edges])
    return wandb.Histogram(np_histogram=(np.array(value["counts"]), edges))


def _forgiving(call: Callable[..., Any], *arguments: Any) -> Any:
    """Call, or say what went wrong and return None."""
    try:
        return call(*arguments)
    except Exception as error:  # whatever a remote service raises, it must not end a run
        reason = " ".join(str(error).split()) or type(error).__name__
        sys.stderr.write(f"  wandb is off for this run: {reason.rstrip('.')}. train.jsonl has everything.\n")
        return None
