"""Families of measures that read texts of their own, on a random model: what is planted is found."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from pyarrow import parquet
from scipy import sparse
from sklearn.metrics import roc_auc_score

from activations.errors import MismatchError, TextError
from activations.models import LoadedModel, load_model
from activations.store import ActivationStore
from sae.artefact import SaeArtefact
from sae.config import AbsorptionConfig, ConceptsConfig, ProbingConfig
from sae.evaluation.absorption import absorbed, absorption
from sae.evaluation.baselines import pca_sae, random_sae
from sae.evaluation.concepts import column_aurocs, concept_detection, read_concepts
from sae.evaluation.probing import balanced, labelled, probing, read_labelled
from sae.evaluation.stability import load_others, stability
from sae.evaluation.texts import Subject, pooled_latents, read_texts
from sae.torch_view import TorchSae
from sae.wiring import Wiring

HOOK, WIDTH = "resid_post.1", 32
PLACE = Wiring.parse(HOOK)


@pytest.fixture(scope="module")
def loaded(tiny_llama: Path) -> LoadedModel:
    return load_model(str(tiny_llama), dtype="float32")


@pytest.fixture
def store(make_store: Any) -> ActivationStore:
    return make_store(d_model=WIDTH, ctx=16)


@pytest.fixture
def subject(store: ActivationStore, loaded: LoadedModel) -> Subject:
    return Subject(store, PLACE, loaded, {"sae": TorchSae(sae_of())}, seed=0)


def sae_of(seed: int = 0, d_sae: int = 48, **about: Any) -> SaeArtefact:
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((d_sae, WIDTH)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    zeros = np.zeros(d_sae, np.float32), np.zeros(WIDTH, np.float32)
    metadata = {"hook_point": HOOK, "model": {"id": "tiny", "fingerprint": "f00d"}} | about
    return SaeArtefact("topk", rows.T.copy(), zeros[0], rows, zeros[1], k=4, metadata=metadata)


def write(path: Path, **columns: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.table(columns), path)
    return path


def numbers_and_words(n: int) -> tuple[list[str], list[str]]:
    """Texts that even a random model keeps apart."""
    rng = np.random.default_rng(0)
    texts = [
        " ".join(map(str, rng.integers(1000, 9999, 3))) if i % 2 else " ".join(rng.choice(list("abcdefgh"), 6).tolist())
        for i in range(n)
    ]
    return texts, ["number" if i % 2 else "word" for i in range(n)]


def test_a_text_is_what_the_model_makes_of_it_alone(subject: Subject) -> None:
    store, loaded = subject.store, subject.loaded
    texts = ["The river ran", "", "past the mill and on to the sea. " * 3]
    read = read_texts(subject, texts)
    assert np.diff(read.bounds).tolist()[1:] == [0, store.ctx]
    ids = loaded.tokenizer(texts[0], return_tensors="pt", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        expected = loaded.model(ids, output_hidden_states=True).hidden_states[2][0]
    np.testing.assert_allclose(read.of(0), expected.numpy(), atol=1e-5)
    np.testing.assert_allclose(read.means()[0], expected.numpy().mean(0), atol=1e-5)
    latents = TorchSae(sae_of()).encode(expected)
    for how, pooled in (("mean", latents.mean(0)), ("max", latents.amax(0))):
        got = pooled_latents(TorchSae(sae_of()), read, how).toarray()  # pyright: ignore[reportArgumentType]
        np.testing.assert_allclose(got[0], pooled.numpy(), atol=1e-5)
        assert not got[1].any()


def test_probes_find_what_sets_texts_apart_and_the_majority_does_not(subject: Subject, tmp_path: Path) -> None:
    texts, labels = numbers_and_words(120)
    path = write(tmp_path / "kind.parquet", text=texts, label=labels)
    config = ProbingConfig(data=(path,), k=(1, 3))
    block = probing(read_labelled(config, 0), config.k, subject)["kind"]
    rows = block["rows"]
    assert (block["n_train"], block["n_test"], block["classes"]) == (84, 36, ["word"])
    assert list(rows) == [
        *(f"{name} k={k}" for k in (1, 3) for name in ("sae", "dimensions", "pca")), "dense", "majority",
    ]  # fmt: skip
    assert rows["dense"]["accuracy"] > 0.95
    assert rows["pca k=3"]["auroc"] > 0.95
    assert rows["majority"]["accuracy"] == 0.5 == rows["majority"]["auroc"]
    low, high = rows["dense"]["accuracy_ci95"]
    assert low <= rows["dense"]["accuracy"] <= high
    assert probing(read_labelled(config, 0), config.k, subject)["kind"] == block


def test_classes_are_balanced_and_texts_of_the_test_are_not_trained_on(tmp_path: Path) -> None:
    labels = ["a"] * 30 + ["b"] * 60 + ["c"] * 90
    rng = np.random.default_rng(1)
    mixed = [labels[i] for i in rng.permutation(180)]
    problems = balanced(tmp_path, mixed, 80, 0)
    assert [problem.label for problem in problems] == ["a", "b", "c"]
    for problem in problems:
        for part in (problem.train, problem.test):
            assert problem.positive[part].mean() == 0.5
        assert problem.train.max() < 100 <= problem.test.min()


def test_rare_classes_are_negatives_only(tmp_path: Path) -> None:
    labels = [["a", "b", "rare"][min(i % 20 // 9, 2)] for i in range(200)]
    problems = balanced(tmp_path, labels, 80, 0)
    assert [problem.label for problem in problems] == ["a", "b"]
    assert any("rare" in np.array(labels)[problem.train] for problem in problems)


def test_repeated_and_blank_texts_are_read_once_or_not_at_all(tmp_path: Path) -> None:
    path = write(tmp_path / "x.parquet", text=["a", "a", " ", None, "b"], label=[1, 2, 1, 1, None])
    assert labelled(path, ProbingConfig(data=(path,)), 0) == (["a"], ["1"])


@pytest.mark.parametrize(
    ("columns", "match"),
    [
        ({"text": ["a"], "topic": ["x"]}, "a column 'label', got the columns text, topic. Name the columns: --set pro"),
        ({"text": [f"t{i}" for i in range(60)], "label": ["x"] * 60}, "two classes or more, got 1"),
        ({"text": [f"t{i}" for i in range(20)], "label": ["x", "y"] * 10}, "at least 10 texts"),
        ({"text": [1, 2], "label": ["x", "y"]}, "text in 'text', got int"),
    ],
)
def test_labels_that_cannot_be_probed_are_refused_before_anything_is_read(
    tmp_path: Path, columns: dict[str, list[Any]], match: str
) -> None:
    path = write(tmp_path / "x.parquet", **columns)
    with pytest.raises(TextError, match=match):
        read_labelled(ProbingConfig(data=(path,)), 0)


def concept_files(folder: Path) -> ConceptsConfig:
    """Concept 0 is numbers; others are negatives."""
    texts, labels = numbers_and_words(80)
    is_number = [label == "number" for label in labels]
    kinds = ["positive" if number else "negative" for number in is_number]
    owners = [0 if number else -1 for number in is_number]
    write(folder / "train_data.parquet", output=texts[:40], concept_id=owners[:40], category=kinds[:40])
    write(folder / "latent_eval_data.parquet", output=texts[40:], concept_id=[0] * 40, category=kinds[40:])
    return ConceptsConfig(data=folder)


def test_the_difference_of_means_detects_a_planted_concept(subject: Subject, tmp_path: Path) -> None:
    found = concept_detection(*read_concepts(concept_files(tmp_path)), subject)
    rows = found["rows"]
    assert list(rows) == ["sae", "dimensions", "pca", "difference", "random", "always_negative"]
    assert (found["n_concepts"], found["n_texts"]) == (1, 80)
    assert rows["difference"]["auroc"] > 0.95
    assert rows["difference"]["accuracy"] > 0.8
    assert (rows["always_negative"]["auroc"], rows["always_negative"]["accuracy"]) == (0.5, 0.5)


def test_concepts_that_no_file_has_are_refused(tmp_path: Path) -> None:
    config = concept_files(tmp_path).model_copy(update={"category": "concept_id"})
    with pytest.raises(TextError, match="a concept with texts in both files"):
        read_concepts(config)


@pytest.mark.parametrize("kind", [np.asarray, sparse.csr_array])
def test_column_aurocs_are_those_of_scikit_learn(kind: Any) -> None:
    rng = np.random.default_rng(0)
    table, positive = rng.integers(0, 4, (50, 7)).astype(np.float32), rng.random(50) < 0.4
    expected = [roc_auc_score(positive, column) for column in table.T]
    np.testing.assert_allclose(column_aurocs(kind(table), positive), expected)


def test_absorption_of_words_by_hand() -> None:
    """Latent 0 is the letter's; latent 1 points half its way, and takes over in the second and third word."""
    decoder = np.array([[1, 0], [0.6, 0.8], [0, 1]], np.float32)
    latents = np.array([[2, 0, 0], [0, 2, 0], [0.5, 2, 0], [0, 0, 2], [0, 0.1, 0]], np.float32)
    direction, projection = np.array([1, 0], np.float32), np.array([2.0, 1.2, 2.0, 1.0, 1.0])
    fraction, full = absorbed(projection, latents, decoder, direction, [0])
    assert full.tolist() == [False, True, False, False, False]
    np.testing.assert_allclose(fraction, [0, 1, 1.2 / 1.7, 0, 0], atol=1e-6)


