"""The feature index: every figure in it equals a brute-force computation over the whole store in memory."""

import json
import os
import re
import sqlite3
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from activations.config import HarvestConfig
from activations.errors import (
    CorruptArtefactError,
    HookPointError,
    MismatchError,
    MissingArtefactError,
    UnknownNameError,
)
from activations.harvest import harvest
from activations.models import LoadedModel, load_model
from activations.store import ActivationStore
from sae import index_source
from sae.artefact import SaeArtefact
from sae.config import IndexConfig
from sae.histogram import edges
from sae.index import build_index
from sae.index_db import FILE_NAME, FeatureIndex, LatentRow, open_for_writing, write_index
from sae.wiring import Wiring

HOOK, CTX, D_MODEL, D_SAE, DEAD = "resid_post.1", 16, 32, 24, (3, 17)
OTHERS = ("mlp_out.2", "resid_post.2")
KINDS = {
    "topk": ("topk", HOOK),
    "jumprelu": ("jumprelu", HOOK),
    "transcoder": ("jumprelu", f"{HOOK}->mlp_out.2"),
    "crosscoder": ("jumprelu", f"{HOOK}+resid_post.2"),
}
"""name -> architecture as it is saved, and what it reads and writes"""
N_CONTEXTS, BEFORE, AFTER = 5, 3, 2


class Made(NamedTuple):
    """A harvested store, a random SAE, the index over both, and what it must say."""

    loaded: LoadedModel
    store: ActivationStore
    artefact: SaeArtefact
    config: IndexConfig
    index: FeatureIndex
    latents: np.ndarray
    """[seq, ctx, d_sae], zero on masked tokens"""


def random_sae(architecture: str, hook_point: str, x: np.ndarray, loaded: LoadedModel) -> SaeArtefact:
    """A random SAE, sparse on `x`, whose latents DEAD are never active."""
    rng, wiring = np.random.default_rng(0), Wiring.parse(hook_point)
    shapes = (x.shape[1], D_SAE), (D_SAE, D_MODEL * len(wiring.writes))
    W_enc, W_dec = (rng.standard_normal(shape).astype(np.float32) for shape in shapes)
    b_enc, b_dec = rng.standard_normal(D_SAE).astype(np.float32), x.mean(axis=0)
    centre = 0 if wiring.transcodes else b_dec
    b_enc[list(DEAD)] = -1e4
    rule: dict[str, Any] = {"k": 3} if architecture == "topk" else {}
    if architecture == "jumprelu":
        pre = np.sort(np.maximum((x - centre) @ W_enc + b_enc, 0), axis=0)[int(0.85 * len(x)) : int(0.95 * len(x))]
        # In the widest gap, so that no activation lies on its threshold.
        at = np.diff(pre, axis=0).argmax(axis=0)
        threshold = (pre[at, np.arange(D_SAE)] + pre[at + 1, np.arange(D_SAE)]) / 2
        threshold[DEAD[0]] = np.inf
        rule = {"threshold": threshold}
    model = {"id": loaded.id, "fingerprint": loaded.fingerprint}
    metadata = {"hook_point": hook_point, "model": model}
    if wiring.transcodes:
        rule |= {"transcodes": True, "apply_b_dec_to_input": False}
    return SaeArtefact(architecture, W_enc, b_enc, W_dec, b_dec, metadata=metadata, **rule)


def encode(sae: SaeArtefact, x: np.ndarray) -> np.ndarray:
    centre = sae.b_dec if sae.apply_b_dec_to_input else 0
    pre = np.maximum((x - centre) @ sae.W_enc + sae.b_enc, 0)
    if sae.threshold is not None:
        return np.where(pre > sae.threshold, pre, 0)
    return np.where(pre >= np.sort(pre, axis=-1)[..., [-sae.k]], pre, 0)


