"""A tiny index of a random SAE, and contexts made by hand."""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from activations.config import HarvestConfig
from activations.harvest import harvest
from activations.models import LoadedModel, load_model
from activations.store import ActivationStore
from sae.artefact import SaeArtefact
from sae.config import IndexConfig
from sae.contexts import Context
from sae.histogram import N_BINS, edges
from sae.index import build_index
from sae.index_db import LatentRow

HOOK, D_SAE, DEAD = "resid_post.1", 24, 3


class Indexed(NamedTuple):
    """A model, a random SAE of it, and the SAE's index. Do not change it; copy `index` to write into it."""

    loaded: LoadedModel
    sae: Path
    index: Path
    store: Path


@pytest.fixture(scope="session")
def indexed(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Indexed:
    folder = tmp_path_factory.mktemp("labels")
    loaded = load_model(str(tiny_llama), dtype="float32")
    loaded.model.config.max_position_embeddings = 1 << 14  # rotary positions know no end; prompts are long
    rows = [{"text": f"Text {i} has {'la ' * (5 * i % 8)}{'mill sea ' * (i % 3)}{i * 41}."} for i in range(60)]
    (folder / "text.jsonl").write_text("\n".join(map(json.dumps, rows)))
    harvest(
        HarvestConfig(
            model=str(tiny_llama), text=str(folder / "text.jsonl"), hook_points=(HOOK,), out=str(folder / "store"),
            ctx=16, commit_sequences=8, batch_tokens=64, store_dtype="float32", compute_dtype="float32",
        ),
        loaded,
    )  # fmt: skip
    store = ActivationStore.open(folder / "store")
    x = store.activations(HOOK)[store.mask()]
    rng = np.random.default_rng(0)
    W_enc = rng.standard_normal((x.shape[1], D_SAE)).astype(np.float32)
    b_enc = np.zeros(D_SAE, np.float32)
    b_enc[DEAD] = -1e4
    model = {"id": loaded.id, "fingerprint": loaded.fingerprint}
    artefact = SaeArtefact(
        "topk", W_enc, b_enc, W_enc.T.copy(), x.mean(0), k=3, metadata={"hook_point": HOOK, "model": model}
    )
    artefact.save(folder / "sae")
    config = IndexConfig(
        store=str(folder / "store"), sae=folder / "sae", model=str(tiny_llama), out=folder / "index",
        window_before=8, window_after=4, output_scores=False,
    )  # fmt: skip
    return Indexed(loaded, folder / "sae", build_index(config, loaded), folder / "store")


def context(document: int, tokens: list[int], activations: list[float], source: int = 0) -> Context:
    """A context whose peak is its strongest token."""
    values = np.array(activations, np.float32)
    return Context(document, int(values.argmax()), np.array(tokens, np.int32), values, source, float(values.max()))


def latent_row(
    contexts: list[Context], sampled: list[Context], latent: int = 0, near: tuple[Context, ...] = ()
) -> LatentRow:
    """A latent that is known from these contexts alone; its activations are below 16."""
    values = np.array([each.score for each in (*contexts, *sampled)] or [0.0])
    histogram = np.zeros(N_BINS, int)
    for value in values[values > 0]:
        histogram[max(int(np.searchsorted(edges(), value, side="right")) - 1, 0)] += 1
    return LatentRow(
        latent=latent, density=0.01, max_activation=float(values.max()), mean_activation=float(values.mean()),
        histogram=histogram.tolist(), top_logits=[(" sea", 2.0), (" mill", 1.0)], bottom_logits=[], neighbours=[],
        contexts=contexts, sampled=sampled, near_misses=list(near), histogram_start=0,
    )  # fmt: skip
