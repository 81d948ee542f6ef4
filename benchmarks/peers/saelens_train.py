"""Train SAELens' TopK and BatchTopK SAEs on batches that are given; runs in SAELens' own environment.

    python saelens_train.py DATA          one run a line on standard input, see _batches.py

SAELens' own: the training classes with their initialisation, losses and AuxK; SAETrainer with its Adam, schedule,
clipping and count of dead latents; `save_inference_model`. Ours: the iterator that hands it the batches, where SAELens
would run the model. What a run does not set is SAELens' default: float32 without autocast, a constant learning rate of
3e-4. `set` holds fields of SAETrainerConfig (`lr_decay_steps`, `lr_warm_up_steps`, `autocast`, ...), and of the SAE's
config with `sae.` before them (`sae.aux_loss_coefficient`; `sae.normalize_activations`: expected_average_only_in, which
scales inputs by what SAELens' own code estimates). The two `_steps` may be shares of the run: 0.2.
"""

from pathlib import Path
from typing import Any

import numpy as np
import sae_lens
import torch
from _batches import Tokens, serve
from sae_lens import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig, TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.config import SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer

KINDS = {
    "topk": (TopKTrainingSAE, TopKTrainingSAEConfig),
    "batchtopk": (BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig),
}
STEPS = ("lr_warm_up_steps", "lr_decay_steps")


def train(tokens: Tokens, run: dict[str, Any], order: np.ndarray) -> dict[str, Any]:
    """Train and save one SAE."""
    torch.manual_seed(run["seed"])
    make, make_config = KINDS[run["arch"]]
    of_sae = {key.removeprefix("sae."): value for key, value in run["set"].items() if key.startswith("sae.")}
    of_trainer = {key: value for key, value in run["set"].items() if not key.startswith("sae.")}
    for key in STEPS:
        if 0 < of_trainer.get(key, 0) < 1:
            of_trainer[key] = round(of_trainer[key] * len(order))
    lr = run["lr"] or SAETrainerConfig.lr
    config = SAETrainerConfig(
        total_training_samples=order.size,
        train_batch_size_samples=order.shape[1],
        device=str(tokens.device),
        lr=lr,
        **{"lr_end": lr / 10, **of_trainer},  # as SAELens' runner fills it in
    )
    sae = make(make_config(d_in=tokens.d_model, d_sae=run["width"], k=run["k"], device=str(tokens.device), **of_sae))
    trainer = SAETrainer(config, sae, tokens.batches(order))
    if sae.cfg.normalize_activations == "expected_average_only_in":
        trainer.activation_scaler.estimate_scaling_factor(
            d_in=tokens.d_model,
            data_provider=tokens.batches(order),  # of its own, so that no batch is used up
            n_batches_for_norm_estimate=min(config.n_batches_for_norm_estimate, len(order)),
        )
    trainer.fit()
    sae.save_inference_model(Path(run["out"]) / "sae")
    return {"sae": str(Path(run["out"]) / "sae"), "lr": lr}


if __name__ == "__main__":
    serve(train, {"sae_lens": sae_lens.__version__, "torch": torch.__version__})
