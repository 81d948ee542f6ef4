"""Evaluate an SAE with SAELens's own evaluation; run inside an environment that has sae-lens and sae-bench.

    check_saelens_evals.py SAE MODEL TOKENS RESULTS

1. Print what SAELens measures of the SAE, inside the model, on the sequences in TOKENS; 2. read the files of RESULTS
as SAEBench's own classes, which refuse what they do not know.
"""

import json
import sys
from pathlib import Path

import numpy as np
import sae_lens
import torch
from pydantic import TypeAdapter
from sae_bench.evals.absorption.eval_output import AbsorptionEvalOutput
from sae_bench.evals.core.eval_output import CoreEvalOutput
from sae_bench.evals.sparse_probing.eval_output import SparseProbingEvalOutput
from sae_lens.evals import EvalConfig, run_evals
from sae_lens.load_model import load_model
from sae_lens.training.activation_scaler import ActivationScaler

HOOK = "model.layers.1"
OUTPUTS = {
    "core": CoreEvalOutput,
    "sparse_probing": SparseProbingEvalOutput,
    "absorption": AbsorptionEvalOutput,
}


class Tokens:
    """What the evaluation asks of an activation store: all sequences at once, however often."""

    def __init__(self, tokens: torch.Tensor):
        self.tokens = tokens
        self.store_batch_size_prompts, self.context_size = tokens.shape

    def reset_input_dataset(self) -> None:
        pass

    def get_batch_tokens(self, _: int) -> torch.Tensor:
        return self.tokens


def main() -> None:
    """Both."""
    folder, model_folder, tokens, results = sys.argv[1:]
    sae = sae_lens.SAE.load_from_disk(folder, device="cpu")
    sae.cfg.metadata.hook_name = HOOK
    metrics, _ = run_evals(
        sae,
        Tokens(torch.from_numpy(np.load(tokens)).long()),
        load_model("AutoModelForCausalLM", model_folder, device="cpu"),
        ActivationScaler(),
        EvalConfig(
            n_eval_reconstruction_batches=1,
            compute_kl=True,
            compute_ce_loss=True,
            n_eval_sparsity_variance_batches=1,
            compute_l2_norms=True,
            compute_sparsity_metrics=True,
            compute_variance_metrics=True,
        ),
        exclude_special_tokens=False,
    )
    sys.stdout.write(json.dumps(metrics) + "\n")
    for path in sorted(Path(results).glob("*.json")):
        read = TypeAdapter(OUTPUTS[path.stem]).validate_json(path.read_text())
        sys.stdout.write(json.dumps({"name": path.stem, "eval_type_id": read.eval_type_id}) + "\n")


if __name__ == "__main__":
    main()
