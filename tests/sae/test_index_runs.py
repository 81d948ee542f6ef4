"""Runs of `saekit index`: killed ones go on, later ones add, a text equals its store, and misfits are refused."""

import json
import os
import random
import signal
import sqlite3
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from activations.config import HarvestConfig
from activations.errors import ConfigError, CorruptArtefactError, MismatchError, MissingArtefactError, TextError
from activations.harvest import harvest
from activations.models import LoadedModel, load_model
from activations.ray_pool import Pool, connected
from activations.store import ActivationStore
from sae import index as index_module
from sae import index_source, ray_index
from sae.artefact import SaeArtefact
from sae.config import IndexConfig
from sae.index import CONFIG_NAME, build_index
from sae.index_db import FILE_NAME, FeatureIndex, LatentRow
from sae.index_pass import Statistics
from sae.index_state import STATE_NAME

HOOK, CTX, D_MODEL, D_SAE = "resid_post.1", 16, 32, 20
N_KILLS = 2


class Made(NamedTuple):
    """Two texts, their stores, and an SAE."""

    loaded: LoadedModel
    config: IndexConfig
    texts: tuple[Path, Path]
    stores: tuple[str, str]


@pytest.fixture(scope="module")
def made(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("runs")
    loaded = load_model(str(tiny_llama), device="cpu", dtype="float32")
    texts, stores = [], []
    for name, n in (("one", 60), ("two", 35)):
        texts.append(folder / f"{name}.jsonl")
        rows = [{"text": f"{name} {i} saw {'mills ' * (i % 5)}{'at sea ' * (i % 7)}{i * 37}."} for i in range(n)]
        texts[-1].write_text("\n".join(map(json.dumps, rows)))
        config = HarvestConfig(
            model=str(tiny_llama), text=str(texts[-1]), hook_points=(HOOK,), out=folder / name, ctx=CTX,
            commit_sequences=8, batch_tokens=index_source.BATCH_TOKENS["cpu"], compute_dtype="float32",
        )  # fmt: skip
        stores.append(harvest(config, loaded).path)
    rng = np.random.default_rng(0)
    W_enc = rng.standard_normal((D_MODEL, D_SAE)).astype(np.float32)
    x = np.concatenate([s.activations(HOOK)[s.mask()] for s in map(ActivationStore.open, stores)])
    metadata = {"hook_point": HOOK, "model": {"id": loaded.id, "fingerprint": loaded.fingerprint}}
    pre = np.sort((x - x.mean(0)) @ W_enc, axis=0)[int(0.85 * len(x)) : int(0.95 * len(x))]
    gap = np.diff(pre, axis=0).argmax(axis=0), np.arange(D_SAE)  # the widest, so that nothing lies on a threshold
    threshold = (pre[gap] + pre[gap[0] + 1, gap[1]]) / 2
    SaeArtefact(
        "jumprelu", W_enc, np.zeros(D_SAE, np.float32), W_enc.T.copy(), x.mean(0), threshold, metadata=metadata
    ).save(folder / "sae")
    config = IndexConfig(
        store=stores[0], sae=folder / "sae", model=str(tiny_llama), out=folder / "index", n_contexts=4, n_sampled=5,
        n_near_misses=2, window_before=3, window_after=2, coactivation_tokens=100, ctx=CTX, n_ablated=1,
    )  # fmt: skip
    return Made(loaded, config, (texts[0], texts[1]), (stores[0], stores[1]))


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_source, "block_tokens", lambda *_: 2 * CTX)


def rows_of(config: IndexConfig) -> list[LatentRow]:
    index = FeatureIndex.open(config.out)
    rows = index.rows()
    index.close()
    return rows


def close(one: Any, other: Any, tol: float = 1e-3) -> bool:
    """Equal but for rounding."""
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(close(a, b, tol) for a, b in zip(one, other, strict=True))
    if isinstance(one, np.ndarray | float):
        return np.allclose(one, other, rtol=tol, atol=tol, equal_nan=True)
    return one == other


def check_same(one: list[LatentRow], other: list[LatentRow], without: tuple[str, ...] = ()) -> None:
    for a, b in zip(one, other, strict=True):
        for name, value in vars(a).items():
            assert name in without or close(value, getattr(b, name)), (a.latent, name, value, getattr(b, name))