@pytest.fixture(scope="module")
def store(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    """Forty documents of one to three sequences, one with a control token inside."""
    folder = tmp_path_factory.mktemp("index")
    rows = [{"text": f"Text {i} has {'la ' * (5 * i % 8)}{'mill sea ' * (i % 3)}{i * 41}."} for i in range(40)]
    rows.append({"text": "The river <|im_start|> ran past."})
    (folder / "text.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = HarvestConfig(
        model=str(tiny_llama), text=str(folder / "text.jsonl"), hook_points=(HOOK, *OTHERS), out=folder / "store",
        ctx=CTX, commit_sequences=8, batch_tokens=64, store_dtype="float32", compute_dtype="float32", max_tokens=10_000,
    )  # fmt: skip
    store = ActivationStore.open(harvest(config).path)
    assert store.n_sequences > store.documents().max() + 1, "some documents have several sequences"
    return store


@pytest.fixture(scope="module")
def loaded(tiny_llama: Path) -> LoadedModel:
    """With a final norm whose gain is not 1, as it is in a random model."""
    loaded = load_model(str(tiny_llama), dtype="float32")
    loaded.model.model.norm.weight.copy_(torch.linspace(0.2, 3, D_MODEL))
    return loaded


@pytest.fixture(scope="module", params=KINDS)
def made(
    request: pytest.FixtureRequest,
    store: ActivationStore,
    loaded: LoadedModel,
    tmp_path_factory: pytest.TempPathFactory,
) -> Made:
    folder = tmp_path_factory.mktemp(request.param)
    architecture, hook_point = KINDS[request.param]
    x, mask = np.concatenate([store.activations(name) for name in Wiring.parse(hook_point).reads], -1), store.mask()
    random_sae(architecture, hook_point, x[mask], loaded).save(folder / "sae")
    artefact = SaeArtefact.load(folder / "sae")
    config = IndexConfig(
        store=store.path, sae=folder / "sae", model=loaded.spec, out=folder / "index", n_contexts=N_CONTEXTS,
        window_before=BEFORE, window_after=AFTER, n_logits=4, n_neighbours=3, n_sampled=4, n_near_misses=3, n_ablated=2,
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index_source, "block_tokens", lambda *_: 4 * CTX)  # so that several blocks are merged
        out = build_index(config, loaded)
    latents = encode(artefact, x) * mask[..., None]
    return Made(loaded, store, artefact, config, FeatureIndex.open(out), latents)


def test_density_and_activations_equal_brute_force(made: Made) -> None:
    flat, n = made.latents.reshape(-1, D_SAE), int(made.store.mask().sum())
    assert 0.02 < (flat > 0).sum() / (n * D_SAE) < 0.5
    for row in made.index.rows():
        active = flat[:, row.latent][flat[:, row.latent] > 0]
        assert row.density == len(active) / n
        assert row.max_activation == pytest.approx(active.max(initial=0), rel=1e-5)
        assert row.mean_activation == pytest.approx(active.mean() if len(active) else 0, rel=1e-5)


def test_stability_is_the_nearest_cosine_in_other_seeds(made: Made, tmp_path: Path) -> None:
    assert made.index.latent(0).stability is None, "there was nothing to compare with"
    rng, W_dec = np.random.default_rng(1), made.artefact.W_dec
    seeds = [rng.permutation(W_dec) + 0.3 * rng.standard_normal(W_dec.shape).astype(np.float32) for _ in range(2)]
    for i, rows in enumerate(seeds):
        replace(made.artefact, W_dec=rows).save(tmp_path / str(i))
    others = tuple(tmp_path / str(i) for i in range(2))
    changes = {"out": tmp_path / "index", "compare_to": others, "output_scores": False, "n_ablated": 0}
    index = FeatureIndex.open(build_index(made.config.model_copy(update=changes), made.loaded))
    unit = [rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (W_dec, *seeds)]
    expected = np.mean([(unit[0] @ other.T).max(axis=1) for other in unit[1:]], axis=0)
    np.testing.assert_allclose(index.columns()["stability"], expected, atol=1e-4)
    assert index.latent(3).stability == pytest.approx(float(expected[3]), abs=1e-4)
    index.close()
    wide = replace(made.artefact, metadata={**made.artefact.metadata, "hook_point": "resid_pre.0"})
    wide.save(tmp_path / "elsewhere")
    with pytest.raises(MismatchError, match="one model and place"):
        build_index(made.config.model_copy(update=changes | {"compare_to": (tmp_path / "elsewhere",)}), made.loaded)


def test_the_histogram_counts_every_active_token(made: Made) -> None:
    flat = made.latents.reshape(-1, D_SAE)
    for row in made.index.rows(min_density=1e-9):
        active = flat[:, row.latent][flat[:, row.latent] > 0]
        bounds = edges(row.histogram_start, len(row.histogram))
        expected = np.histogram(active, bounds)[0]
        assert sum(row.histogram) == len(active)
        assert np.abs(expected - row.histogram).sum() <= 2, "but for a value on an edge, rounded to either side"
        assert row.histogram[0] * row.histogram[-1] >= 1
        for share in (0.1, 0.5, 0.9):
            at = np.searchsorted(bounds, np.quantile(active, share)) - 1
            low, high = bounds[max(at - 1, 0)], bounds[min(at + 2, len(bounds) - 1)]
            assert low <= row.quantile(share) <= high


def test_sampled_contexts_are_places_where_the_latent_is_active(made: Made) -> None:
    documents, peaks = made.store.documents(), made.latents.max(axis=1)
    for row in made.index.rows(min_density=1e-9):
        active = {int(d) for d in np.unique(documents) if peaks[documents == d, row.latent].any()}
        shown = [context.document for context in row.sampled]
        assert len(set(shown)) == len(shown) == min(4, len(active))
        assert set(shown) <= active
        assert all(c.activations[c.peak] == pytest.approx(c.score, rel=1e-3) for c in row.sampled)
        bins = row.quantile_bins(2)
        assert sum(map(len, bins)) == len(shown)
        assert max((c.score for c in bins[0]), default=0) <= min((c.score for c in bins[1]), default=np.inf)


def test_near_misses_are_sequences_in_which_the_latent_is_silent(made: Made) -> None:
    documents, tokens = made.store.documents(), made.store.tokens()
    for row in made.index.rows():
        assert len({c.document for c in row.near_misses}) == len(row.near_misses)
        scores = [c.score for c in row.near_misses]
        assert scores == sorted(scores, reverse=True)
        for context in row.near_misses:
            assert not context.activations.any()
            silent = (documents == context.document) & ~made.latents[..., row.latent].any(axis=1)
            text = context.tokens.tolist()
            starts = range(CTX - len(text) + 1)
            assert any(tokens[s, a : a + len(text)].tolist() == text for s in np.flatnonzero(silent) for a in starts)
        if row.latent in DEAD:
            assert len(row.near_misses) == 3


def test_contexts_are_the_strongest_of_different_documents(made: Made) -> None:
    documents, peaks = made.store.documents(), made.latents.max(axis=1)
    for row in made.index.rows():
        best = {int(d): peaks[documents == d, row.latent].max() for d in np.unique(documents)}
        shown = [context.document for context in row.contexts]
        assert len(set(shown)) == len(shown) == min(N_CONTEXTS, sum(value > 0 for value in best.values()))
        strengths = [context.activations[context.peak] for context in row.contexts]
        np.testing.assert_allclose(strengths, [best[d] for d in shown], rtol=1e-3)
        np.testing.assert_allclose(strengths, sorted(best.values(), reverse=True)[: len(shown)], rtol=1e-3)
        assert (len(row.contexts) == 0) == (row.latent in DEAD)


def test_a_context_is_a_window_of_the_store_around_the_peak(made: Made) -> None:
    documents, tokens, used = made.store.documents(), made.store.tokens(), made.store.mask()
    for row in made.index.rows(min_density=1e-9):
        for context in row.contexts:
            sequences = np.flatnonzero(documents == context.document)
            sequence = sequences[made.latents[sequences, :, row.latent].max(axis=1).argmax()]
            values, length = made.latents[sequence, :, row.latent], len(context.tokens)
            ties = np.flatnonzero(values >= values.max() * (1 - 1e-5)).tolist()  # one token twice, at the very start
            peak = next(p for p in ties if context.peak == p - max(0, p - BEFORE))
            start = peak - context.peak
            np.testing.assert_array_equal(context.tokens, tokens[sequence, start : start + length])
            np.testing.assert_allclose(context.activations, values[start : start + length], rtol=1e-3, atol=1e-6)
            end = 1 + int(np.flatnonzero(used[sequence]).max())
            assert min(peak + AFTER + 1, end) <= start + length <= peak + AFTER + 1


def test_a_peak_at_the_edge_of_a_sequence_cuts_the_window(made: Made) -> None:
    lengths = {len(c.tokens) for row in made.index.rows() for c in row.contexts}
    assert max(lengths) == BEFORE + 1 + AFTER
    assert min(lengths) < BEFORE + 1 + AFTER


def test_neighbours_are_the_nearest_decoder_rows(made: Made) -> None:
    unit = made.artefact.W_dec / np.linalg.norm(made.artefact.W_dec, axis=1, keepdims=True)
    cosines = unit @ unit.T
    np.fill_diagonal(cosines, -np.inf)
    for row in made.index.rows():
        expected = np.argsort(-cosines[row.latent])[:3]
        assert [latent for latent, _ in row.neighbours] == expected.tolist()
        np.testing.assert_allclose([c for _, c in row.neighbours], cosines[row.latent][expected], atol=1e-4)


def test_logits_are_those_of_the_decoder_row_through_norm_and_unembedding(made: Made) -> None:
    """Of a crosscoder's row, the part for its last hook point."""
    model, tokenizer = made.loaded.model, made.loaded.tokenizer
    gain, unembedding = model.model.norm.weight.numpy(), model.lm_head.weight.numpy()
    for row in made.index.rows():
        logits = unembedding @ (made.artefact.W_dec[row.latent, -D_MODEL:] * gain)
        logits -= logits.mean()
        order = np.argsort(logits)
        for have, expected in ((row.top_logits, order[::-1]), (row.bottom_logits, order)):
            for (text, _), token in zip(have, expected[:4].tolist(), strict=True):
                decoded = tokenizer.decode([token])
                shown = f"⟨{made.index.vocabulary.bytes_of(token).hex().upper()}⟩"
                assert text == (shown if decoded == "\ufffd" else decoded)
            np.testing.assert_allclose([value for _, value in have], logits[expected[:4]], atol=1e-3)


def test_dead_latents_are_kept_and_empty(made: Made) -> None:
    rows = made.index.rows()
    assert sorted(row.latent for row in rows) == list(range(D_SAE))
    for latent in DEAD:
        row = made.index.latent(latent)
        assert (row.density, row.max_activation, row.mean_activation) == (0, 0, 0)
        assert (row.contexts, sum(row.histogram)) == ([], 0)
    assert not {row.latent for row in made.index.rows(min_density=1e-9)} & set(DEAD)


def test_rows_are_filtered_and_strongest_first(made: Made) -> None:
    strengths = [row.max_activation for row in made.index.rows()]
    assert strengths == sorted(strengths, reverse=True)
    middle = float(np.median([row.density for row in made.index.rows()]))
    below, above = made.index.rows(max_density=middle), made.index.rows(min_density=middle)
    assert all(row.density <= middle for row in below)
    assert all(row.density >= middle for row in above)
    assert [row.latent for row in made.index.rows(limit=2)] == [row.latent for row in made.index.rows()[:2]]


def test_info_says_what_it_was_made_from(made: Made) -> None:
    info = made.index.info
    assert (info["d_sae"], info["hook_point"], info["n_tokens"]) == (
        D_SAE,
        made.artefact.hook_point,
        int(made.store.mask().sum()),
    )
    assert info["sae_sha256"] == made.artefact.sha256
    (source,) = info["sources"]
    assert (source["name"], source["sequences"]) == (made.store.path, made.store.n_sequences)
    assert info["model"]["fingerprint"] == made.loaded.fingerprint
    assert IndexConfig.load(made.config.out / "index.yaml") == made.config


def test_a_store_of_another_model_is_refused(made: Made, tmp_path: Path) -> None:
    config = made.config.model_copy(update={"out": tmp_path / "index"})
    with pytest.raises(MismatchError, match="a store of"):
        build_index(config, replace(made.loaded, fingerprint="another"))
    assert not config.out.exists()


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ("width", MismatchError, "reads and writes widths {good}, got {bad}"),
        ("model", MismatchError, "another"),
        ("hook", HookPointError, "one of resid_post.1, mlp_out.2, resid_post.2"),
    ],
)
def test_an_sae_that_does_not_belong_is_refused(
    made: Made, tmp_path: Path, change: str, error: type[Exception], match: str
) -> None:
    sae, metadata = made.artefact, made.artefact.metadata
    good, bad = (sae.d_model, sae.d_out), (sae.d_model - 1, sae.d_out - 1)
    if change == "width":
        sae = replace(sae, W_enc=sae.W_enc[1:], W_dec=sae.W_dec[:, 1:], b_dec=sae.b_dec[1:])
    elif change == "model":
        sae = replace(sae, metadata=metadata | {"model": {"id": "another", "fingerprint": "beef"}})
    else:
        sae = replace(sae, metadata=metadata | {"hook_point": sae.hook_point.replace(HOOK, "resid_post.3")})
    sae.save(tmp_path / "sae")
    config = made.config.model_copy(update={"sae": tmp_path / "sae", "out": tmp_path / "index"})
    with pytest.raises(error, match=re.escape(match.format(good=good, bad=bad))):
        build_index(config, made.loaded)
    assert not config.out.exists()


