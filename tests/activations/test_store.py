"""The activation store: what is written is read, what is damaged is named, what was not committed is gone."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from activations.errors import CorruptArtefactError, HookPointError, MismatchError, MissingArtefactError
from activations.store import ActivationStore
from activations.store_schema import SCHEMA_VERSION, HookState, ModelRef, StoreMeta, to_bfloat16_bits, to_float32
from activations.store_writer import Group, StoreWriter, write_group

HOOK = "resid_post.1"
ROWS, CTX, WIDTH = 4, 8, 16


def meta(**changes: object) -> StoreMeta:
    values = {
        "model": ModelRef(id="m", fingerprint="f", n_layers=3, d_model=WIDTH),
        "tokenizer_fingerprint": "t",
        "text": "corpus",
        "text_fingerprint": "x",
        "hook_points": (HOOK,),
        "ctx": CTX,
        "store_dtype": "bfloat16",
        "compute_dtype": "float32",
        "batch_tokens": 2048,
        "commit_sequences": ROWS,
        "outlier_norm": 10.0,
    }
    return StoreMeta.model_validate(values | changes)


def group(seed: int, rows: int = ROWS) -> tuple[Group, np.ndarray]:
    rng = np.random.default_rng(seed)
    x = to_float32(to_bfloat16_bits(rng.standard_normal((rows, CTX, WIDTH)).astype(np.float32)))
    tokens = rng.integers(1, 100, (rows, CTX), dtype=np.int32)
    mask = rng.random((rows, CTX)) < 0.8
    mask[:, 1] = True
    return Group(tokens, mask, np.full(rows, seed, np.int32), {HOOK: to_bfloat16_bits(x)}), x


def append(writer: StoreWriter, seed: int, rows: int = ROWS) -> np.ndarray:
    part, x = group(seed, rows)
    hook, used = writer.state.hooks.get(HOOK, HookState()), x[part.mask]
    hooks = {HOOK: hook.add(np.linalg.norm(used, axis=1), used.sum(axis=0, dtype=np.float64))}
    tokens = writer.state.tokens + int(part.mask.sum())
    writer.append(part, writer.state.model_copy(update={"hooks": hooks, "tokens": tokens}))
    return x


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A complete store of three groups."""
    with StoreWriter.open(tmp_path / "store", meta()) as writer:
        for seed in (1, 2, 3):
            append(writer, seed)
        writer.finish(complete=True)
    return tmp_path / "store"


def test_what_was_written_is_read(path: Path) -> None:
    store = ActivationStore.open(path)
    assert (store.n_sequences, store.is_complete, store.d_model) == (3 * ROWS, True, WIDTH)
    for i, seed in enumerate((1, 2, 3)):
        part, x = group(seed)
        rows = slice(i * ROWS, (i + 1) * ROWS)
        np.testing.assert_array_equal(store.tokens(rows.start, rows.stop), part.tokens)
        np.testing.assert_array_equal(store.mask(rows.start, rows.stop), part.mask)
        np.testing.assert_array_equal(store.documents(rows.start, rows.stop), part.documents)
        np.testing.assert_array_equal(store.activations(HOOK, rows.start, rows.stop), x)


def test_statistics_are_those_of_the_unmasked_tokens(path: Path) -> None:
    store = ActivationStore.open(path)
    x = store.activations(HOOK)[store.mask()]
    stats, norms = store.stats(HOOK), np.linalg.norm(x, axis=1)
    assert stats.n_tokens == len(x)
    np.testing.assert_allclose(stats.mean, x.mean(axis=0, dtype=np.float64), rtol=1e-9, atol=1e-12)
    assert stats.mean_norm == pytest.approx(norms.mean(), rel=1e-6)
    assert stats.mean_sq_norm == pytest.approx((norms**2).mean(), rel=1e-6)
    assert stats.norm_quantiles["0.5"] == pytest.approx(np.median(norms), rel=0.03)


@given(st.integers(0, 2**32 - 1), st.sampled_from([1e-30, 1.0, 1e30]))
@settings(max_examples=50)
def test_bfloat16_bits_are_those_of_torch(seed: int, scale: float) -> None:
    import torch

    x = (np.random.default_rng(seed).standard_normal(64) * scale).astype(np.float32)
    ours = to_bfloat16_bits(x)
    theirs = torch.from_numpy(x).bfloat16()
    np.testing.assert_array_equal(ours, theirs.view(torch.int16).numpy().view(np.uint16))
    np.testing.assert_array_equal(to_float32(ours), theirs.float().numpy())


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_other_dtypes_round_trip(tmp_path: Path, dtype: str) -> None:
    part, x = group(1)
    values = x.astype(dtype)
    with StoreWriter.open(tmp_path / "s", meta(store_dtype=dtype)) as writer:
        writer.append(part._replace(activations={HOOK: values}), writer.state)
    np.testing.assert_array_equal(ActivationStore.open(tmp_path / "s").activations(HOOK), values.astype(np.float32))


