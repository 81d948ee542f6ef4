"""Compare SAEs of saekit and of dictionary_learning in both directions; run inside an environment that has it.

    check_dictionary_learning.py OURS THEIRS

1. Load each SAE of OURS with dictionary_learning and print how far its outputs are from saekit's; 2. write SAEs of its
own into THEIRS as its trainers do, with what it makes of random inputs.
"""

import json
import sys
from pathlib import Path
from typing import Any

import _stand_ins  # noqa: F401 (before what needs them)
import torch
from _compare import D_MODEL, D_SAE, K, compare, keep_reference, randomise
from dictionary_learning import dictionary
from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE
from dictionary_learning.trainers.top_k import AutoEncoderTopK
from dictionary_learning.utils import load_dictionary


def save(folder: Path, ae: Any, k: int | None) -> None:
    """As trainSAE does: the state dict, and the config with the trainer's."""
    folder.mkdir(parents=True)
    torch.save(ae.state_dict(), folder / "ae.pt")
    trainer = {"dict_class": type(ae).__name__, "activation_dim": D_MODEL, "dict_size": D_SAE, "lm_name": "tiny"}
    trainer |= {"layer": 12, "submodule_name": "resid_post_layer_12"} | ({} if k is None else {"k": k})
    (folder / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {"ctx_len": 128}}))


def main() -> None:
    """Both."""
    ours, theirs = map(Path, sys.argv[1:])
    torch.manual_seed(0)
    for folder in sorted(ours.iterdir()):
        ae = load_dictionary(str(folder / "layers.12"), "cpu")[0]
        compare(folder, ae.encode, ae, dict_class=type(ae).__name__)
    size = (D_MODEL, D_SAE)
    made = (
        dictionary.AutoEncoder(*size),
        dictionary.AutoEncoderNew(*size),
        dictionary.GatedAutoEncoder(*size),
        dictionary.JumpReluAutoEncoder(*size),
        AutoEncoderTopK(*size, K),
        BatchTopKSAE(*size, K),
        MatryoshkaBatchTopKSAE(*size, K, [20, D_SAE - 20]),
    )
    for ae in made:
        folder = theirs / type(ae).__name__
        randomise(ae, positive=("threshold",))
        if ae.state_dict().get("threshold", torch.ones(2)).ndim == 0:
            ae.threshold.fill_(0.7)
        save(folder / "layers.12", ae, K if hasattr(ae, "k") else None)
        keep_reference(folder, ae.encode, ae)


if __name__ == "__main__":
    main()
