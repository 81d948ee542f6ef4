"""Compare SAEs of saekit and of sparsify in both directions; run inside an environment that has eai-sparsify.

    check_sparsify.py OURS THEIRS

1. Load each SAE of OURS with sparsify and print how far its outputs are from saekit's; 2. write SAEs of sparsify's own
into THEIRS, with what it makes of random inputs.
"""

import os
import sys
from pathlib import Path

os.environ["SPARSIFY_DISABLE_TRITON"] = "1"

import torch
from _compare import D_MODEL, D_SAE, K, compare, keep_reference, randomise
from sparsify import SparseCoder, SparseCoderConfig


def dense(coder: SparseCoder, x: torch.Tensor) -> torch.Tensor:
    """Its latents, of which sparsify gives the largest and their places."""
    top = coder.encode(x)
    return torch.zeros(len(x), coder.num_latents).scatter(-1, top.top_indices, top.top_acts)


def main() -> None:
    """Both."""
    ours, theirs = map(Path, sys.argv[1:])
    torch.manual_seed(0)
    for folder in sorted(ours.iterdir()):
        coder = SparseCoder.load_many(str(folder), local=True, layers=["layers.12"])["layers.12"]
        compare(folder, lambda x, coder=coder: dense(coder, x), lambda x, coder=coder: coder(x).sae_out)
    made = {
        "plain": SparseCoderConfig(k=K, num_latents=D_SAE),
        "expanded": SparseCoderConfig(k=K, expansion_factor=3),
        "loose_rows": SparseCoderConfig(k=K, expansion_factor=3, normalize_decoder=False),
        "transcoder": SparseCoderConfig(k=K, num_latents=D_SAE, transcode=True),
        "skip_transcoder": SparseCoderConfig(k=K, num_latents=D_SAE, transcode=True, skip_connection=True),
        "skip_autoencoder": SparseCoderConfig(k=K, num_latents=D_SAE, skip_connection=True),
        "half": SparseCoderConfig(k=K, num_latents=D_SAE),
    }
    for name, config in made.items():
        coder = SparseCoder(D_MODEL, config, dtype=torch.bfloat16 if name == "half" else None)
        randomise(coder)
        if config.normalize_decoder:
            coder.set_decoder_norm_to_unit_norm()
        coder.save_to_disk(theirs / name / "layers.12")
        coder = SparseCoder.load_from_disk(theirs / name / "layers.12").float()
        keep_reference(theirs / name, lambda x, coder=coder: dense(coder, x), lambda x, coder=coder: coder(x).sae_out)


if __name__ == "__main__":
    main()