def test_a_text_through_the_model_equals_its_store(made: Made, tmp_path: Path) -> None:
    from_store = made.config.model_copy(update={"out": tmp_path / "a"})
    from_text = made.config.model_copy(update={"out": tmp_path / "b", "text": str(made.texts[0]), "store": "no"})
    for config in (from_store, from_text):
        build_index(config, made.loaded)
    check_same(rows_of(from_store), rows_of(from_text))
    one, other = (FeatureIndex.open(config.out).info for config in (from_store, from_text))
    assert one["sources"][0] | {"name": ""} == other["sources"][0] | {"name": ""}


def test_a_second_text_adds_to_the_first_in_either_order(made: Made, tmp_path: Path) -> None:
    rows = []
    for name, order in (("ab", made.stores), ("ba", made.stores[::-1])):
        for store in order:
            config = made.config.model_copy(update={"out": tmp_path / name, "store": store})
            build_index(config, made.loaded)
        rows.append(
            [replace(r, **{kind: [c._replace(source=0) for c in getattr(r, kind)] for kind in ("contexts", "sampled",
             "near_misses")}) for r in rows_of(config)]
        )  # fmt: skip
        info = FeatureIndex.open(config.out).info
        assert [source["name"] for source in info["sources"]] == list(order)
        stores = [ActivationStore.open(path) for path in order]
        assert info["n_tokens"] == sum(int(store.mask().sum()) for store in stores)
        for row in rows_of(config):
            x = np.concatenate([store.activations(HOOK)[store.mask()] for store in stores])
            sae = SaeArtefact.load(config.sae)
            pre = (x - sae.b_dec) @ sae.W_enc[:, row.latent]
            assert sae.threshold is not None
            assert round(row.density * len(x)) == (pre > sae.threshold[row.latent]).sum()
            assert row.max_activation == pytest.approx(float(pre.max()), rel=1e-4)
    check_same(*rows)
    assert {c.source for row in rows_of(config) for c in row.sampled} == {0, 1}


def test_the_same_text_counts_once_and_goes_on_where_it_ended(made: Made, tmp_path: Path) -> None:
    whole = made.config.model_copy(update={"out": tmp_path / "whole", "text": str(made.texts[0])})
    part = whole.model_copy(update={"out": tmp_path / "part", "max_tokens": 200})
    build_index(whole, made.loaded)
    build_index(part, made.loaded)
    n_tokens = FeatureIndex.open(part.out).info["n_tokens"]
    assert 200 <= n_tokens < FeatureIndex.open(whole.out).info["n_tokens"]
    before = (part.out / FILE_NAME).stat().st_mtime_ns
    build_index(part, made.loaded)
    assert (part.out / FILE_NAME).stat().st_mtime_ns == before, "nothing new, nothing written"
    build_index(whole.model_copy(update={"out": part.out}), made.loaded)
    check_same(rows_of(part), rows_of(whole))


