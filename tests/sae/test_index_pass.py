"""One streaming pass equals sorting everything in memory, however the text is cut into blocks, runs and merges."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae import coactivation
from sae.artefact import SaeArtefact
from sae.histogram import N_BINS, edges
from sae.index_pass import Block, PassSettings, Statistics
from sae.priorities import LARGEST
from sae.reservoir import NO_TOKEN, split_key
from sae.torch_view import TorchSae

CTX, D_MODEL, D_SAE, DEAD, MASK64 = 8, 6, 10, 3, 2**64 - 1
SETTINGS = PassSettings(
    n_top=3, n_sampled=4, n_near=2, before=2, after=1, coactivation_tokens=40, seed=5,
)  # fmt: skip


class Text(NamedTuple):
    """A whole text in memory."""

    source: int
    key: int
    tokens: np.ndarray
    mask: np.ndarray
    documents: np.ndarray
    x: np.ndarray


def text(source: int, n: int, seed: int) -> Text:
    """Sequences of one to three a document, some masked whole, some repeated so that activations tie."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, CTX, D_MODEL)).astype(np.float32).round(1)
    x[1::7] = x[0]
    mask = rng.random((n, CTX)) < 0.7
    mask[3::11] = False
    documents = np.cumsum(rng.random(n) < 0.6).astype(np.int32)
    return Text(source, 1000 + source, rng.integers(0, 99, (n, CTX)).astype(np.int32), mask, documents, x)


def blocks(whole: Text, sizes: list[int]) -> Iterator[Block]:
    start = 0
    for size in [*sizes, len(whole.tokens)]:
        part = slice(start, min(start + size, len(whole.tokens)))
        start = part.stop
        if whole.mask[part].any():
            arrays = (torch.from_numpy(a[part]) for a in (whole.tokens, whole.mask, whole.documents))
            x = torch.from_numpy(whole.x[part][whole.mask[part]])
            yield Block(whole.source, whole.key, part.start, *arrays, x)


def sae_of(architecture: str) -> TorchSae:
    rng = np.random.default_rng(1)
    W_enc = rng.standard_normal((D_MODEL, D_SAE)).astype(np.float32)
    b_enc = np.full(D_SAE, -2 if architecture == "standard" else 0, np.float32)
    b_enc[DEAD] = -1e4
    rule: dict[str, Any] = {"k": 2} if architecture == "topk" else {}
    if architecture == "jumprelu":
        rule = {"threshold": np.full(D_SAE, 2.5, np.float32)}
    return TorchSae(SaeArtefact(architecture, W_enc, b_enc, W_enc.T.copy(), np.zeros(D_MODEL, np.float32), **rule))


def mix(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) & MASK64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK64
    return x ^ (x >> 31)


def priority(whole: Text, sequence: int, position: int) -> int:
    return mix(mix(mix(whole.key) + sequence * 2**24 + position)) & LARGEST


class Plain:
    """The same statistics, from dense arrays and Python's sort."""

    def __init__(self, sae: TorchSae, texts: list[Text]):
        self.entries: list[tuple[Text, int, int]] = []
        self.pre, self.latents = [], []
        for whole in texts:
            pre = sae.preactivations(torch.from_numpy(whole.x)).numpy()
            latents = sae.encode(torch.from_numpy(whole.x)).numpy() * whole.mask[..., None]
            self.pre.append(np.where(whole.mask[..., None], pre, -np.inf))
            self.latents.append(latents)
        self.texts = texts

    def places(self, latent: int, n: int, kind: str) -> list[tuple[int, int, int, int, float]]:
        """Source, document, sequence, position and score of the best places."""
        found = []
        for whole, pre, latents in zip(self.texts, self.pre, self.latents, strict=True):
            for s in range(len(whole.tokens)):
                values = latents[s, :, latent]
                for p in np.flatnonzero(whole.mask[s]).tolist():
                    rank = mix(priority(whole, s, p) + latent) & LARGEST
                    if kind != "near" and values[p] > 0:
                        found.append(((-values[p] if kind == "top" else 0, rank), whole, s, p, values[p]))
                if kind == "near" and whole.mask[s].any() and not values.any():
                    p, first = int(pre[s, :, latent].argmax()), int(np.flatnonzero(whole.mask[s])[0])
                    rank = mix(priority(whole, s, first) + latent) & LARGEST
                    found.append(((-pre[s, p, latent], rank), whole, s, p, pre[s, p, latent]))
        best: dict[tuple[int, int], tuple[int, int, int, int, float]] = {}
        for _, whole, s, p, score in sorted(found, key=lambda entry: entry[0]):
            document = int(whole.documents[s])
            best.setdefault((whole.source, document), (whole.source, document, s, int(p), float(score)))
        return list(best.values())[:n]

    def window(self, source: int, sequence: int, position: int, latent: int) -> tuple[list[int], list[float]]:
        at = next(i for i, whole in enumerate(self.texts) if whole.source == source)
        whole, end = self.texts[at], 1 + int(np.flatnonzero(self.texts[at].mask[sequence])[-1])
        tokens, values = [], []
        for p in range(position - SETTINGS.before, position + SETTINGS.after + 1):
            inside = 0 <= p < end
            tokens.append(int(whole.tokens[sequence, p]) if inside else NO_TOKEN)
            values.append(float(np.float16(self.latents[at][sequence, p, latent])) if inside else 0.0)
        return tokens, values


