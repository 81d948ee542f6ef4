"""Text sources: what they read, in what order, and what they say when they cannot."""

import gzip
import json
import lzma
import sys
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from activations.errors import TextError
from activations.text import TEXT_SOURCES, Document, HubDataset, documents, find_text_source, text_fingerprint

needs_corpus = pytest.mark.skipif(
    not (files("activations.data") / "corpus.jsonl.xz").is_file(), reason="the corpus is not built yet"
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAEKIT_CACHE", str(tmp_path / "cache"))


def texts(spec: object) -> list[str]:
    return [document.text for document in documents(str(spec))]


def write_jsonl(path: Path, rows: list[Any], opener: Any = open) -> Path:
    with opener(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


# --- the table -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        ("corpus", "corpus"),
        ("hf:org/data.jsonl", "hf"),
        ("a/b.txt", "txt"),
        ("b.txt.gz", "txt"),
        ("b.jsonl", "jsonl"),
        ("b.jsonl.xz#body", "jsonl"),
        ("b.parquet#body", "parquet"),
    ],
)
def test_each_spec_has_one_source(spec: str, name: str) -> None:
    assert [key for key, source in TEXT_SOURCES.items() if source.matches(spec)] == [name]
    assert find_text_source(spec) is TEXT_SOURCES[name]


@pytest.mark.parametrize("spec", ["", "corpuses", "b.json", "b.docx", "txt"])
def test_unknown_spec(spec: str) -> None:
    with pytest.raises(TextError, match=r"expected one of corpus, hf, txt, jsonl, parquet") as caught:
        documents(spec)
    assert "hf:ORG/DATASET" in str(caught.value)


@needs_corpus
def test_corpus() -> None:
    first = next(documents("corpus"))
    assert first.index == 0
    assert len(first.text) > 20
    assert len(text_fingerprint("corpus")) == 64


# --- txt -------------------------------------------------------------------------------------------------------------


def test_txt_is_cut_at_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffone\r\ntwo\n\n \t\n\nthrée\n".encode())
    assert list(documents(str(path))) == [Document("one\ntwo", 0), Document("thrée", 1)]


@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\n\r"), min_size=1), min_size=1))
def test_txt_blocks_round_trip(tmp_path_factory: pytest.TempPathFactory, blocks: list[str]) -> None:
    blocks = [block for block in blocks if block.strip() and not block.startswith("\ufeff")] or ["x"]
    path = tmp_path_factory.mktemp("txt") / "a.txt"
    path.write_text("\n\n".join(blocks), encoding="utf-8", newline="")
    assert texts(path) == blocks


def test_undecodable_bytes_name_the_line(tmp_path: Path) -> None:
    path = tmp_path / "latin.txt"
    path.write_bytes(b"fine\ncaf\xe9\n")
    with pytest.raises(TextError, match=r"latin.txt line 2: expected UTF-8, got byte 0xe9 after 3 others"):
        texts(path)


# --- jsonl -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("suffix", "opener"), [("", open), (".gz", gzip.open), (".xz", lzma.open)])
def test_jsonl(tmp_path: Path, suffix: str, opener: Any) -> None:
    rows = [{"text": "one", "n": 1}, {"text": "  "}, {"text": None}, {"text": "two\nlines"}]
    path = write_jsonl(tmp_path / f"a.jsonl{suffix}", rows, opener)
    assert list(documents(str(path))) == [Document("one", 0), Document("two\nlines", 1)]


def test_jsonl_with_another_key(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"body": "one"}])
    assert texts(f"{path}#body") == ["one"]
    with pytest.raises(TextError, match=r"a\.jsonl line 1: expected an object with 'text', got the keys body\."):
        texts(path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{broken", "line 3: expected one JSON object a line"),
        ("[1]", "line 3: expected an object with 'text', got list"),
        ('{"text": 3}', "line 3: expected text in 'text', got int"),
    ],
)
def test_bad_jsonl_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n\n' + line + "\n")
    with pytest.raises(TextError, match=message):
        texts(path)


@pytest.mark.parametrize(("suffix", "opener"), [(".gz", gzip.open), (".xz", lzma.open)])
def test_cut_or_false_archive(tmp_path: Path, suffix: str, opener: Any) -> None:
    path = write_jsonl(tmp_path / f"a.jsonl{suffix}", [{"text": f"{i} {i * 7919 % 1000}"} for i in range(4000)], opener)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(TextError, match=r"after line \d+: expected a readable file"):
        texts(path)
    path.write_bytes(b"not an archive at all")
    with pytest.raises(TextError, match="expected a readable file"):
        texts(path)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet"])
