"""Evaluation inside the model: the scale from 0 to 1 means what it says, and only held-out, unmasked tokens count."""

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from activations.config import HarvestConfig
from activations.errors import HookPointError, MismatchError, SaekitError
from activations.harvest import harvest
from activations.hook_points import HookPoint
from activations.hooks import edit
from activations.models import LoadedModel, load_model
from activations.store import ActivationStore
from sae.artefact import SaeArtefact
from sae.config import EvaluateConfig
from sae.data import split
from sae.evaluate import evaluate
from sae.evaluation import splice
from sae.evaluation.splice import spliced_losses
from sae.torch_view import TorchSae
from sae.wiring import Wiring

HOOK, CTX, WIDTH, HOLDOUT = "resid_post.1", 24, 32, 0.4
OTHERS = ("resid_post.0", "resid_mid.1", "mlp_out.1", "resid_pre.2", "resid_post.2")
CONTROL = "The river <|im_start|> ran past."


@pytest.fixture(scope="module")
def loaded(tiny_llama: Path) -> LoadedModel:
    return load_model(str(tiny_llama), dtype="float32")


@pytest.fixture(scope="module")
def store(loaded: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    """Thirty short documents, every fifth with a control token inside."""
    folder = tmp_path_factory.mktemp("evaluate")
    rows = [f"Text {i} has {'la ' * (5 * i % 8)}{i * 37}." if i % 5 else CONTROL for i in range(30)]
    (folder / "text.jsonl").write_text("\n".join(json.dumps({"text": row}) for row in rows))
    config = HarvestConfig(
        model=loaded.spec, text=str(folder / "text.jsonl"), hook_points=(HOOK, *OTHERS), out=folder / "store", ctx=CTX,
        commit_sequences=8, store_dtype="float32", max_tokens=10_000,
    )  # fmt: skip
    return ActivationStore.open(harvest(config, loaded).path)


@pytest.fixture(autouse=True)
def no_charts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing them takes longer than all the rest; tests/sae/test_evaluation_report.py looks at them."""
    monkeypatch.setattr("sae.evaluate.write_report", lambda *_: None)


def metadata(loaded: LoadedModel) -> dict[str, Any]:
    return {"hook_point": HOOK, "model": {"id": loaded.id, "fingerprint": loaded.fingerprint}}


def perfect(loaded: LoadedModel) -> SaeArtefact:
    """x = relu(x) - relu(-x)."""
    both = np.hstack([np.eye(WIDTH), -np.eye(WIDTH)]).astype(np.float32)
    zeros, b_dec = np.zeros(2 * WIDTH, np.float32), np.zeros(WIDTH, np.float32)
    return SaeArtefact("jumprelu", both, zeros, both.T.copy(), b_dec, threshold=zeros, metadata=metadata(loaded))


def constant(loaded: LoadedModel, mean: np.ndarray) -> SaeArtefact:
    """No latent is ever active."""
    sae = perfect(loaded)
    return replace(sae, b_dec=mean.astype(np.float32), threshold=np.full(2 * WIDTH, np.inf, np.float32))


def run(sae: SaeArtefact, store: ActivationStore, loaded: LoadedModel, folder: Path, **changes: Any) -> dict[str, Any]:
    sae.save(folder / "sae")
    values = {
        "store": store.path,
        "sae": folder / "sae",
        "model": loaded.spec,
        "holdout_fraction": HOLDOUT,
        "baselines": False,
    }
    return evaluate(EvaluateConfig.model_validate(values | changes), loaded)


def test_a_perfect_sae_recovers_everything(store: ActivationStore, loaded: LoadedModel, tmp_path: Path) -> None:
    scores = run(perfect(loaded), store, loaded, tmp_path)
    assert scores["fvu"] == pytest.approx(0, abs=1e-10)
    assert scores["l0"] == pytest.approx(WIDTH)
    assert scores["ce_sae"] == pytest.approx(scores["ce_clean"], abs=1e-5)
    assert scores["kl_sae"] == pytest.approx(0, abs=1e-6)
    assert scores["ce_loss_recovered"] == pytest.approx(1, abs=1e-4)
    assert scores["ce_loss_recovered_zero"] == pytest.approx(1, abs=1e-4)
    assert json.loads((tmp_path / "sae" / "evaluation.json").read_text()) == scores


def test_an_sae_that_says_the_mean_recovers_nothing(
    store: ActivationStore, loaded: LoadedModel, tmp_path: Path
) -> None:
    scores = run(constant(loaded, store.stats(HOOK).mean), store, loaded, tmp_path)
    assert scores["fvu"] == pytest.approx(1, abs=1e-6)
    assert (scores["l0"], scores["dead_fraction"]) == (0, 1)
    assert scores["ce_sae"] == pytest.approx(scores["ce_mean"], abs=1e-5)
    assert scores["ce_loss_recovered"] == pytest.approx(0, abs=1e-4)
    assert abs(scores["ce_mean"] - scores["ce_clean"]) > 0.01, "else 0 and 1 are the same"


def test_an_sae_that_says_zero_is_zero_ablation(store: ActivationStore, loaded: LoadedModel, tmp_path: Path) -> None:
    scores = run(constant(loaded, np.zeros(WIDTH)), store, loaded, tmp_path)
    assert scores["ce_sae"] == pytest.approx(scores["ce_zero"], abs=1e-5)
    assert scores["ce_loss_recovered_zero"] == pytest.approx(0, abs=1e-4)


def wired(sae: SaeArtefact, hook_point: str, **changes: Any) -> SaeArtefact:
    """An SAE made to read and write other hook points."""
    transcodes = {"transcodes": True, "apply_b_dec_to_input": False} if "->" in hook_point else {}
    return replace(sae, metadata=sae.metadata | {"hook_point": hook_point}, **transcodes, **changes)


def both_signs(loaded: LoadedModel, hook_point: str, matrix: np.ndarray) -> SaeArtefact:
    """y = relu(x) @ matrix - relu(-x) @ matrix."""
    d_in, d_out = matrix.shape
    W_enc, zeros = np.hstack([np.eye(d_in), -np.eye(d_in)]).astype(np.float32), np.zeros(2 * d_in, np.float32)
    W_dec, b_dec = np.vstack([matrix, -matrix]).astype(np.float32), np.zeros(d_out, np.float32)
    changes = {"W_enc": W_enc, "b_enc": zeros, "W_dec": W_dec, "b_dec": b_dec, "threshold": zeros}
    return wired(perfect(loaded), hook_point, **changes)


@pytest.mark.parametrize(
    ("hook_point", "matrix"),
    [
        ("resid_post.1->resid_pre.2", np.eye(WIDTH)),
        ("resid_mid.1+mlp_out.1->resid_post.1", np.vstack([np.eye(WIDTH)] * 2)),
        ("resid_post.0+resid_post.2", np.eye(2 * WIDTH)),
        ("mlp_out.1+resid_post.1", np.eye(2 * WIDTH)),
    ],
)
def test_a_perfect_transcoder_or_crosscoder_recovers_everything(
    store: ActivationStore, loaded: LoadedModel, tmp_path: Path, hook_point: str, matrix: np.ndarray
) -> None:
    """Each knows what it writes from what it reads: a copy, the two terms of a sum, or itself."""
    scores = run(both_signs(loaded, hook_point, matrix), store, loaded, tmp_path, baselines=True)
    transcodes = Wiring.parse(hook_point).transcodes
    assert scores["baselines"].keys() == (set() if transcodes else {"random_sae", "pca"}), "which write what they read"
    assert scores["fvu"] == pytest.approx(0, abs=1e-9)
    assert scores["l0"] == pytest.approx(len(matrix))
    assert scores["ce_sae"] == pytest.approx(scores["ce_clean"], abs=1e-4)
    assert scores["ce_loss_recovered"] == pytest.approx(1, abs=1e-3)
    assert abs(scores["ce_mean"] - scores["ce_clean"]) > 0.01, "else 0 and 1 are the same"


@pytest.mark.parametrize("hook_point", ["resid_mid.1->mlp_out.1", "resid_post.0+resid_post.2"])
def test_saying_the_mean_of_what_is_written_recovers_nothing(
    store: ActivationStore, loaded: LoadedModel, tmp_path: Path, hook_point: str
) -> None:
    wiring = Wiring.parse(hook_point)
    sizes = len(wiring.reads) * WIDTH, len(wiring.writes) * WIDTH
    sae = both_signs(loaded, hook_point, np.zeros(sizes))
    mean = np.concatenate([store.stats(name).mean for name in wiring.writes])
    scores = run(replace(sae, b_dec=mean.astype(np.float32)), store, loaded, tmp_path)
    assert scores["fvu"] == pytest.approx(1, abs=1e-6)
    assert scores["ce_sae"] == pytest.approx(scores["ce_mean"], abs=1e-5)
    assert scores["ce_loss_recovered"] == pytest.approx(0, abs=1e-4)


def test_a_crosscoders_fvu_is_over_all_that_it_writes(
    store: ActivationStore, loaded: LoadedModel, tmp_path: Path
) -> None:
    """Perfect at one hook point, the mean at the other: what is left is the other's share of the variance."""
    names = ("resid_post.0", "resid_post.2")
    half = np.diag([1.0] * WIDTH + [0.0] * WIDTH)
    mean = np.concatenate([np.zeros(WIDTH), store.stats(names[1]).mean]).astype(np.float32)
    sae = both_signs(loaded, "+".join(names), half)
    scores = run(replace(sae, b_dec=mean), store, loaded, tmp_path)
    variances = []
    for name in names:
        x = store.activations(name, split(store, HOLDOUT))[store.mask(split(store, HOLDOUT))]
        variances.append(((x - store.stats(name).mean) ** 2).sum())
    assert scores["fvu"] == pytest.approx(variances[1] / sum(variances), rel=1e-5)


def test_all_that_a_crosscoder_writes_is_replaced_at_once(
    store: ActivationStore, loaded: LoadedModel, tmp_path: Path
) -> None:
    """Neither of these hook points decides alone what leaves the model."""
    names = ("resid_post.0", "mlp_out.1")
    scores = run(both_signs(loaded, "+".join(names), np.eye(2 * WIDTH)), store, loaded, tmp_path)
    total = 0.0
    for i in range(split(store, HOLDOUT), store.n_sequences):
        mask = torch.from_numpy(store.mask(i, i + 1)[0])
        length = 1 + int(torch.nonzero(mask).max())
        ids, keep = torch.from_numpy(store.tokens(i, i + 1)).long()[:, :length], mask[None, :length, None]
        with torch.no_grad(), ExitStack() as stack:
            for name in names:
                zero = edit(loaded.model, loaded.family, HookPoint.parse(name), lambda x, keep=keep: x * ~keep)
                stack.enter_context(zero)
            losses = -loaded.model(ids).logits[0].log_softmax(-1)[range(length - 1), ids[0, 1:]]
        total += float(losses[mask[: length - 1]].sum())
    assert scores["ce_zero"] == pytest.approx(total / scores["ce_tokens"], rel=1e-5)


def test_the_clean_loss_is_that_of_hugging_face_over_the_same_positions(
    store: ActivationStore, loaded: LoadedModel, tmp_path: Path
) -> None:
    scores = run(perfect(loaded), store, loaded, tmp_path)
    total, count = 0.0, 0
    for i in range(split(store, HOLDOUT), store.n_sequences):
        mask = torch.from_numpy(store.mask(i, i + 1)[0])
        length = 1 + int(torch.nonzero(mask).max())
        ids = torch.from_numpy(store.tokens(i, i + 1)).long()[:, :length]
        labels = ids.clone()
        labels[0, 1:][~mask[: length - 1]] = -100  # a target counts where the token before it is unmasked
        n = int(mask[: length - 1].sum())
        total, count = total + n * float(loaded.model(ids, labels=labels).loss), count + n
    assert scores["ce_tokens"] == count > 50
    assert scores["ce_clean"] == pytest.approx(total / count, rel=1e-5)


def test_kl_is_that_of_the_spliced_model(store: ActivationStore, loaded: LoadedModel, tmp_path: Path) -> None:
    sae = replace(perfect(loaded), threshold=np.ones(2 * WIDTH, np.float32))
    scores = run(sae, store, loaded, tmp_path)
    view, total = TorchSae(sae), 0.0
    for i in range(split(store, HOLDOUT), store.n_sequences):
        mask = torch.from_numpy(store.mask(i, i + 1)[0])
        length = 1 + int(torch.nonzero(mask).max())
        ids, keep = torch.from_numpy(store.tokens(i, i + 1)).long()[:, :length], mask[None, :length, None]
        point = HookPoint.parse(HOOK)
        with (
            torch.no_grad(),
            edit(loaded.model, loaded.family, point, lambda x, keep=keep: torch.where(keep, view(x), x)),
        ):
            spliced = loaded.model(ids).logits[0].log_softmax(-1)
        clean = loaded.model(ids).logits[0].log_softmax(-1)
        kl = torch.nn.functional.kl_div(spliced, clean, log_target=True, reduction="none").sum(-1)
        total += float(kl[:-1][mask[: length - 1]].sum())
    assert scores["kl_sae"] == pytest.approx(total / scores["ce_tokens"], rel=1e-4)
    assert scores["kl_sae"] > 0.001


def test_masked_tokens_are_left_as_they_are(
    store: ActivationStore, loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    @contextmanager
    def spy(model: Any, family: Any, point: Any, fn: Any) -> Iterator[None]:
        def recorded(x: torch.Tensor) -> torch.Tensor:
            seen.append((x, fn(x)))
            return seen[-1][1]

        with edit(model, family, point, recorded):
            yield

    monkeypatch.setattr(splice, "edit", spy)
    control = loaded.tokenizer.convert_tokens_to_ids("<|im_start|>")
    rows = np.flatnonzero((store.tokens() == control).any(axis=1))[:3]
    mask = torch.from_numpy(np.concatenate([store.mask(i, i + 1) for i in rows.tolist()]))
    mean = store.stats(HOOK).mean
    spliced_losses(store, Wiring.parse(HOOK), TorchSae(constant(loaded, 0 * mean + 7)), loaded, rows)
    ids = torch.from_numpy(np.concatenate([store.tokens(i, i + 1) for i in rows.tolist()]))
    assert (ids[~mask] == control).sum() == 3
    for (x, y), value in zip(seen, (7.0, torch.from_numpy(mean).float(), 0.0, None), strict=True):
        assert torch.equal(x[~mask], y[~mask])
        if value is not None:
            assert torch.equal(y[mask], torch.zeros_like(x[mask]) + value)
        else:  # the random error
            assert not torch.isclose(x[mask], y[mask]).any()


def test_only_held_out_sequences_are_read(
    store: ActivationStore, loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, rows = ActivationStore._read, {}

    def spy(self: ActivationStore, name: str, start: int, stop: int | None) -> np.ndarray:
        if name != "documents":
            rows.setdefault(name, set()).update(range(start, self.n_sequences if stop is None else stop))
        return read(self, name, start, stop)

    monkeypatch.setattr(ActivationStore, "_read", spy)
    scores = run(perfect(loaded), store, loaded, tmp_path, ce_sequences=3)
    first = split(store, HOLDOUT)
    assert 5 < first < store.n_sequences - 5
    assert rows[HOOK] == set(range(first, store.n_sequences))
    assert min(rows["tokens"]) >= first
    assert len(rows["tokens"]) == 3
    assert scores["n_tokens"] == store.mask(first).sum()


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ("store", MismatchError, "a store of"),
        ("width", MismatchError, r"reads and writes widths \(32, 32\), got \(31, 31\)"),
        ("model", MismatchError, "another"),
        ("hook", HookPointError, "one of resid_post.1, resid_post.0"),
    ],
)
def test_what_does_not_belong_together_is_refused(
    store: ActivationStore, loaded: LoadedModel, tmp_path: Path, change: str, error: type[Exception], match: str
) -> None:
    sae = perfect(loaded)
    if change == "store":
        loaded = replace(loaded, fingerprint="another")
    elif change == "width":
        sae = replace(sae, W_enc=sae.W_enc[:31], W_dec=sae.W_dec[:, :31], b_dec=sae.b_dec[:31])
    elif change == "model":
        sae = replace(sae, metadata=sae.metadata | {"model": {"id": "another", "fingerprint": "beef"}})
    else:
        sae = replace(sae, metadata=sae.metadata | {"hook_point": "resid_post.3"})
    with pytest.raises(error, match=match):
        run(sae, store, loaded, tmp_path)
    assert not (tmp_path / "sae" / "evaluation.json").exists()


def test_held_out_text_that_is_all_masked_is_an_error_of_ours(
    store: ActivationStore, loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mask = ActivationStore.mask
    monkeypatch.setattr(ActivationStore, "mask", lambda *args: mask(*args) & False)
    with pytest.raises(SaekitError, match="held-out"):
        run(perfect(loaded), store, loaded, tmp_path)


def test_the_random_error_is_as_long_as_the_saes_at_each_hook_point(
    store: ActivationStore, loaded: LoadedModel
) -> None:
    names = ("resid_post.0", "resid_post.2")
    sae = TorchSae(both_signs(loaded, "+".join(names), np.diag([0.5] * WIDTH + [0.9] * WIDTH)))
    x = torch.randn(3, CTX, 2 * WIDTH, generator=torch.Generator().manual_seed(1))
    replace = splice.variants(store, Wiring.parse("+".join(names)), sae, {}, 0)["random_error"]
    error, noise = (part.unflatten(-1, (2, WIDTH)) for part in (x - sae(x), replace(x, x) - x))
    torch.testing.assert_close(noise.norm(dim=-1), error.norm(dim=-1))
    assert torch.nn.functional.cosine_similarity(noise, error, dim=-1).mean().abs() < 0.1