def row(latent: int) -> LatentRow:
    coactivations = [(0, 0.25, 2.0)]
    return LatentRow(
        latent, 0.5, 2.0, 1.0, [1, 2], [("mill", 1.0)], [("b", -1.0)], [(0, 0.5)], [], coactivations=coactivations
    )


def test_an_index_is_replaced_only_once_the_new_one_is_whole(tmp_path: Path) -> None:
    write_index(tmp_path, {"d_sae": 1}, [row(0)])

    def failing():
        yield row(0)
        yield row(1)
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        write_index(tmp_path, {"d_sae": 2}, failing())
    assert [r.latent for r in FeatureIndex.open(tmp_path).rows()] == [0]
    write_index(tmp_path, {"d_sae": 2}, [row(0), row(1)])
    assert [r.latent for r in FeatureIndex.open(tmp_path).rows()] == [0, 1]
    assert {name.removesuffix("-wal").removesuffix("-shm") for name in os.listdir(tmp_path)} == {FILE_NAME}


@pytest.mark.parametrize("name", ["with space", "a#b", "a?b=c", "100%25", "ümlaut"])
def test_any_directory_name_will_do(tmp_path: Path, name: str) -> None:
    write_index(tmp_path / name, {"d_sae": 1}, [row(0)])
    assert FeatureIndex.open(tmp_path / name).latent(0) == row(0)


