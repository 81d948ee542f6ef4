"""Where a run's numbers go: train.jsonl beside the output, and Weights & Biases if asked.

train.jsonl holds one JSON object a logged step. A resumed run first drops the rows after its checkpoint, so the file
ends up as if the run had never stopped. Weights & Biases is a courtesy: when it fails, the run says so and goes on.
"""

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from sae.config import TrainConfig

Row = Mapping[str, float | int]
Write = Callable[[Row], None]


@contextmanager
def run_log(config: TrainConfig, resumed_from: int) -> Iterator[Write]:
    """Yield a function that logs one row, which has a `step`."""
    path = config.out / "train.jsonl"
    _drop_after(path, resumed_from)
    with open(path, "a", buffering=1) as file, _wandb(config) as publish:

        def write(row: Row) -> None:
            file.write(json.dumps(row) + "\n")
            publish(row)

        yield write


def read_log(path: Path) -> list[dict[str, Any]]:
    """Rows of a train.jsonl; a last line that a crash cut short is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        with suppress(ValueError):
            rows.append(json.loads(line))
    return rows


def _drop_after(path: Path, step: int) -> None:
    kept = [row for row in read_log(path) if row["step"] <= step]
    path.write_text("".join(json.dumps(row) + "\n" for row in kept))


@contextmanager
def _wandb(config: TrainConfig) -> Iterator[Write]:
    run = None if config.log.wandb == "disabled" else _forgiving(_start, config)
    try:
        yield _publisher(run)
    finally:
        if run is not None:
            with suppress(Exception):
                run.finish()


def _publisher(run: Any) -> Write:
    alive = run is not None

    def publish(row: Row) -> None:
        nonlocal alive
        if alive:
            alive = _forgiving(lambda: run.log(dict(row), step=int(row["step"])) or True) is not None

    return publish


def _start(config: TrainConfig) -> Any:
    import wandb

    settings = wandb.Settings(init_timeout=20, silent=True)
    return wandb.init(
        project=config.log.project,
        mode=config.log.wandb,
        dir=config.out,
        config=config.model_dump(mode="json"),
        settings=settings,
    )


def _forgiving(call: Callable[..., Any], *arguments: Any) -> Any:
    """Call, or say what went wrong and return None."""
    try:
        return call(*arguments)
    except Exception as error:  # whatever a remote service raises, it must not end a run
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        sys.stderr.write(f"  wandb is off for this run: {reason.rstrip('.')}. train.jsonl has everything.\n")
        return None
