"""Correlations and shared tokens equal those of dense matrices, from a store and from two indices alike."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import sparse

from activations.errors import CorruptArtefactError, HookPointError, MissingArtefactError
from activations.store import ActivationStore
from sae.artefact import SaeArtefact
from sae.index_pass import PassSettings, Statistics
from sae.index_source import seed_key, store_source
from sae.index_state import STATE_NAME, Cursor, Progress, save_state
from sae.same_tokens import from_indices, from_store, related
from sae.torch_view import TorchSae

HOOKS = ("resid_post.1", "resid_post.2")
WIDTHS = 24, 40
SETTINGS = PassSettings(n_top=1, n_sampled=1, n_near=1, before=1, after=1, coactivation_tokens=300, seed=0)
MakeStore = Callable[..., ActivationStore]


@pytest.mark.parametrize("cells", [1, 50, 10**6])
def test_figures_equal_those_of_dense_matrices(cells: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sae.same_tokens._CELLS", cells)
    rng = np.random.default_rng(0)
    a = np.where(rng.random((60, 9)) < 0.2, rng.random((60, 9)), 0).astype(np.float32)
    b = np.where(rng.random((60, 7)) < 0.2, rng.random((60, 7)), 0).astype(np.float32)
    b[:, 3] = 3 * a[:, 5]
    a[:, 8] = b[:, 6] = 0
    with np.errstate(invalid="ignore"):
        correlation = np.nan_to_num(np.corrcoef(a.T, b.T)[:9, 9:])
    both = (a > 0).T.astype(float) @ (b > 0)
    apart = np.argwhere((both == 0) & (correlation < 0))[:3]
    asked = np.concatenate([apart, [[8, 6], [0, 6], [5, 3]]]).T
    found = related(sparse.csr_array(a), sparse.csr_array(b), 0.2, (asked[0], asked[1]))
    wanted = correlation >= 0.2
    wanted[asked[0], asked[1]] = True
    assert np.argwhere(wanted).tolist() == np.stack([found.one, found.other], 1).tolist()
    np.testing.assert_allclose(found.correlation, correlation[wanted], atol=1e-9)
    np.testing.assert_allclose(found.one_inside, (both / np.maximum((a > 0).sum(0)[:, None], 1))[wanted])
    np.testing.assert_allclose(found.other_inside, (both / np.maximum((b > 0).sum(0), 1))[wanted])
    np.testing.assert_allclose(found.largest, correlation.max(1).clip(0), atol=1e-9)
    np.testing.assert_allclose(found.largest_back, correlation.max(0).clip(0), atol=1e-9)


def random_sae(hook_point: str, d_sae: int) -> SaeArtefact:
    rng = np.random.default_rng(d_sae)
    W_enc = rng.standard_normal((16, d_sae)).astype(np.float32)
    zeros = np.zeros(d_sae, np.float32), np.zeros(16, np.float32)
    return SaeArtefact("topk", W_enc, zeros[0], W_enc.T.copy(), zeros[1], k=4, metadata={"hook_point": hook_point})


@pytest.fixture
def saes() -> list[SaeArtefact]:
    return [random_sae(hook, width) for hook, width in zip(HOOKS, WIDTHS, strict=True)]


def dense(store: ActivationStore, sae: SaeArtefact, rows: slice = slice(None)) -> np.ndarray:
    x = store.activations(sae.hook_point)[rows][store.mask()[rows]]
    return TorchSae(sae).encode(torch.from_numpy(x)).numpy()


def test_a_store_is_encoded_whole_or_in_sequences_spread_over_it(
    make_store: MakeStore, saes: list[SaeArtefact]
) -> None:
    store = make_store(hook_points=HOOKS)
    for sae, got in zip(saes, from_store(store, saes, 10**6), strict=True):
        np.testing.assert_allclose(got.toarray(), dense(store, sae), rtol=1e-4, atol=1e-5)
    n = int(store.mask().sum()) // 4
    for sae, got in zip(saes, from_store(store, saes, n), strict=True):
        np.testing.assert_allclose(got.toarray(), dense(store, sae, slice(0, None, 4)), rtol=1e-4, atol=1e-5)
    with pytest.raises(HookPointError):
        from_store(store, [saes[0], random_sae("resid_post.0", 8)], 100)


def indexed(store: ActivationStore, sae: SaeArtefact, out: Path, *, first: int = 0) -> Path:
    """The state of an index of the sequences from `first` on."""
    found = Statistics(SETTINGS, sae.d_sae)
    source = store_source(store, (sae.hook_point,), sae.d_sae, torch.device("cpu"))
    for block, _ in source.blocks(0, seed_key(source.key, SETTINGS.seed), Cursor(sequence=first)):
        found.add(TorchSae(sae), block)
    save_state(out, Progress(sae_sha256="x", hook_point="resid_post.1", settings=SETTINGS._asdict()), found)
    return out


def test_two_indices_have_the_same_tokens_in_their_samples(
    make_store: MakeStore, saes: list[SaeArtefact], tmp_path: Path
) -> None:
    store = make_store(hook_points=HOOKS, n_sequences=32)
    assert store.mask().sum() > SETTINGS.coactivation_tokens
    paths = [indexed(store, sae, tmp_path / sae.hook_point) for sae in saes]
    one, other = from_indices(paths[0], paths[1], WIDTHS)
    assert one.shape == (300, 24)
    assert other.shape == (300, 40)
    codes = [(dense(store, sae) > 0).astype(np.float32) for sae in saes]
    rows = {row.tobytes() for row in np.hstack(codes)}
    assert {row.tobytes() for row in np.hstack([one.toarray(), other.toarray()])} <= rows
    later = indexed(store, saes[1], tmp_path / "later", first=16)
    one, other = from_indices(paths[0], later, WIDTHS)
    assert 50 < one.shape[0] == other.shape[0] < 300
    assert {row.tobytes() for row in np.hstack([one.toarray(), other.toarray()])} <= rows


def test_indices_of_other_texts_share_nothing_and_damage_is_found(
    make_store: MakeStore, saes: list[SaeArtefact], tmp_path: Path
) -> None:
    store, short = make_store(hook_points=HOOKS), make_store("short", hook_points=HOOKS, ctx=8)
    paths = [indexed(store, saes[0], tmp_path / "a"), indexed(short, saes[1], tmp_path / "b")]
    assert [part.shape[0] for part in from_indices(paths[0], paths[1], WIDTHS)] == [0, 0]
    with pytest.raises(CorruptArtefactError, match="cannot be"):
        from_indices(paths[0], paths[1], (5, 40))
    (paths[1] / STATE_NAME).unlink()
    with pytest.raises(MissingArtefactError, match="Build the index again"):
        from_indices(paths[0], paths[1], WIDTHS)