def test_opening_does_not_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_index(tmp_path, {"d_sae": 1}, [row(0)])
    before = (tmp_path / FILE_NAME).read_bytes()
    monkeypatch.chdir(tmp_path)
    index = FeatureIndex.open(".")
    assert index.latent(0) == row(0)
    with pytest.raises(Exception, match="readonly"), index._engine.begin() as connection:
        connection.exec_driver_sql("DELETE FROM latents")
    assert (tmp_path / FILE_NAME).read_bytes() == before


def test_other_tables_outlive_a_new_index(tmp_path: Path) -> None:
    write_index(tmp_path, {"d_sae": 1}, [row(0)])
    with open_for_writing(tmp_path).begin() as connection:
        connection.exec_driver_sql("CREATE TABLE labels (latent INTEGER, text TEXT)")
        connection.exec_driver_sql("INSERT INTO labels VALUES (0, 'mills')")
        connection.exec_driver_sql("INSERT INTO search VALUES ('water', 'label', 0)")
    write_index(tmp_path, {"d_sae": 2}, [row(0), row(1)])
    index = FeatureIndex.open(tmp_path)
    with index._engine.begin() as connection:
        assert connection.exec_driver_sql("SELECT text FROM labels").scalar() == "mills"
    assert index.search("water") == [0]
    assert sorted(index.search("mill")) == sorted(index.search(" MI ")) == [0, 1]
    assert index.search('"; drop') == index.search("") == index.search("sea") == []