def test_missing_and_empty_files(tmp_path: Path, name: str) -> None:
    with pytest.raises(TextError, match="got nothing there"):
        texts(tmp_path / name)
    with pytest.raises(TextError, match="got nothing there"):
        text_fingerprint(str(tmp_path / name))
    if name != "a.parquet":
        (tmp_path / name).write_text("\n \n")
        with pytest.raises(TextError, match="expected at least one document, got none"):
            texts(tmp_path / name)


def test_streams(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "first"}\n{broken\n')
    assert next(documents(str(path))).text == "first"


# --- fingerprints ----------------------------------------------------------------------------------------------------


def test_fingerprint_is_of_the_content_and_the_key(tmp_path: Path) -> None:
    one = write_jsonl(tmp_path / "one.jsonl", [{"text": "a"}])
    two = write_jsonl(tmp_path / "two.jsonl", [{"text": "a"}])
    other = write_jsonl(tmp_path / "other.jsonl", [{"text": "b"}])
    assert text_fingerprint(str(one)) == text_fingerprint(str(two))
    assert text_fingerprint(str(one)) != text_fingerprint(f"{one}#body")
    assert text_fingerprint(str(one)) != text_fingerprint(str(other))


# --- parquet ---------------------------------------------------------------------------------------------------------


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    rows = {"text": ["one", None, "", *map(str, range(600))], "n": list(range(603))}
    parquet.write_table(pyarrow.table(rows), path, row_group_size=100)
    assert texts(path) == ["one", *map(str, range(600))]
    with pytest.raises(TextError, match="expected a column 'body', got the columns text, n"):
        texts(f"{path}#body")
    with pytest.raises(TextError, match="expected text in 'n', got int"):
        texts(f"{path}#n")
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(TextError, match="expected a whole parquet file"):
        texts(path)


@pytest.mark.parametrize(
    ("module", "spec", "fix"),
    [
        ("pyarrow", "a.parquet", r"pip install pyarrow, .* extra 'parquet'"),
        ("datasets", "hf:org/data", r"pip install datasets, .* extra 'datasets'"),
    ],
)
def test_missing_extra(monkeypatch: pytest.MonkeyPatch, module: str, spec: str, fix: str) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(TextError, match=fix):
        texts(spec)


# --- Hugging Face datasets -------------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A stand-in for the datasets library; returns the calls it got."""
    calls: list[Any] = []

    def load_dataset(name: str, config: str | None, *, split: str, streaming: bool) -> Iterator[dict[str, Any]]:
        calls.append((name, config, split, streaming))
        if name == "org/none":
            raise FileNotFoundError("Dataset 'org/none' doesn't exist on the Hub")
        return iter([{"text": "one", "body": "uno"}, {"text": None, "body": ""}, {"text": "two", "body": "due"}])

    def load_dataset_builder(name: str, config: str | None) -> Any:
        return SimpleNamespace(hash=f"hash of {name}")

    stand_in = SimpleNamespace(load_dataset=load_dataset, load_dataset_builder=load_dataset_builder)
    monkeypatch.setitem(sys.modules, "datasets", stand_in)
    return calls


@pytest.mark.parametrize(
    ("spec", "parts"),
    [
        ("hf:org/d", ("org/d", None, "train", "text")),
        ("hf:org/d:en", ("org/d", "en", "train", "text")),
        ("hf:org/d:en:test#body", ("org/d", "en", "test", "body")),
        ("hf:d::test[:10%]", None),
        ("hf:", None),
    ],
)
def test_hub_spec(spec: str, parts: Any) -> None:
    if parts is not None:
        assert tuple(HubDataset.parse(spec)) == parts
    else:
        with pytest.raises(TextError, match=r"expected hf:DATASET"):
            HubDataset.parse(spec)


def test_hub_streams(hub: list[Any]) -> None:
    assert texts("hf:org/d:en:test") == ["one", "two"]
    assert texts("hf:org/d#body") == ["uno", "due"]
    assert hub == [("org/d", "en", "test", True), ("org/d", None, "train", True)]


@pytest.mark.usefixtures("hub")
def test_hub_errors_and_fingerprint() -> None:
    with pytest.raises(TextError, match="expected a column 'x', got the columns text, body"):
        texts("hf:org/d#x")
    with pytest.raises(TextError, match="doesn't exist on the Hub"):
        texts("hf:org/none")
    assert text_fingerprint("hf:org/d") == text_fingerprint("hf:org/d::train")
    assert text_fingerprint("hf:org/d") != text_fingerprint("hf:org/e")
