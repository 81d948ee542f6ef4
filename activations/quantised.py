"""Models whose linear layers hold 4 or 8 bits a weight.

| name | linear layers | package |
|---|---|---|
| `bnb-4bit` | 4 bits a weight (NF4), computed in the dtype of the model | bitsandbytes |
| `torchao-int8` | 8 bits a weight, a scale for each output, computed in the dtype of the model | torchao |

Both round weights only, so that a token's activations do not depend on the rows beside it, as steering each row of a
batch asks. What rounds activations too is left out: LLM.int8 looks for outliers in the whole batch (docs/LOG.md). The
residual stream keeps its dtype, and steering acts on it as on that of any model.

A quantised model keeps the fingerprint of the weights that it was made from, since a vector of those is meant for it,
and says in its id what was done to them; ids go into stores, vectors and transcripts.
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple

import torch

from activations.errors import ModelError
from activations.quiet import first_line, quiet_transformers

NONE = "none"


class Quantisation(NamedTuple):
    """One way to do it."""

    package: str
    config: Callable[[torch.dtype], Any]
    """dtype of the model -> what transformers loads it with"""


def _bnb_4bit(dtype: torch.dtype) -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


def _torchao_int8(dtype: torch.dtype) -> Any:
    from torchao.quantization import Int8WeightOnlyConfig  # pyright: ignore[reportMissingImports]
    from transformers import TorchAoConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


QUANTISATIONS: dict[str, Quantisation] = {
    "bnb-4bit": Quantisation("bitsandbytes", _bnb_4bit),
    "torchao-int8": Quantisation("torchao", _torchao_int8),
}


def quantisation_config(name: str, dtype: torch.dtype) -> Any:
    """What transformers loads a model with, None for `none`.

    Raises: ModelError for an unknown name, or a package that is not there or does not load.
    """
    where = f"quantization '{name}'"
    if name == NONE:
        return None
    if name not in QUANTISATIONS:
        expected = f"{NONE} or one of {', '.join(QUANTISATIONS)}"
        raise ModelError(where, expected=expected, got=f"'{name}'", fix="Correct the name.")
    quantisation = QUANTISATIONS[name]
    try:
        with quiet_transformers():
            import_module(quantisation.package)
            return quantisation.config(dtype)
    except (ImportError, OSError, RuntimeError) as error:
        expected = f"the package {quantisation.package}"
        fix = "Run pip install 'saekit[quantised]'."
        raise ModelError(where, expected=expected, got=first_line(error), fix=fix) from error