def run(sae: TorchSae, parts: list[Iterator[Block]]) -> Statistics:
    found = Statistics(SETTINGS, D_SAE)
    for part in parts:
        for block in part:
            found.add(sae, block)
    return found


TEXTS = [text(0, 40, 0), text(1, 33, 1)]


@pytest.fixture(scope="module", params=["standard", "topk", "jumprelu"])
def both(request: pytest.FixtureRequest) -> tuple[TorchSae, Plain]:
    sae = sae_of(request.param)
    return sae, Plain(sae, TEXTS)


def check_places(found: Statistics, plain: Plain, kind: str, n: int) -> None:
    kept = getattr(found, kind)
    kept.tensors()  # which sorts in what waits
    for latent in range(D_SAE):
        expected = plain.places(latent, n, kind)
        assert len(expected) == int((kept.priority[latent] != LARGEST).sum())
        for slot, (source, document, sequence, position, score) in enumerate(expected):
            assert split_key(int(kept.document[latent, slot])) == (source, document)
            assert float(kept.score[latent, slot]) == pytest.approx(score, rel=1e-5)
            assert int(kept.position[latent, slot]) == position
            tokens, values = plain.window(source, sequence, position, latent)
            assert kept.tokens[latent, slot].tolist() == tokens
            np.testing.assert_allclose(kept.values[latent, slot].numpy(), values, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("kind", ["top", "sampled", "near"])
def test_places_and_windows_equal_sorting_everything(both: tuple[TorchSae, Plain], kind: str) -> None:
    sae, plain = both
    found = run(sae, [blocks(whole, [5] * 6) for whole in TEXTS])
    check_places(found, plain, kind, getattr(SETTINGS, f"n_{kind}"))
    left_out = [len(plain.places(i, 99, kind)) > getattr(SETTINGS, f"n_{kind}") for i in range(D_SAE)]
    assert sum(left_out) >= 4


def test_counts_equal_brute_force(both: tuple[TorchSae, Plain]) -> None:
    sae, plain = both
    found = run(sae, [blocks(whole, [7] * 4) for whole in TEXTS])
    flat = np.concatenate([latents.reshape(-1, D_SAE) for latents in plain.latents])
    assert found.n_tokens == sum(int(whole.mask.sum()) for whole in TEXTS)
    np.testing.assert_array_equal(found.active, (flat > 0).sum(0))
    np.testing.assert_allclose(found.total, flat.sum(0, dtype=np.float64), rtol=1e-6)
    expected = [np.histogram(column[column > 0], np.r_[0, edges()[1:-1], np.inf])[0] for column in flat.T]
    assert np.abs(found.histogram.numpy() - expected).sum() <= 4, "but for values on an edge, rounded to either side"
    assert found.histogram.shape == (D_SAE, N_BINS)


@given(st.data())
@settings(max_examples=15)
def test_any_order_and_cut_of_two_texts_gives_the_same(data: st.DataObject) -> None:
    sae = sae_of(data.draw(st.sampled_from(["topk", "jumprelu"])))
    sizes = st.lists(st.integers(1, 12), max_size=6)
    whole = run(sae, [blocks(one, []) for one in TEXTS])
    cut = [*(blocks(one, data.draw(sizes)) for one in TEXTS)]
    pieces = [block for part in cut for block in part]
    other = run(sae, [iter(data.draw(st.permutations(pieces)))])
    expected, got = whole.tensors(), other.tensors()
    for name in expected:
        if not name.startswith("sample."):
            torch.testing.assert_close(got[name], expected[name], rtol=1e-4, atol=1e-5, msg=name)
    one, another = (coactivation.first(s.sample, SETTINGS.coactivation_tokens) for s in (whole, other))
    for name in ("priority", "counts", "latents"):
        assert torch.equal(getattr(one, name), getattr(another, name)), name


def test_statistics_go_on_from_what_was_saved(both: tuple[TorchSae, Plain]) -> None:
    sae, _ = both
    whole = run(sae, [blocks(one, [6] * 5) for one in TEXTS])
    saved = {name: value.clone() for name, value in run(sae, [blocks(TEXTS[0], [6] * 5)]).tensors().items()}
    later = Statistics(SETTINGS, D_SAE)
    later.load(saved)
    for block in blocks(TEXTS[1], [6] * 5):
        later.add(sae, block)
    for name, value in whole.tensors().items():
        assert torch.equal(value, later.tensors()[name]), name


def test_memory_does_not_grow_with_the_text() -> None:
    sae = sae_of("topk")
    short, long = (run(sae, [blocks(text(0, n, 2), [4] * n)]) for n in (30, 300))
    sizes = [{name: value.numel() for name, value in s.tensors().items()} for s in (short, long)]
    for name in sizes[0]:
        if name.startswith("sample."):
            assert sizes[1][name] <= 2 * SETTINGS.coactivation_tokens * 2
        else:
            assert sizes[0][name] == sizes[1][name]


def test_partners_are_those_of_brute_force() -> None:
    sae = sae_of("jumprelu")
    found = run(sae, [blocks(TEXTS[0], [9] * 4)])
    sample = coactivation.first(found.sample, SETTINGS.coactivation_tokens)
    fired = np.zeros((len(sample.counts), D_SAE), bool)
    fired[np.repeat(np.arange(len(fired)), sample.counts), sample.latents] = True
    got = coactivation.partners(sample, D_SAE, 4)
    n = fired.sum(0)
    for i in range(D_SAE):
        both = (fired & fired[:, [i]]).sum(0)
        jaccard = np.where(both >= coactivation.MIN_TOGETHER, both / np.maximum(n + n[i] - both, 1), 0)
        jaccard[i] = 0
        np.testing.assert_allclose(got.jaccard[i], np.sort(jaccard)[::-1][:4], rtol=1e-6)
        for j, value, lift in zip(got.latent[i].tolist(), got.jaccard[i], got.lift[i], strict=True):
            assert jaccard[j] == pytest.approx(float(value))
            if value:
                assert float(lift) == pytest.approx(both[j] * len(fired) / (n[i] * n[j]))
    assert (got.jaccard > 0).any()


@settings(max_examples=12)
@given(
    st.sampled_from(["topk", "jumprelu", "standard"]), st.lists(st.integers(1, 9), min_size=3, max_size=8), st.data()
)
def test_parts_merge_to_the_same_bits(architecture: str, sizes: list[int], data: st.DataObject) -> None:
    """Runs of neighbouring blocks, each counted by itself, and then one of their own behind them."""
    sae, uneven = sae_of(architecture), 10.0 ** np.random.default_rng(3).uniform(-8, 8, (40, 1, 1))
    one, two = text(0, 40, 2), text(3, 20, 6)
    one = one._replace(x=(one.x * uneven).astype(np.float32))  # so that sums in another order round to others
    parts = [*blocks(one, sizes), *blocks(two, sizes)]
    whole, merged = Statistics(SETTINGS, D_SAE), Statistics(SETTINGS, D_SAE)
    for block in parts:
        whole.add(sae, block)
    cuts = sorted(data.draw(st.sets(st.integers(1, len(parts) - 1), max_size=4)))
    for start, stop in zip([0, *cuts], [*cuts, len(parts)], strict=True):
        run, totals = Statistics(SETTINGS, D_SAE), []
        for block in parts[start:stop]:
            run.add(sae, block)
            totals.append(run.total.clone())
            run.total.zero_()
        merged.merge(run.tensors(), totals)
    whole.add(sae, parts[0]._replace(source=7, key=7))
    merged.add(sae, parts[0]._replace(source=7, key=7))
    found, expected = merged.tensors(), whole.tensors()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
