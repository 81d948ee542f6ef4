"""Short training runs that tests share."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import sae.train
from activations.store import ActivationStore
from sae.config import TrainConfig
from sae.data import DataOrder
from sae.feed import DeviceActivations, feed

HOOK, OTHERS = "resid_post.1", ("mlp_out.1", "resid_post.0")
WIRINGS = {"one": HOOK, "pair": f"{HOOK}->mlp_out.1", "several": f"{HOOK}+resid_post.0"}
"""what an architecture is trained for, by what it reads, on a store of these hook points"""
BATCH = 64


def short_run(store: ActivationStore, out: Path, n_steps: int, **settings: Any) -> TrainConfig:
    """A config of so many steps of 64 tokens, logged at every fifth; `settings` are other fields."""
    common = {"hook_points": (HOOK,), "batch_size": BATCH, "holdout_fraction": 0.2, "log_every": 5}
    return TrainConfig(**{"store": store.path, "out": out, "train_tokens": n_steps * BATCH} | common | settings)


def before_batch(monkeypatch: pytest.MonkeyPatch, at: int, do: Callable[[], Any]) -> None:
    """Do something just before the loop takes batch `at`; what it returns, if anything, is taken instead."""

    @contextmanager
    def watched(order: DataOrder, start: int, stop: int, where: Any) -> Iterator[Iterator[DeviceActivations]]:
        with feed(order, start, stop, where) as batches:
            yield ((do() if i == at else None) or next(batches) for i in range(start, stop))

    monkeypatch.setattr(sae.train, "feed", watched)
