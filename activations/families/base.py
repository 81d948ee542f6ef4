"""What Hugging Face decoders have in common, as one frozen dataclass.

A family is an instance: it names the `model_type`s it covers and the paths of three modules. Reading and writing the
residual stream is the same for all of them, because a block returns its residual stream as a tensor or, in some
versions of transformers, as the first entry of a tuple.
"""

from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn


@dataclass(frozen=True)
class DecoderFamily:
    """A decoder whose blocks each take the residual stream and return it changed."""

    name: str
    """Key of the row in FAMILIES."""
    model_types: frozenset[str]
    """Values of `config.model_type` this family covers."""
    blocks_path: str
    """Path of the list of blocks inside the causal LM, such as `model.layers`."""
    final_norm_path: str
    """Path of the norm between the last block and the unembedding."""

    def matches(self, config: Any) -> bool:
        """Whether a Hugging Face config belongs to this family."""
        return getattr(config, "model_type", None) in self.model_types

    def d_model(self, config: Any) -> int:
        """Width of the residual stream."""
        return int(config.hidden_size)

    def n_layers(self, config: Any) -> int:
        """Number of blocks."""
        return int(config.num_hidden_layers)

    def block(self, model: nn.Module, layer: int) -> nn.Module:
        """The 0-based block whose input is `resid_pre.layer` and whose output is `resid_post.layer`."""
        return model.get_submodule(f"{self.blocks_path}.{layer}")

    def final_norm(self, model: nn.Module) -> nn.Module:
        """The norm that the residual stream passes before the unembedding."""
        return model.get_submodule(self.final_norm_path)

    def lm_head(self, model: nn.Module) -> nn.Module:
        """The unembedding; its `weight` is [vocab, d_model]. Soft-capping of logits, if any, is not part of it."""
        return model.get_output_embeddings()  # type: ignore[operator]

    def get_resid(self, output: Any) -> Float[Tensor, "batch pos d_model"]:
        """The residual stream in what a block returned."""
        return output[0] if isinstance(output, tuple) else output

    def set_resid(self, output: Any, resid: Float[Tensor, "batch pos d_model"]) -> Any:
        """What a block returned, with its residual stream replaced."""
        return (resid, *output[1:]) if isinstance(output, tuple) else resid
