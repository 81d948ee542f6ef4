"""Where the sites of the residual stream are, for each kind of model.

A family answers for a Hugging Face causal LM: which module is block L, where in a block each site is, and which norm
and unembedding come behind the last block. Adding one: a file here with a `DecoderFamily` (or anything that satisfies
`ModelFamily`) and a row in FAMILIES; tests/conformance/test_families.py then covers it. Left out: encoder-decoders,
and models whose text part is nested inside a vision model.
"""

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from torch import nn

from activations.errors import ModelError
from activations.families.base import Place, Writer
from activations.families.deepseek_v3 import DEEPSEEK_V3
from activations.families.deepseek_v4 import DEEPSEEK_V4
from activations.families.gemma import GEMMA
from activations.families.gpt2 import GPT2
from activations.families.gpt_neox import GPT_NEOX
from activations.families.llama import LLAMA
from activations.families.moe import MOE
from activations.families.olmo2 import OLMO2
from activations.families.phi import PHI


@runtime_checkable
class ModelFamily(Protocol):
    """What the rest of saekit asks about a model; see `activations/families/base.py` for the shared answers."""

    @property
    def name(self) -> str: ...
    @property
    def model_types(self) -> frozenset[str]: ...
    @property
    def writers(self) -> Mapping[str, tuple[Writer, ...]]: ...
    def matches(self, config: Any) -> bool: ...
    def d_model(self, config: Any) -> int: ...
    def n_layers(self, config: Any) -> int: ...
    def sites(self, config: Any) -> Mapping[str, Place]: ...
    def block(self, model: nn.Module, layer: int) -> nn.Module: ...
    def final_norm(self, model: nn.Module) -> nn.Module: ...
    def lm_head(self, model: nn.Module) -> nn.Module: ...


FAMILIES: dict[str, ModelFamily] = {
    "deepseek_v3": DEEPSEEK_V3,
    "deepseek_v4": DEEPSEEK_V4,
    "gemma": GEMMA,
    "gpt2": GPT2,
    "gpt_neox": GPT_NEOX,
    "llama": LLAMA,
    "moe": MOE,
    "olmo2": OLMO2,
    "phi": PHI,
}


def find_family(model: nn.Module) -> ModelFamily:
    """The family of a Hugging Face causal LM.

    Raises: ModelError if no row of FAMILIES covers its `config.model_type`.
    """
    return family_of_config(getattr(model, "config", None), where=type(model).__name__)


def family_of_config(config: Any, where: str = "model") -> ModelFamily:
    """The family of a Hugging Face config, so that a model can be refused before its weights are read."""
    for family in FAMILIES.values():
        if family.matches(config):
            return family
    known = sorted(kind for family in FAMILIES.values() for kind in family.model_types)
    raise ModelError(
        where,
        expected=f"a model_type among {', '.join(known)}",
        got=f"'{getattr(config, 'model_type', None)}'",
        fix="Add a file in activations/families/ and a row in FAMILIES; docs/extending.md shows how.",
    )
