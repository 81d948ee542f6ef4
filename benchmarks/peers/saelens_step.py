"""Time one training step of SAELens' TopK or BatchTopK; runs in SAELens' own environment.

    PYTHONPATH=benchmarks python benchmarks/peers/saelens_step.py JSON          see _torch_steps.py

SAELens' own: the training classes with their losses and AuxK, and SAETrainer's `step`, with Adam, clipping, schedule
and the count of dead latents; between steps, what its `fit` does without logging. `autocast` of the JSON is SAELens':
the forward pass in bfloat16; else all is float32, in which PyTorch leaves TF32 off.
"""

from collections.abc import Callable
from typing import Any

import sae_lens
import torch
from _steps import SLEEPING, Settings
from _torch_steps import DEVICE, Step, answer
from sae_lens import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig, TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.config import SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer

KINDS = {
    "topk": (TopKTrainingSAE, TopKTrainingSAEConfig),
    "batchtopk": (BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig),
}
LONG = 10**6
"""steps of the run that is not finished"""
NEVER = 1e9


def make(settings: Settings, asked: dict[str, Any]) -> tuple[Step, Callable[[], dict[str, Any]]]:
    """Its trainer's step."""
    make_sae, make_config = KINDS[settings.arch]
    sae = make_sae(make_config(d_in=settings.d_model, d_sae=settings.d_sae, k=settings.k, device=str(DEVICE)))
    config = SAETrainerConfig(
        total_training_samples=LONG * settings.batch,
        train_batch_size_samples=settings.batch,
        device=str(DEVICE),
        autocast=asked["autocast"],
        lr_end=SAETrainerConfig.lr / 10,  # as SAELens' runner fills it in
    )
    trainer = SAETrainer(config, sae, iter(()))
    with torch.no_grad():
        sae.b_enc[: settings.n_dead] = SLEEPING
        trainer.n_forward_passes_since_fired[: settings.n_dead] = NEVER

    def step(batch: torch.Tensor) -> None:
        trainer.maybe_reset_sparsity()
        trainer.step(batch)
        trainer.n_training_steps += 1

    def tell() -> dict[str, Any]:
        return {
            "dtype": "bfloat16" if asked["autocast"] else "float32",
            "kernels": "torch",
            "optimizer": "adam",
            "dead_latents": int(trainer.dead_neurons.sum()),
            "versions": {"sae_lens": sae_lens.__version__, "torch": torch.__version__},
        }

    return step, tell


if __name__ == "__main__":
    answer(make)