def test_an_index_is_read_while_another_process_writes(tmp_path: Path) -> None:
    write_index(tmp_path, {"d_sae": 1}, [row(0)])
    with open_for_writing(tmp_path).begin() as connection:
        connection.exec_driver_sql("DELETE FROM latents")
        assert FeatureIndex.open(tmp_path).latent(0) == row(0)


def test_an_unknown_latent(tmp_path: Path) -> None:
    write_index(tmp_path, {"d_sae": 1}, [row(0)])
    for latent in (-1, 1):
        with pytest.raises(UnknownNameError, match="0 to 0"):
            FeatureIndex.open(tmp_path).latent(latent)


def test_no_index(tmp_path: Path) -> None:
    with pytest.raises(MissingArtefactError, match="saekit index"):
        FeatureIndex.open(tmp_path / "none")
    (tmp_path / FILE_NAME).mkdir()
    with pytest.raises(MissingArtefactError):
        FeatureIndex.open(tmp_path)


@pytest.mark.parametrize(
    "content", [b"", b"not a database, but long enough to be looked at" * 20, b"SQLite format 3\0" * 64]
)
def test_not_an_index(tmp_path: Path, content: bytes) -> None:
    (tmp_path / FILE_NAME).write_bytes(content)
    with pytest.raises(CorruptArtefactError, match="saekit index"):
        FeatureIndex.open(tmp_path)


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE info SET value = '99' WHERE key = 'schema_version'",
        "DELETE FROM info WHERE key = 'schema_version'",
        "UPDATE info SET value = 'no json' WHERE key = 'schema_version'",
        "DROP TABLE info",
    ],
)
def test_an_index_of_another_schema(tmp_path: Path, statement: str) -> None:
    write_index(tmp_path, {"d_sae": 1}, [row(0)])
    with sqlite3.connect(tmp_path / FILE_NAME) as connection:
        connection.execute(statement)
    connection.close()
    with pytest.raises(CorruptArtefactError, match="feature index"):
        FeatureIndex.open(tmp_path)


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE latents SET histogram = 'no json'",
        "UPDATE latents SET top_logits = '[1]'",
        "UPDATE latents SET contexts = x'00'",
        "DROP TABLE latents",
    ],
)
def test_a_damaged_row_is_corrupt(tmp_path: Path, statement: str) -> None:
    write_index(tmp_path, {"d_sae": 1}, [row(0)])
    with sqlite3.connect(tmp_path / FILE_NAME) as connection:
        connection.execute(statement)
    connection.close()
    index = FeatureIndex.open(tmp_path)
    with pytest.raises(CorruptArtefactError):
        index.latent(0)
    with pytest.raises(CorruptArtefactError):
        index.rows()


