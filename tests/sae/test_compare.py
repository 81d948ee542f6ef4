"""Two SAEs are compared from their files: an SAE, its index or its run; misfits are refused."""

import csv
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from activations.errors import ConfigError, HookPointError, MismatchError, MissingArtefactError
from activations.store import ActivationStore
from sae.artefact import SaeArtefact
from sae.compare import compare
from sae.config import CompareConfig, IndexConfig
from sae.index import CONFIG_NAME, pass_settings
from sae.index_db import LatentRow, write_index
from sae.index_pass import Statistics
from sae.index_source import seed_key, store_source
from sae.index_state import STATE_NAME, Cursor, Progress, save_state
from sae.torch_view import TorchSae

HOOKS, D, N_SAME = ("resid_post.1", "resid_post.2"), 16, 12
MakeStore = Callable[..., ActivationStore]


def sae_at(hook_point: str = HOOKS[0], seed: int = 0, **changes: Any) -> SaeArtefact:
    """Random, but for its first N_SAME latents, which all have."""
    rows = [np.random.default_rng(s).standard_normal((n, D)) for s, n in ((99, N_SAME), (seed, 12 + seed))]
    W_dec = np.concatenate(rows).astype(np.float32)
    W_dec /= np.linalg.norm(W_dec, axis=1, keepdims=True)
    d_sae, metadata = len(W_dec), {"hook_point": hook_point, "model": {"id": "tiny", "fingerprint": "f00d"}}
    zeros = np.zeros(d_sae, np.float32), np.zeros(D, np.float32)
    artefact = SaeArtefact("topk", W_dec.T.copy(), zeros[0], W_dec, zeros[1], k=4, metadata=metadata)
    return replace(artefact, **changes)


def saved(artefact: SaeArtefact, path: Path) -> Path:
    artefact.save(path)
    return path


def indexed(sae: Path, store: ActivationStore, out: Path) -> Path:
    """An index without a model: its words are the numbers of its latents."""
    artefact, config = SaeArtefact.load(sae), IndexConfig(sae=sae, store=store.path, out=out)
    settings = pass_settings(config)
    found = Statistics(settings, artefact.d_sae)
    source = store_source(store, (artefact.hook_point,), artefact.d_sae, torch.device("cpu"))
    for block, _ in source.blocks(0, seed_key(source.key, config.seed), Cursor()):
        found.add(TorchSae(artefact), block)
    save_state(
        out,
        Progress(sae_sha256=str(artefact.sha256), hook_point=artefact.hook_point, settings=settings._asdict()),
        found,
    )
    rows = [LatentRow(i, 0.1, 1.0, 1.0, [1], [(f"word{i}", 1.0)], [("-", -1.0)], [], []) for i in range(artefact.d_sae)]
    write_index(out, {"d_sae": artefact.d_sae, "sae_sha256": artefact.sha256}, rows)
    config.save(out / CONFIG_NAME)
    return out


def test_weights_alone_are_compared(tmp_path: Path) -> None:
    one, other = saved(sae_at(), tmp_path / "one"), saved(sae_at(seed=5), tmp_path / "run" / "sae")
    result = compare(one, other.parent, CompareConfig(), tmp_path / "pairs.csv")
    assert json.loads(json.dumps(result)) == result
    assert (result["activations"], result["tokens"]) == (None, None)
    rows = result["latents"]
    assert (rows["matched"]["one"], rows["matched"]["other"]) == (N_SAME, N_SAME)
    assert rows["matched"]["one_share"] == pytest.approx(12 / 24)
    assert rows["matched"]["other_share"] == pytest.approx(12 / 29, abs=1e-4)
    assert rows["matched"]["one_by_chance"] < 0.2
    assert "correlated" not in rows
    assert (rows["compared"]["one"], rows["compared"]["other"], rows["silent"]["one"]) == (24, 29, 0)
    assert result["nearest"]["decoder_cosine of one"]["95%"] == 1
    (first, *_) = result["examples"]["matched"]
    assert first["one"] == [{"latent": first["other"][0]["latent"], "words": []}]
    assert first["decoder_cosine"] == [1]
    with (tmp_path / "pairs.csv").open() as file:
        pairs = [row for row in csv.DictReader(file) if row["matched"] == "true"]
    assert [(row["one"], row["other"], row["correlation"]) for row in pairs] == [
        (str(i), str(i), "") for i in range(12)
    ]


@pytest.mark.parametrize("name", ["pairs.csv", "pairs.parquet", "pairs.jsonl"])
def test_no_pairs_are_a_table_without_rows(tmp_path: Path, name: str) -> None:
    one, other = saved(sae_at(), tmp_path / "one"), saved(sae_at(W_dec=-sae_at().W_dec), tmp_path / "other")
    result = compare(one, other, CompareConfig(cosine=1, child_cosine=1), tmp_path / name)
    assert result["latents"]["alone"]["one_share"] == 1
    text = (tmp_path / name).read_bytes()
    assert {"pairs.csv": text.startswith(b"one,other,"), "pairs.jsonl": text == b""}.get(name, text[:4] == b"PAR1")