def test_absorption_runs_on_a_vocabulary_and_refuses_what_it_cannot_read(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [f" {letter}{'abcdefghijklmnopqrstuvwxyz'[i % 26]}{'xyz'[i % 3]}" for letter in "qz" for i in range(40)]
    config = AbsorptionConfig(enabled=True, prompt="On")
    with pytest.raises(TextError, match="single-token words"):
        absorption(config, subject)
    with pytest.raises(MismatchError, match="writes what it reads"):
        absorption(config, subject._replace(wiring=Wiring.parse("resid_mid.1->mlp_out.1")))
    monkeypatch.setattr("sae.evaluation.absorption.vocabulary", lambda *_: words)
    found = absorption(config, subject)
    assert set(found["letters"]["sae"]) == {"q", "z"}
    assert 0 <= (found["rows"]["sae"]["absorption_fraction"] or 0) <= 1


def test_an_sae_shares_all_latents_with_itself_and_few_with_chance(tmp_path: Path) -> None:
    first, mixed = sae_of(), np.random.default_rng(3).permutation(48)
    other = SaeArtefact(
        "topk", first.W_enc[:, mixed].copy(), first.b_enc, first.W_dec[mixed].copy(), first.b_dec, k=4,
        metadata=first.metadata,
    )  # fmt: skip
    other.save(tmp_path / "other")
    live = np.arange(48) < 40
    found = stability(TorchSae(first), load_others([tmp_path / "other"], first), live, 0)
    block = found[str(tmp_path / "other")]
    assert (block["n_latents"], block["n_other"]) == (40, 48)
    assert block["rows"]["sae"]["mean_max_cosine"] == pytest.approx(1)
    assert block["rows"]["sae"]["matched_cosine"] == pytest.approx(1)
    assert block["rows"]["sae"]["shared"] == 1
    assert block["rows"]["random_directions"]["shared"] == 0
    assert 0.2 < block["rows"]["random_directions"]["mean_max_cosine"] < 0.7


def test_an_sae_of_another_place_is_not_compared_with(tmp_path: Path) -> None:
    sae_of(hook_point="resid_post.0").save(tmp_path / "other")
    with pytest.raises(MismatchError, match=r"at resid_post\.1, widths 32 and 32, got"):
        load_others([tmp_path / "other"], sae_of())


def test_baselines_are_as_sparse_as_the_sae_and_pca_is_the_best_of_its_rank() -> None:
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((2000, WIDTH)) * np.linspace(0.1, 3, WIDTH) + 5).astype(np.float32)
    sae = TorchSae(sae_of())
    other = random_sae(sae, x, 0)
    l0 = [float((one.encode(torch.from_numpy(x)) > 0).sum(1).float().mean()) for one in (sae, other)]
    assert l0[1] == pytest.approx(l0[0], rel=0.05)
    pca = pca_sae(sae, x, 5)
    latents = pca.encode(torch.from_numpy(x))
    assert ((latents > 0).sum(1) == 5).all()
    left = ((x - pca(torch.from_numpy(x)).numpy()) ** 2).sum()
    singular = np.linalg.svd(x - x.mean(0), compute_uv=False)
    assert left == pytest.approx((singular[5:] ** 2).sum(), rel=1e-3)
