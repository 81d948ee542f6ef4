"""Time one training step of sparsify's TopK; runs in sparsify's own environment.

    PYTHONPATH=benchmarks python benchmarks/peers/sparsify_step.py JSON          see _torch_steps.py

sparsify's own: SparseCoder with its fused encoder, its Triton decoder where there is a GPU, its bfloat16 autocast and
its decoder's norms. Ours: the lines of its Trainer's `fit` that make up a step, in their order and without what only
serves a model that is hooked (copies of the activations, a mask of tokens) or a log (waiting for the FVU), which its
Trainer pays on top. The optimizer is Adam as its Trainer would take it: bitsandbytes' in 8 bits where that is
installed, else PyTorch's; its default, signum, is cheaper. AuxK, which is off by default, is on if latents are dead.
"""

import os
from collections.abc import Callable
from typing import Any

import torch
from _steps import SLEEPING, Settings
from _torch_steps import DEVICE, Step, answer
from transformers import get_linear_schedule_with_warmup

if DEVICE.type != "cuda":
    os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # read on import; its Triton kernels need a GPU

import sparsify
from sparsify.utils import decoder_impl

LONG = 10**6
"""steps of the run that is not finished"""
NEVER = 10**9
AUXK = 1 / 32
"""weight of AuxK, from the paper"""


def make(settings: Settings, asked: dict[str, Any]) -> tuple[Step, Callable[[], dict[str, Any]]]:
    """A step of its Trainer."""
    torch.set_float32_matmul_precision("high")  # as its Trainer does
    config = sparsify.SaeConfig(num_latents=settings.d_sae, k=settings.k)
    trainer = sparsify.TrainConfig(sae=config, auxk_alpha=AUXK if settings.n_dead else 0.0)
    sae = sparsify.SparseCoder(settings.d_model, config, DEVICE, dtype=torch.float32)
    idle = torch.zeros(settings.d_sae, dtype=torch.long, device=DEVICE)
    did_fire = torch.zeros(settings.d_sae, dtype=torch.bool, device=DEVICE)
    sae.encoder.bias.data[: settings.n_dead] = SLEEPING
    idle[: settings.n_dead] = NEVER
    adam, name = optimizer(sae)
    schedule = get_linear_schedule_with_warmup(adam, trainer.lr_warmup_steps, LONG)
    steps = 0

    def step(batch: torch.Tensor) -> None:
        nonlocal steps
        if steps == 0:
            sae.b_dec.data = batch.mean(0)
        steps += 1
        sae.set_decoder_norm_to_unit_norm()
        dead = idle > trainer.dead_feature_threshold if trainer.auxk_alpha > 0 else None
        variance = (batch - batch.mean(0)).pow(2).sum()
        out = sae(x=batch, y=batch, dead_mask=dead, total_variance=variance)
        did_fire[out.latent_indices.flatten()] = True
        (out.fvu + trainer.auxk_alpha * out.auxk_loss + out.multi_topk_fvu / 8).backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        adam.step()
        adam.zero_grad()
        schedule.step()
        idle.add_(len(batch))
        idle[did_fire] = 0
        idle[: settings.n_dead] = NEVER  # a latent that is chosen counts as fired, though its value be 0
        did_fire.zero_()

    def tell() -> dict[str, Any]:
        return {
            "dtype": "bfloat16" if DEVICE.type == "cuda" and torch.cuda.is_bf16_supported() else "float32",
            "kernels": decoder_impl.__name__.removesuffix("_decode"),
            "optimizer": name,
            "dead_latents": int((idle > trainer.dead_feature_threshold).sum()),
            "versions": {"sparsify": sparsify.__version__, "torch": torch.__version__},
        }

    return step, tell


def optimizer(sae: sparsify.SparseCoder) -> tuple[torch.optim.Optimizer, str]:
    """What its Trainer makes of optimizer="adam", and what that is."""
    lr = 2e-4 / (sae.num_latents / (2**14)) ** 0.5
    try:
        from bitsandbytes.optim import Adam8bit
    except ImportError:
        return torch.optim.Adam(sae.parameters(), lr=lr), "adam"
    return Adam8bit(sae.parameters(), lr=lr), "adam8bit"


if __name__ == "__main__":
    answer(make)
