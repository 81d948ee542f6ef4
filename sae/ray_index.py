"""The pass of an index over a store, on the workers of Ray; what is found is what one process finds, bit for bit.

Flow:
1. the blocks of one process are cut into runs of neighbours; a run goes to a worker, which reads it from the store;
2. the worker counts its run by itself (`sae.index_pass`). Back come counts, histograms, the first n of each order of
   places, and the sum of activations of each single block;
3. this process merges them in the order of the text, adding sums block by block as it does where it reads them itself.

A run whose worker was killed is done again by another, and merged once. Between runs the index has its checkpoints, as
ever. A run comes back as large as the state of the index, whatever it counted: d_sae times the places that are kept,
times their windows. Left out: a text that is run through the model, which `saekit harvest` is for.
"""

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress

import torch
from torch import Tensor

from activations.errors import MismatchError
from activations.models import choose_device
from activations.ray_pool import Pool, connected, here
from activations.store import ActivationStore
from sae.artefact import SaeArtefact
from sae.config import IndexConfig
from sae.index_pass import PassSettings, Statistics
from sae.index_source import Span, store_blocks, store_spans, text_key
from sae.index_state import Cursor
from sae.torch_view import TorchSae
from sae.wiring import Wiring

RUNS_A_WORKER = 4
"""runs that a worker gets in all, if that makes none longer than MAX_RUN"""
MAX_RUN = 64
"""blocks of a run at most: what is done again when a worker is lost"""


class IndexWorker:
    """What counts runs of blocks, in a process of Ray's."""

    def __init__(self, config: IndexConfig, folder: str):
        """Args: folder: where the index was started, which paths start from."""
        with suppress(OSError):  # where nothing depends on it, machines need not have it
            os.chdir(folder)
        self._config, self._counting = config, threading.Lock()

    def prepare(self) -> None:
        """Nothing takes long."""

    def device(self) -> str:
        """What kind of device workers count on."""
        return choose_device(self._config.device).type

    def begin(self, sha256: str, key: str, source: tuple[int, int], settings: PassSettings) -> str:
        """Open the SAE and the store; returns where the worker is.

        Raises: MismatchError unless they are those of `sha256` and `key`.
        """
        config, artefact = self._config, SaeArtefact.load(self._config.sae)
        store = ActivationStore.open(config.store)
        for where, have, want in ((config.sae, artefact.sha256, sha256), (store.path, text_key(store.meta), key)):
            if have != want:
                fix = "Put SAE and store where all machines see the same."
                raise MismatchError(
                    where, expected="the one where the run was started", got=f"another for {here()}", fix=fix
                )
        self._store, self._source, self._settings = store, source, settings
        self._sae = TorchSae(artefact).to(choose_device(config.device))
        self._reads, self._d_sae = Wiring.parse(artefact.hook_point).reads, artefact.d_sae
        return here()

    def run(self, spans: Sequence[Span]) -> tuple[dict[str, Tensor], list[Tensor]]:
        """What statistics of these blocks hold, and the sum of activations of each block."""
        device, totals = self._sae.W_dec.device, []
        with self._counting:
            statistics = Statistics(self._settings, self._d_sae, device)
            for block in store_blocks(self._store, self._reads, spans, *self._source, device):
                if len(block.x):
                    statistics.add(self._sae, block)
                    totals.append(statistics.total.cpu().clone())
                    statistics.total.zero_()
            return {name: value.cpu() for name, value in statistics.tensors().items()}, totals


def count_on_ray(
    config: IndexConfig, statistics: Statistics, number: int, key: int, cursor: Cursor
) -> Iterator[tuple[int, Cursor | None]]:
    """Count in what lies behind `cursor` of `config.store`; see `sae.index.Counter`."""
    assert config.ray is not None
    store, artefact = ActivationStore.open(config.store), SaeArtefact.load(config.sae)
    with (
        connected(config.ray),
        Pool(IndexWorker, (config, os.getcwd()), config.ray_workers, config.device) as pool,
    ):
        spans = store_spans(store, artefact.d_sae, torch.device(pool.ask("device")), cursor)
        length = max(1, min(MAX_RUN, -(-len(spans) // (RUNS_A_WORKER * pool.size))))
        runs = [spans[start : start + length] for start in range(0, len(spans), length)]
        if runs:
            pool.begin(artefact.sha256, text_key(store.meta), (number, key), statistics.settings)
        tokens = cursor.tokens
        for run, (tensors, totals) in zip(runs, pool.map(runs), strict=True):
            statistics.merge(tensors, totals)
            n_tokens = int(tensors["n_tokens"])
            tokens += n_tokens
            yield n_tokens, Cursor(sequence=run[-1][1], tokens=tokens)
