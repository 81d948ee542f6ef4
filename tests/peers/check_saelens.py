"""Compare SAEs of saekit and of SAELens in both directions; run inside an environment that has sae-lens.

    check_saelens.py OURS THEIRS GEMMA_SCOPE

1. Load each SAE of OURS with SAELens and print how far its outputs are from saekit's; 2. the same for those of
GEMMA_SCOPE, through SAELens's own loaders of Gemma Scope 1 and 2, which find the files here and not on the hub;
3. write SAEs of SAELens's own into THEIRS, with what it makes of random inputs.
"""

import json
import sys
from pathlib import Path
from typing import Any

import sae_lens
import torch
from _compare import D_MODEL, D_SAE, K, compare, keep_reference, randomise
from sae_lens import saes
from sae_lens.loading import pretrained_sae_loaders as loaders
from safetensors import safe_open

GEMMA_1, GEMMA_2 = "gemma-scope-2b-pt-res", "gemma-scope-2-270m-pt"


def check_ours(folder: Path) -> None:
    """Encode and reconstruct with SAELens."""
    try:
        sae = sae_lens.SAE.load_from_disk(folder / "layers.12", device="cpu")
    except KeyError as error:
        sys.stdout.write(json.dumps({"name": folder.name, "refused": str(error)}) + "\n")
        return
    about = {key: getattr(sae.cfg.metadata, key) for key in ("hook_name", "hook_name_out", "model_name")}
    compare(folder, sae.encode, sae, architecture=sae.cfg.architecture(), **about)


def check_gemma_scope(folder: Path) -> None:
    """The same through the loader for the hub, with its downloads answered from the folder."""
    files = folder / "layers.12"

    def download(*_: Any, filename: str | None = None, **__: Any) -> str:
        return str(files / Path(filename or _[1]).name)

    def shapes(*_: Any) -> dict[str, list[int]]:
        with safe_open(files / "params.safetensors", framework="pt") as file:
            return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118

    def convert(_: Path, device: str, cfg_overrides: dict[str, Any] | None) -> tuple[dict[str, Any], dict[str, Any]]:
        widths = {"d_in": D_MODEL, "d_sae": D_SAE}
        if (files / "params.npz").exists() and "transcoder" in folder.name:
            name = "gemma-scope-2b-pt-transcoders"
            widths |= {"d_out": D_MODEL}
            return loaders.gemma_2_transcoder_huggingface_loader(name, "layer_12/width_16k", device, False, widths)[:2]
        if (files / "params.npz").exists():
            return loaders.gemma_2_sae_huggingface_loader(GEMMA_1, "layer_12/width_16k", device, False, widths)[:2]
        kind = "transcoder" if "transcoder" in folder.name else "resid_post"
        return loaders.gemma_3_sae_huggingface_loader(GEMMA_2, f"{kind}/layer_12", device, False, None)[:2]

    loaders.hf_hub_download, loaders.get_safetensors_tensor_shapes = download, shapes
    sae = sae_lens.SAE.load_from_disk(files, device="cpu", converter=convert)
    compare(folder, sae.encode, sae, architecture=sae.cfg.architecture())


def make_theirs(folder: Path) -> None:
    """Every kind that SAELens saves, with random weights and decoder rows that are not of norm 1."""
    size: dict[str, Any] = {"d_in": D_MODEL, "d_sae": D_SAE}
    size["metadata"] = saes.sae.SAEMetadata(hook_name="blocks.12.hook_resid_post", model_name="tiny")
    names = {"hook_name": "blocks.12.hook_resid_mid", "hook_name_out": "blocks.12.hook_mlp_out"}
    across = {**size, "d_out": D_MODEL, "apply_b_dec_to_input": False, "metadata": saes.sae.SAEMetadata(**names)}
    made = {
        "standard": saes.StandardSAE(saes.StandardSAEConfig(**size)),
        "uncentred": saes.StandardSAE(saes.StandardSAEConfig(**size, apply_b_dec_to_input=False)),
        "half": saes.StandardSAE(saes.StandardSAEConfig(**size, dtype="bfloat16")),
        "topk": saes.TopKSAE(saes.TopKSAEConfig(**size, k=K)),
        "topk_rescaled": saes.TopKSAE(saes.TopKSAEConfig(**size, k=K, rescale_acts_by_decoder_norm=True)),
        "jumprelu": saes.JumpReLUSAE(saes.JumpReLUSAEConfig(**size)),
        "gated": saes.GatedSAE(saes.GatedSAEConfig(**size)),
        "transcoder": saes.Transcoder(saes.TranscoderConfig(**across)),
        "skip_transcoder": saes.SkipTranscoder(saes.SkipTranscoderConfig(**across)),
        "jumprelu_transcoder": saes.JumpReLUTranscoder(saes.JumpReLUTranscoderConfig(**across)),
        "jumprelu_skip_transcoder": saes.JumpReLUSkipTranscoder(saes.JumpReLUSkipTranscoderConfig(**across)),
    }
    for name, sae in made.items():
        randomise(sae, positive=("threshold",))
        sae.save_model(folder / name / "layers.12")
        sae = sae_lens.SAE.load_from_disk(folder / name / "layers.12", dtype="float32")
        keep_reference(folder / name, sae.encode, sae)
    make_checkpoints(folder, size)


def make_checkpoints(folder: Path, size: dict[str, Any]) -> None:
    """Training states; what they compute is what SAELens saves of them for inference."""
    made = {
        "batchtopk": saes.BatchTopKTrainingSAE(saes.BatchTopKTrainingSAEConfig(**size, k=K)),
        "matryoshka": saes.MatryoshkaBatchTopKTrainingSAE(
            saes.MatryoshkaBatchTopKTrainingSAEConfig(**size, k=K, matryoshka_widths=[20, D_SAE])
        ),
        "topk_training": saes.TopKTrainingSAE(saes.TopKTrainingSAEConfig(**size, k=K)),
        "gated_training": saes.GatedTrainingSAE(saes.GatedTrainingSAEConfig(**size)),
        "jumprelu_training": saes.JumpReLUTrainingSAE(saes.JumpReLUTrainingSAEConfig(**size)),
    }
    for name, sae in made.items():
        randomise(sae, positive=("threshold",))
        if hasattr(sae, "topk_threshold"):
            sae.topk_threshold.fill_(0.7)
        sae.save_model(folder / f"{name}_checkpoint" / "layers.12")
        sae.save_inference_model(folder / f"{name}_final" / "layers.12")
        final = sae_lens.SAE.load_from_disk(folder / f"{name}_final" / "layers.12")
        for state in ("checkpoint", "final"):
            keep_reference(folder / f"{name}_{state}", final.encode, final)


def main() -> None:
    """All three."""
    ours, theirs, gemma = map(Path, sys.argv[1:])
    torch.manual_seed(0)
    for folder in sorted(ours.iterdir()):
        check_ours(folder)
    for folder in sorted(gemma.iterdir()):
        check_gemma_scope(folder)
    make_theirs(theirs)


if __name__ == "__main__":
    main()
