"""SAELens and saekit read what the other saves, and compute the same numbers from it.

SAELens needs an older transformer-lens and other packages that saekit does not want, so it lives in an environment of
its own. Its loaders for Gemma Scope check those two formats as well.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from activations.config import HarvestConfig
from activations.harvest import harvest
from activations.models import load_model
from activations.store import ActivationStore
from sae.artefact import KINDS, SaeArtefact
from sae.config import EvaluateConfig
from sae.data import held_out
from sae.evaluate import evaluate
from sae.evaluation.saebench import write_saebench

PACKAGES = (
    "sae-lens==6.54.12",
    "sae-bench==0.6.0",
    "transformer-lens==3.5.1",
    "better-abc==0.0.3",
    "datasets==5.2.0",
    "dill==0.4.1",
    "docstring-parser==0.18.0",
    "multiprocess==0.70.19",
    "pandas==3.1.1",
    "simple-parsing==0.1.9",
    "typeguard==4.6.0",
)
UNKNOWN = {"topk_transcoder", "topk_skip_transcoder"}
RESIDUAL, MLP_INPUT, MLP_OUTPUT = ("blocks.12.hook_" + site for site in ("resid_post", "resid_mid", "mlp_out"))
MADE = {
    *("standard", "uncentred", "half", "topk", "topk_rescaled", "jumprelu", "gated"),
    *("transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder"),
    *("batchtopk_checkpoint", "matryoshka_checkpoint", "topk_training_checkpoint"),
    *("gated_training_checkpoint", "jumprelu_training_checkpoint"),
    *("batchtopk_final", "matryoshka_final", "topk_training_final", "gated_training_final", "jumprelu_training_final"),
}


def test_either_reads_what_the_other_writes(
    make_peer: Any, random_sae: Callable, write_ours: Any, read_theirs: Any, by_name: Any, tmp_path: Path
) -> None:
    ours, theirs, gemma = tmp_path / "ours", tmp_path / "theirs", tmp_path / "gemma"
    mine: dict[str, SaeArtefact] = {kind: random_sae(kind) for kind in KINDS if kind not in UNKNOWN}
    mine["uncentred"] = random_sae("jumprelu", apply_b_dec_to_input=False)
    mine["crosscoder"] = random_sae("jumprelu", metadata={"hook_point": "resid_post.10+resid_post.12"})
    write_ours(ours, "saelens", mine)
    write_ours(ours, "saekit", {kind: random_sae(kind) for kind in UNKNOWN})
    scope_1 = {"1-sae": "jumprelu", "1-transcoder": "jumprelu_transcoder"}
    scope_2 = {f"2-{kind}": kind for kind in ("jumprelu", "jumprelu_transcoder", "jumprelu_skip_transcoder")}
    write_ours(gemma, "gemma_scope", {name: random_sae(kind) for name, kind in scope_1.items()})
    write_ours(gemma, "gemma_scope_2", {name: random_sae(kind) for name, kind in scope_2.items()})

    lines = make_peer("saelens", PACKAGES, "import sae_lens").run(ours, theirs, gemma)
    refused = {line["name"] for line in lines if "refused" in line}
    assert refused == UNKNOWN, "SAELens must not take a TopK transcoder for one without k"
    results = by_name([line for line in lines if "refused" not in line])
    assert results.keys() == mine.keys() | scope_1.keys() | scope_2.keys()
    for name, sae in mine.items():
        result = results[name]
        assert (result["architecture"], result["hook_name_out"]) == (
            sae.saved_name,
            MLP_OUTPUT if sae.transcodes else None,
        )
        reads = "blocks.10.hook_resid_post+" + RESIDUAL if name == "crosscoder" else RESIDUAL
        assert result["hook_name"] == (MLP_INPUT if sae.transcodes else reads)
    assert {results[name]["architecture"] for name in scope_2} == {*scope_2.values()}

    read = read_theirs(theirs)
    assert read.keys() == MADE
    for name, sae in read.items():
        assert sae.hook_point == ("resid_mid.12->mlp_out.12" if "transcoder" in name else "resid_post.12")


@pytest.mark.parametrize("arch", ["topk", "batchtopk"])
def test_a_step_of_its_trainer_is_timed_beside_ours(make_peer: Any, step_lines: Any, arch: str) -> None:
    python = make_peer("saelens", PACKAGES, "import sae_lens").python()
    *theirs, ours = step_lines("SAELENS_PYTHON", python, "--arch", arch, "--peer", "saelens", "--dead", "0.25")
    assert [(line["dtype"], line["autocast"]) for line in theirs] == [("float32", False), ("bfloat16", True)]
    for line in theirs:
        assert (line["who"], line["arch"], line["dead_latents"], len(line["all_ms"])) == ("saelens", arch, 16, 3)
        assert line["versions"]["sae_lens"] == "6.54.12"
    assert ours["ratio_to_fastest_peer"] == pytest.approx(ours["tok_s"] / max(x["tok_s"] for x in theirs), abs=1e-3)


def test_its_evaluation_agrees_with_ours(make_peer: Any, tiny_llama: Path, tmp_path: Path) -> None:
    """On the same sequences, none of whose tokens is masked: SAELens masks by token and saekit by position."""
    words = np.random.default_rng(0).choice(["river", "mill", "sea", "cat", "dog", "12", "def add"], 3000)
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": " ".join(words)}))
    loaded = load_model(str(tiny_llama), dtype="float32")
    config = HarvestConfig(
        model=loaded.spec, text=str(tmp_path / "text.jsonl"), hook_points=("resid_post.1",), out=tmp_path / "store",
        ctx=32, max_tokens=32 * 64, store_dtype="float32",
    )  # fmt: skip
    store = ActivationStore.open(harvest(config, loaded).path)
    assert store.mask().all()
    width, stats = store.d_model, store.stats("resid_post.1")
    both = np.hstack([np.eye(width), -np.eye(width)]).astype(np.float32)
    threshold = np.full(2 * width, stats.mean_norm / width**0.5, np.float32)
    metadata = {"model": {"id": loaded.id, "fingerprint": loaded.fingerprint}, "hook_point": "resid_post.1"}
    SaeArtefact(
        "jumprelu", both, np.zeros(2 * width, np.float32), both.T.copy(), stats.mean.astype(np.float32),
        threshold=threshold, metadata=metadata,
    ).save(tmp_path / "sae")  # fmt: skip
    settings = EvaluateConfig(
        store=store.path, sae=tmp_path / "sae", model=loaded.spec, holdout_fraction=0.5, ce_sequences=1000,
        baselines=False,
    )  # fmt: skip
    ours = evaluate(settings, loaded)
    rows = {f"{name} k={k}": {"accuracy": 0.75} for name in ("sae", "dimensions") for k in (1, 5)}
    letter = {"absorption_fraction": 0.1, "full_absorption": 0.2, "full_words": 2, "words": 10, "split_features": 1.0}
    more = {
        "probing": {"topics": {"rows": rows | {"dense": {"accuracy": 0.9}}}},
        "absorption": {"letters": {"sae": {"a": letter | {"is_known": True}}}},
    }
    write_saebench(tmp_path / "sae" / "saebench", {**ours, **more}, tmp_path / "sae")
    np.save(tmp_path / "tokens.npy", store.tokens(*held_out(store, 0.5)))
    paths = tmp_path / "sae", tiny_llama, tmp_path / "tokens.npy", tmp_path / "sae" / "saebench"
    theirs, *read = make_peer("saelens", PACKAGES, "import sae_lens").run(*paths, check="evals")
    assert {line["name"] for line in read} == {"core", "sparse_probing", "absorption"}
    for group, name, value in (
        ("sparsity", "l0", ours["l0"]),
        ("sparsity", "l1", ours["l1"]),
        ("reconstruction_quality", "explained_variance", 1 - ours["fvu"]),
        ("reconstruction_quality", "mse", ours["squared_error"]),
        ("reconstruction_quality", "cossim", ours["cosine"]),
        ("shrinkage", "l2_ratio", ours["shrinkage"]),
        ("shrinkage", "relative_reconstruction_bias", ours["reconstruction_bias"]),
        ("model_performance_preservation", "ce_loss_score", ours["ce_loss_recovered_zero"]),
        ("model_performance_preservation", "ce_loss_with_sae", ours["ce_sae"]),
        ("model_performance_preservation", "ce_loss_without_sae", ours["ce_clean"]),
        ("model_performance_preservation", "ce_loss_with_ablation", ours["ce_zero"]),
    ):
        assert theirs[group][name] == pytest.approx(value, rel=0.01), name
    assert 0.6 < 1 - ours["fvu"] < 0.9, "else any formula agrees"
    assert ours["ce_loss_recovered_zero"] > 1.1, "not 1: this random model predicts better with its stream at zero"