def test_other_logits_are_written_without_reading_the_text_again(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = made.config.model_copy(update={"out": tmp_path / "index", "output_scores": False, "n_ablated": 0})
    build_index(config, made.loaded)
    assert all(row.output_score is None for row in rows_of(config))
    monkeypatch.setattr(index_module.Statistics, "add", None)
    build_index(config.model_copy(update={"n_logits": 3, "output_scores": True}), made.loaded)
    assert {len(row.top_logits) for row in rows_of(config)} == {3}
    assert any(row.output_score is not None for row in rows_of(config))


@pytest.mark.parametrize("schema", [1, 2])
def test_an_index_of_an_older_schema_is_built_again_without_reading_the_text(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, schema: int
) -> None:
    config = made.config.model_copy(update={"out": tmp_path / "index"})
    build_index(config, made.loaded)
    rows, columns = rows_of(config), FeatureIndex.open(config.out).columns()
    with sqlite3.connect(config.out / FILE_NAME) as connection:
        connection.execute("UPDATE info SET value = ? WHERE key = 'schema_version'", [schema])
        connection.execute("DROP TABLE arrays")
        if schema == 1:
            connection.execute("ALTER TABLE latents DROP COLUMN near_misses")
    connection.close()
    with pytest.raises(CorruptArtefactError, match=f"got schema version {schema}"):
        FeatureIndex.open(config.out)
    monkeypatch.setattr(index_module.Statistics, "add", None)
    build_index(config, made.loaded)
    check_same(rows_of(config), rows)
    for name, column in FeatureIndex.open(config.out).columns().items():
        np.testing.assert_array_equal(column, columns[name])


def slow_build(config: IndexConfig) -> None:
    """With a checkpoint behind each small block."""
    torch.set_num_threads(1)
    index_module.CHECKPOINT_S = 0.0
    index_source.block_tokens = lambda *_: 2 * CTX
    build_index(config)


def test_killed_runs_end_with_the_same_index(made: Made, tmp_path: Path, start_process: Callable[..., Any]) -> None:
    calm, wild = (made.config.model_copy(update={"out": tmp_path / out, "device": "cpu"}) for out in ("calm", "wild"))
    process = start_process(slow_build, calm)
    process.join()
    assert process.exitcode == 0
    rng, state, kills = random.Random(0), wild.out / STATE_NAME, 0
    while kills < N_KILLS:
        before = state.stat().st_mtime_ns if state.exists() else 0
        process = start_process(slow_build, wild)
        while process.is_alive() and (not state.exists() or state.stat().st_mtime_ns == before):
            time.sleep(0.001)
        process.join(rng.uniform(0, 0.1))
        process.kill()
        process.join()
        assert process.exitcode != 0, "it was killed before its end"
        kills += 1
    process = start_process(slow_build, wild)
    process.join()
    assert process.exitcode == 0
    assert (calm.out / STATE_NAME).read_bytes() == (wild.out / STATE_NAME).read_bytes()
    check_same(rows_of(calm), rows_of(wild))


@pytest.fixture(scope="module")
def ray_here() -> Iterator[None]:
    with connected("local"):
        yield


def test_workers_of_ray_find_the_same_whoever_is_killed(
    made: Made, tmp_path: Path, ray_here: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, many = (made.config.model_copy(update={"out": tmp_path / out, "device": "cpu"}) for out in ("one", "many"))
    build_index(one, made.loaded)
    on_ray = many.model_copy(update={"ray": "local", "ray_workers": 2})
    begin, merge, alive, killed, rng = Pool.begin, Statistics.merge, [], [], random.Random(0)

    def remember(self: Pool, *arguments: Any) -> None:
        begin(self, *arguments, ready=lambda where: alive.append(int(where.split()[1])))

    def kill_sometimes(self: Statistics, *arguments: Any) -> None:
        merge(self, *arguments)
        if alive and len(killed) < N_KILLS and rng.random() < 0.7:
            killed.append(alive.pop())
            os.kill(killed[-1], signal.SIGKILL)

    monkeypatch.setattr(Pool, "begin", remember)
    monkeypatch.setattr(ray_index, "MAX_RUN", 3)
    monkeypatch.setattr(Statistics, "merge", kill_sometimes)
    monkeypatch.setattr(index_module, "CHECKPOINT_S", 0.0)
    build_index(on_ray, made.loaded)
    assert len(killed) == N_KILLS
    assert (one.out / STATE_NAME).read_bytes() == (many.out / STATE_NAME).read_bytes()
    check_same(rows_of(one), rows_of(many))


def test_a_run_on_ray_goes_on_from_a_checkpoint(
    made: Made, tmp_path: Path, ray_here: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, many = (made.config.model_copy(update={"out": tmp_path / out, "device": "cpu"}) for out in ("one", "many"))
    on_ray = many.model_copy(update={"ray": "local", "ray_workers": 1})
    build_index(one, made.loaded)
    save, saves = index_module.save_state, []

    def stop_at_second(*arguments: Any) -> None:
        save(*arguments)
        saves.append(1)
        if len(saves) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(index_module, "CHECKPOINT_S", 0.0)
    monkeypatch.setattr(index_module, "save_state", stop_at_second)
    with pytest.raises(KeyboardInterrupt):
        build_index(on_ray, made.loaded)
    monkeypatch.undo()
    monkeypatch.setattr(index_source, "block_tokens", lambda *_: 2 * CTX)
    build_index(on_ray, made.loaded)
    assert (one.out / STATE_NAME).read_bytes() == (many.out / STATE_NAME).read_bytes()


def test_what_ray_does_not_do(made: Made, tmp_path: Path, ray_here: None) -> None:
    config = made.config.model_copy(update={"out": tmp_path / "index", "ray": "local"})
    with pytest.raises(ConfigError, match="ray with text: expected a store"):
        build_index(config.model_copy(update={"text": str(made.texts[0])}), made.loaded)
    worker = ray_index.IndexWorker(config, str(tmp_path / "nowhere"))
    with pytest.raises(MismatchError, match="expected the one where the run was started, got another for process"):
        worker.begin("other", "key", (0, 0), index_module.pass_settings(config))


@pytest.fixture(scope="module")
def whole(made: Made) -> IndexConfig:
    """An index that is there."""
    config = made.config.model_copy(update={"output_scores": False, "n_ablated": 0})
    build_index(config, made.loaded)
    return config


def test_an_index_of_another_sae_is_refused_and_kept(made: Made, whole: IndexConfig, tmp_path: Path) -> None:
    artefact = SaeArtefact.load(whole.sae)
    replace(artefact, b_enc=artefact.b_enc + 1).save(tmp_path / "sae")
    before = (whole.out / FILE_NAME).read_bytes()
    with pytest.raises(MismatchError, match="before it was trained again"):
        build_index(whole.model_copy(update={"sae": tmp_path / "sae"}), made.loaded)
    assert (whole.out / FILE_NAME).read_bytes() == before


def test_the_same_weights_at_another_hook_point_are_another_sae(made: Made, whole: IndexConfig, tmp_path: Path) -> None:
    artefact = SaeArtefact.load(whole.sae)
    moved = replace(artefact, metadata={**artefact.metadata, "hook_point": "resid_pre.1"})
    moved.save(tmp_path / "sae")
    assert SaeArtefact.load(tmp_path / "sae").sha256 == artefact.sha256, "which is of the weights"
    before = (whole.out / FILE_NAME).read_bytes()
    with pytest.raises(MismatchError, match=f"hook_point={artefact.hook_point}, as it was begun with"):
        build_index(whole.model_copy(update={"sae": tmp_path / "sae"}), made.loaded)
    assert (whole.out / FILE_NAME).read_bytes() == before


@pytest.mark.parametrize("change", [{"n_contexts": 9}, {"window_after": 1}, {"seed": 1}, {"coactivation_tokens": 7}])
def test_other_settings_of_the_pass_are_refused(made: Made, whole: IndexConfig, change: dict[str, int]) -> None:
    with pytest.raises(MismatchError, match="as it was begun with"):
        build_index(whole.model_copy(update=change), made.loaded)


@pytest.mark.parametrize(
    ("damage", "error", "match"),
    [
        (lambda file: file.unlink(), MissingArtefactError, "the state of the index"),
        (lambda file: file.write_bytes(b""), CorruptArtefactError, "the state of a feature index"),
        (lambda file: file.write_bytes(file.read_bytes()[:-9]), CorruptArtefactError, "the state of a feature index"),
        (
            lambda file: file.write_bytes(file.read_bytes().replace(b"[20,128]", b"[20,129]")),
            CorruptArtefactError,
            "of shape",
        ),
    ],
)
def test_a_state_that_is_damaged_or_gone_is_refused(
    made: Made, whole: IndexConfig, tmp_path: Path, damage: Callable[[Path], Any], error: type[Exception], match: str
) -> None:
    out = tmp_path / "index"
    out.mkdir()
    for name in (FILE_NAME, STATE_NAME, CONFIG_NAME):
        (out / name).write_bytes((whole.out / name).read_bytes())
    damage(out / STATE_NAME)
    with pytest.raises(error, match=match):
        build_index(whole.model_copy(update={"out": out}), made.loaded)


def test_a_text_without_tokens_is_refused(made: Made, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text(json.dumps({"text": ""}))
    config = made.config.model_copy(update={"text": str(tmp_path / "empty.jsonl"), "out": tmp_path / "index"})
    with pytest.raises(TextError, match="empty"):
        build_index(config, made.loaded)
    assert not config.out.exists()