def test_an_uncommitted_group_is_dropped_on_resume(path: Path) -> None:
    reference = ActivationStore.open(path)
    with StoreWriter.open(path, meta()) as writer:
        write_group(writer.storage, meta(), group(9)[0], 3 * ROWS)  # then killed before the commit
    assert ActivationStore.open(path).n_sequences == 3 * ROWS
    with StoreWriter.open(path, meta()) as writer:
        x = append(writer, 4, rows=2)
    store = ActivationStore.open(path)
    assert store.n_sequences == 3 * ROWS + 2
    np.testing.assert_array_equal(store.activations(HOOK, 3 * ROWS), x)
    np.testing.assert_array_equal(store.tokens(0, 3 * ROWS), reference.tokens())


def test_resuming_equals_never_stopping(path: Path, tmp_path: Path) -> None:
    for seed in (1, 2, 3):
        with StoreWriter.open(tmp_path / "again", meta()) as writer:
            append(writer, seed)
    with StoreWriter.open(tmp_path / "again", meta()) as writer:
        writer.finish(complete=True)
    whole, parts = ActivationStore.open(path), ActivationStore.open(tmp_path / "again")
    assert whole.fingerprint == parts.fingerprint
    np.testing.assert_array_equal(whole.activations(HOOK), parts.activations(HOOK))


def test_a_second_writer_is_refused(path: Path) -> None:
    with (
        StoreWriter.open(path, meta()),
        pytest.raises(MismatchError, match="no other writer"),
        StoreWriter.open(path, meta()),
    ):
        pass
    with StoreWriter.open(path, meta()):
        pass


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model", ModelRef(id="other", fingerprint="g", n_layers=3, d_model=WIDTH)),
        ("tokenizer_fingerprint", "u"),
        ("text_fingerprint", "y"),
        ("hook_points", ("resid_post.2",)),
        ("ctx", 16),
        ("store_dtype", "float16"),
    ],
)
def test_a_store_made_from_something_else_is_refused(path: Path, field: str, value: object) -> None:
    before = ActivationStore.open(path).fingerprint
    with pytest.raises(MismatchError, match=field), StoreWriter.open(path, meta(**{field: value})):
        pass
    assert ActivationStore.open(path).fingerprint == before


def test_a_path_to_the_same_text_may_be_spelt_otherwise(path: Path) -> None:
    with StoreWriter.open(path, meta(text="./corpus")) as writer:
        assert writer.state.committed == 3 * ROWS


def shards(path: Path) -> list[Path]:
    return sorted((path / HOOK).glob("c.*"))


def test_a_flipped_bit_is_named(path: Path) -> None:
    shard = shards(path)[1]
    data = bytearray(shard.read_bytes())
    data[100] ^= 1
    shard.write_bytes(data)
    store = ActivationStore.open(path)
    store.activations(HOOK, 0, ROWS)
    with pytest.raises(CorruptArtefactError, match=rf"'{HOOK}' in sequences {ROWS} to {2 * ROWS - 1}"):
        store.activations(HOOK, ROWS, 2 * ROWS)


def test_values_are_read_to_their_place_as_they_are_kept(path: Path) -> None:
    store = ActivationStore.open(path)
    room = store.room(2 * ROWS)
    room.values[:] = 7
    store.read_into(room.cut(1, 3), HOOK, ROWS)
    assert room.scale is None
    np.testing.assert_array_equal(to_float32(*room.cut(1, 3)), store.activations(HOOK, ROWS, ROWS + 2))
    assert (room.values[:1] == 7).all()
    assert (room.values[3:] == 7).all()
    with pytest.raises(HookPointError, match=r"resid_post\.7"):
        store.read_into(room, "resid_post.7", 0)


def test_a_truncated_shard_is_named(path: Path) -> None:
    os.truncate(shards(path)[1], 200)
    with pytest.raises(CorruptArtefactError, match=HOOK):
        ActivationStore.open(path).activations(HOOK)


def test_a_missing_shard_is_named_and_not_read_as_zeros(path: Path) -> None:
    shards(path)[2].unlink()
    with pytest.raises(CorruptArtefactError, match="missing shard"):
        ActivationStore.open(path).activations(HOOK)
    store = ActivationStore.open(path)
    room = store.room(3 * ROWS)
    room.values[:] = 1
    with pytest.raises(CorruptArtefactError, match="missing shard"):
        store.read_into(room, HOOK, 0)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(MissingArtefactError, match="saekit harvest"):
        ActivationStore.open(tmp_path / "none")


def test_a_missing_array_is_named(path: Path) -> None:
    shutil.rmtree(path / "tokens")
    with pytest.raises(CorruptArtefactError, match="tokens"):
        ActivationStore.open(path)


def test_another_schema_version_is_named(path: Path) -> None:
    text = (path / "zarr.json").read_text()
    (path / "zarr.json").write_text(text.replace(f'"schema_version": {SCHEMA_VERSION}', '"schema_version": 999'))
    with pytest.raises(CorruptArtefactError, match="schema version 999"):
        ActivationStore.open(path)


@pytest.mark.parametrize("content", [b"{", b"{}", b'{"zarr_format": 3, "node_type": "group", "attributes": {}}'])
def test_other_metadata_is_not_a_store(path: Path, content: bytes) -> None:
    (path / "zarr.json").write_bytes(content)
    with pytest.raises(CorruptArtefactError, match="activation store"):
        ActivationStore.open(path)


def test_an_unknown_hook_point_lists_those_there_are(path: Path) -> None:
    with pytest.raises(HookPointError, match=HOOK):
        ActivationStore.open(path).activations("resid_post.2")
