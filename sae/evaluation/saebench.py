"""The same numbers in the files that SAEBench writes, for what reads those: core, sparse_probing and absorption.

The values are saekit's, under SAEBench's names (version 0.6.0); what `eval_config` cannot say is in
`eval_result_unstructured`. Where definitions differ:

    explained_variance         1 - FVU with the dataset mean; SAEBench's own is neither that nor free of scale
    explained_variance_legacy  mean over tokens of 1 - squared error / squared distance from that mean
    mse                        mean squared error of a token, summed over dimensions
    *_with_ablation            zero ablation, as there
    sparse_probing             mean over the classes of each file; test texts are ours
    num_split_features         main latents but the first, as there

Left out: details by latent, and evaluations that SAEBench has and saekit has not.
"""

import json
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sae.checked_files import read_json

Metrics = dict[str, dict[str, Any]]


def write_saebench(folder: Path, result: Mapping[str, Any], sae: Path) -> None:
    """Write a file for each of its evaluations that there are results for; `sae` holds the SAE's cfg.json."""
    folder.mkdir(exist_ok=True)
    about, config = result["about"], read_json(sae / "cfg.json")
    written: dict[str, tuple[str, Metrics, list[dict[str, Any]], dict[str, Any]]] = {
        "core": ("core", core_metrics(result), [], {"dataset": about["text"], "context_size": about["ctx"]})
    }
    if "probing" in result:
        metrics, details = probing_metrics(result["probing"])
        options = {"dataset_names": list(result["probing"]), "k_values": _ks(result["probing"])}
        written["sparse_probing"] = ("sparse_probing", metrics, details, options)
    if "absorption" in result:
        metrics, details = absorption_metrics(result["absorption"]["letters"]["sae"])
        written["absorption"] = ("absorption_first_letter", metrics, details, {"random_seed": about["seed"]})
    for name, (kind, metrics, details, options) in written.items():
        file = {
            "eval_type_id": kind,
            "eval_config": {"model_name": about["model"], **options},
            "eval_id": str(uuid.uuid4()),
            "datetime_epoch_millis": int(time.time() * 1000),
            "eval_result_metrics": metrics,
            "eval_result_details": details,
            "sae_bench_commit_hash": "none: measured by saekit",
            "sae_lens_id": about["hook_point"],
            "sae_lens_release_id": about["sae"],
            "sae_lens_version": config.get("metadata", {}).get("sae_lens_version"),
            "sae_cfg_dict": config,
            "eval_result_unstructured": about,
        }
        (folder / f"{name}.json").write_text(json.dumps(file, indent=2) + "\n")


def core_metrics(result: Mapping[str, Any]) -> Metrics:
    """Categories and names of SAEBench's core evaluation."""
    decoder, encoder = (result["histograms"][f"{side}_cosine"]["mean"] for side in ("decoder", "encoder"))
    return {
        "model_behavior_preservation": {
            "kl_div_score": result["kl_recovered_zero"],
            "kl_div_with_ablation": result["kl_zero"],
            "kl_div_with_sae": result["kl_sae"],
        },
        "model_performance_preservation": {
            "ce_loss_score": result["ce_loss_recovered_zero"],
            "ce_loss_with_ablation": result["ce_zero"],
            "ce_loss_with_sae": result["ce_sae"],
            "ce_loss_without_sae": result["ce_clean"],
        },
        "reconstruction_quality": {
            "explained_variance": 1 - result["fvu"],
            "explained_variance_legacy": result["explained_variance_token"],
            "mse": result["squared_error"],
            "cossim": result["cosine"],
        },
        "shrinkage": {
            "l2_norm_in": result["norm"],
            "l2_norm_out": result["norm_reconstructed"],
            "l2_ratio": result["shrinkage"],
            "relative_reconstruction_bias": result["reconstruction_bias"],
        },
        "sparsity": {"l0": result["l0"], "l1": result["l1"]},
        "token_stats": {
            "total_tokens_eval_reconstruction": result["ce_tokens"],
            "total_tokens_eval_sparsity_variance": result["n_tokens"],
        },
        "misc_metrics": {
            "freq_over_1_percent": result["above_1_percent"],
            "freq_over_10_percent": result["dense_fraction"],
            "normalized_freq_over_1_percent": result["activations_above_1_percent"],
            "normalized_freq_over_10_percent": result["activations_above_10_percent"],
            "average_max_encoder_cosine_sim": encoder,
            "average_max_decoder_cosine_sim": decoder,
            "frac_alive": 1 - result["dead_fraction"],
        },
    }


def probing_metrics(probing: Mapping[str, Any]) -> tuple[Metrics, list[dict[str, Any]]]:
    """Mean over files, and each file's own."""
    details = [{"dataset_name": name, **_accuracies(block["rows"])} for name, block in probing.items()]
    means = {key: float(np.mean([row[key] for row in details])) for key in details[0] if key != "dataset_name"}
    sides = ("llm", "sae")
    return {side: {key: value for key, value in means.items() if key.startswith(side)} for side in sides}, details


def absorption_metrics(letters: Mapping[str, Any]) -> tuple[Metrics, list[dict[str, Any]]]:
    """Mean and standard deviation over letters, and each letter's own."""
    details = [
        {
            "first_letter": letter,
            "mean_absorption_fraction": row["absorption_fraction"],
            "full_absorption_rate": row["full_absorption"],
            "num_full_absorption": row["full_words"],
            "num_probe_true_positives": row["words"],
            "num_split_features": int(row["split_features"]) - 1,
        }
        for letter, row in letters.items()
        if row["is_known"]
    ]
    columns = {
        "absorption_fraction_score": "mean_absorption_fraction",
        "full_absorption_score": "full_absorption_rate",
        "num_split_features": "num_split_features",
    }
    mean: dict[str, Any] = {}
    for prefix, statistic in (("mean", np.mean), ("std_dev", np.std)):
        for name, key in columns.items():
            mean[f"{prefix}_{name}"] = float(statistic([row[key] for row in details])) if details else 0.0
    return {"mean": mean}, details


def _accuracies(rows: Mapping[str, Any]) -> dict[str, float]:
    """SAEBench has fields for k of 1, 2, 5, 10, 20, 50 and 100 alone."""
    ks = [k for k in (1, 2, 5, 10, 20, 50, 100) if f"sae k={k}" in rows]
    found = {"llm_test_accuracy": rows["dense"]["accuracy"]}
    for side, features in (("llm", "dimensions"), ("sae", "sae")):
        found |= {f"{side}_top_{k}_test_accuracy": rows[f"{features} k={k}"]["accuracy"] for k in ks}
    return found


def _ks(probing: Mapping[str, Any]) -> list[int]:
    rows = next(iter(probing.values()))["rows"]
    return [int(name.removeprefix("sae k=")) for name in rows if name.startswith("sae k=")]