def test_columns_are_what_the_rows_say(made: Made) -> None:
    columns, rows = made.index.columns(), {row.latent: row for row in made.index.rows()}
    for name in ("density", "max_activation", "mean_activation", "logit_entropy", "output_score", "confidence_change"):
        expected = np.array([getattr(rows[i], name) for i in range(D_SAE)], np.float32)
        np.testing.assert_array_equal(columns[name], expected, err_msg=name)
    for i, row in rows.items():
        effects = [context.effect for context in row.contexts if not np.isnan(context.effect)]
        figures = [max(effects), np.mean(effects)] if effects else [np.nan, np.nan]
        found = [columns["max_ablation_effect"][i], columns["mean_ablation_effect"][i]]
        np.testing.assert_allclose(found, figures, rtol=1e-6)
        assert columns["nearest_cosine"][i] == np.float32(row.neighbours[0][1])
        assert columns["top_logit"][i] == np.float32(row.top_logits[0][1])
        jaccard = row.coactivations[0][1] if row.coactivations else np.nan
        np.testing.assert_array_equal(columns["nearest_jaccard"][i], np.float32(jaccard))
    assert not np.isnan(columns["max_ablation_effect"]).all()


def test_contexts_are_read_from_the_index_as_the_tokenizer_reads_them(made: Made) -> None:
    tokenizer = made.loaded.tokenizer
    for row in made.index.rows():
        for context in row.contexts:
            expected = [tokenizer.decode([token]) for token in context.tokens.tolist()]
            assert made.index.token_texts(context.tokens) == expected