def test_two_layers_are_compared_by_activations_of_a_store(make_store: MakeStore, tmp_path: Path) -> None:
    store = make_store(hook_points=HOOKS)
    one, other = saved(sae_at(), tmp_path / "one"), saved(sae_at(HOOKS[1], seed=5), tmp_path / "other")
    config = CompareConfig(store=store.path, min_active=20)
    result = compare(one, other, config, tmp_path / "pairs.jsonl")
    rows = result["latents"]
    assert result["tokens"] == int(store.mask().sum())
    assert "matched" not in rows
    assert rows["correlated"]["one"] == rows["correlated"]["other"] >= 4
    assert rows["correlated"]["one_by_chance"] == 0
    assert [rows["compared"][k] + rows["silent"][k] for k in ("one", "other")] == [24, 29]
    assert rows["silent"]["one"] > 0
    assert (
        result["nearest"]["correlation of one"]["95%"] > 0.7 > result["nearest"]["correlation of one, by chance"]["95%"]
    )
    kept = {row["latent"] for rows in result["examples"].values() for row in (r for e in rows for r in e["one"])}
    assert max(kept) > rows["compared"]["one"], "numbers are those of the SAE, not of what is compared"
    pairs = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    correlated = {(pair["one"], pair["other"]) for pair in pairs if pair["correlated"]}
    assert len(correlated) == rows["correlated"]["one"]
    assert {pair[0] for pair in correlated} & kept
    assert max(pair["one"] for pair in pairs) > rows["compared"]["one"]


def test_two_indices_bring_words_and_shared_tokens(make_store: MakeStore, tmp_path: Path) -> None:
    store = make_store(hook_points=HOOKS)
    saes = [saved(sae, tmp_path / name) for name, sae in (("a", sae_at()), ("b", sae_at(seed=5)))]
    indices = [indexed(sae, store, tmp_path / f"index-{sae.name}") for sae in saes]
    result = compare(*indices, CompareConfig())
    assert (result["activations"], result["tokens"]) == ("indices", int(store.mask().sum()))
    assert "correlated" in result["latents"]
    for rows in result["examples"].values():
        for latent in (each for row in rows for each in row["one"] + row["other"]):
            assert latent["words"] == [f"word{latent['latent']}"]
    (indices[1] / STATE_NAME).unlink()
    assert compare(*indices, CompareConfig())["activations"] is None
    mixed = compare(indices[0], saes[1], CompareConfig())
    assert mixed["activations"] is None
    assert mixed["examples"]["matched"][0]["one"][0]["words"]


def test_an_index_of_an_sae_that_was_trained_again_is_refused(make_store: MakeStore, tmp_path: Path) -> None:
    sae = saved(sae_at(), tmp_path / "sae")
    index = indexed(sae, make_store(hook_points=HOOKS), tmp_path / "index")
    saved(sae_at(seed=1), sae)
    with pytest.raises(MismatchError, match="Build it again"):
        compare(index, sae, CompareConfig())


OTHER_MODEL = {"metadata": {"hook_point": HOOKS[0], "model": {"id": "large", "fingerprint": "beef"}}}
WIDER = {
    "W_enc": np.ones((20, 24), np.float32), "W_dec": np.ones((24, 20), np.float32), "b_dec": np.zeros(20, np.float32)
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "match"), [(OTHER_MODEL, r"expected an SAE of tiny \(f00d\), got one of large"), (WIDER, "widths 20")]
)
def test_saes_of_other_models_and_widths_are_refused(changes: dict[str, Any], match: str, tmp_path: Path) -> None:
    one, other = saved(sae_at(), tmp_path / "one"), saved(sae_at(**changes), tmp_path / "other")
    with pytest.raises(MismatchError, match=match):
        compare(one, other, CompareConfig())


def test_what_cannot_be_compared_is_refused(make_store: MakeStore, tmp_path: Path) -> None:
    one = saved(sae_at(), tmp_path / "one")
    for width in (32, 64):
        saved(sae_at(), tmp_path / "sweep" / "sae" / f"d_sae={width}")
    with pytest.raises(MissingArtefactError, match=r"several, such as .*d_sae=32"):
        compare(one, tmp_path / "sweep", CompareConfig())
    with pytest.raises(ConfigError, match="a name that ends in"):
        compare(one, tmp_path / "no", CompareConfig(), tmp_path / "pairs.txt")
    store = make_store(hook_points=HOOKS, d_model=D)
    with pytest.raises(HookPointError):
        compare(one, saved(sae_at("resid_post.0"), tmp_path / "two"), CompareConfig(store=store.path))
    with pytest.raises(ConfigError, match="lower min_active"):
        compare(one, one, CompareConfig(store=store.path, min_active=10**6))
    foreign = saved(sae_at(**OTHER_MODEL), tmp_path / "three")
    with pytest.raises(MismatchError, match="a store of large"):
        compare(foreign, foreign, CompareConfig(store=store.path))
