"""What Hugging Face decoders have in common, and how a family says where its sites are.

A family is an instance: it names the `model_type`s it covers, the paths of two modules, and for each site a `Place`.
The places of the commonest kind of block, with a norm in front of each sub-layer, are here because several families
share them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn


@dataclass(frozen=True)
class Place:
    """Where a site is: what goes into or comes out of one module of a block."""

    path: str
    """Path of the module inside the block; "" is the block itself."""
    side: Literal["input", "output"]
    """Whether the value is the module's first argument or what it returns."""
    item: int = 0
    """Which entry of the output is the value, where the module returns a tuple."""
    shared: bool = False
    """Whether the block itself goes on with the very tensor that it gave to the module.

    An edit is then written into that tensor, so that both the module and the skip connection around it see the edit.
    """
    streams: bool = False
    """Whether the value is [batch, pos, streams, d_model]: it is read as the mean over streams, written to all."""


@dataclass(frozen=True)
class Writer:
    """A linear map of a block whose output a site is, alone or in a sum with those of others."""

    path: str
    """Path inside the block: a linear module, or one whose parameter `down_proj` holds the maps of many experts."""
    is_plain: bool = True
    """Whether its output is in the sum once and as it is on every token, so that its bias is a constant of the site."""


WHOLE_BLOCK = {"resid_pre": Place("", "input"), "resid_post": Place("", "output")}

PRE_NORM = WHOLE_BLOCK | {
    "attn_out": Place("self_attn", "output"),
    "resid_mid": Place("post_attention_layernorm", "input", shared=True),
    "mlp_out": Place("mlp", "output"),
}
"""A block that adds what `self_attn` and then what `mlp` returns; each has a norm in front of it."""

PRE_NORM_WRITERS = {
    "attn_out": (Writer("self_attn.o_proj"), Writer("self_attn.o_b_proj"), Writer("self_attn.dense")),
    "mlp_out": (
        Writer("mlp.down_proj"),
        Writer("mlp.c_proj"),
        Writer("mlp.fc2"),
        Writer("mlp.experts", is_plain=False),
        Writer("mlp.shared_experts.down_proj"),
        Writer("mlp.shared_expert.down_proj", is_plain=False),
    ),
}
"""What writes in such a block, under the names that it has in one model or another; Qwen2-MoE weighs its shared expert
by the token."""


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
    places: Mapping[str, Place]
    """Site -> where it is in each block."""
    writers: Mapping[str, tuple[Writer, ...]] = field(default_factory=dict)
    """Site that is a sum of linear maps -> these, as far as a block has them; none behind a norm."""

    def matches(self, config: Any) -> bool:
        """Whether a Hugging Face config belongs to this family."""
        return getattr(config, "model_type", None) in self.model_types

    def d_model(self, config: Any) -> int:
        """Width of the residual stream."""
        return int(config.hidden_size)

    def n_layers(self, config: Any) -> int:
        """Number of blocks."""
        return int(config.num_hidden_layers)

    def sites(self, config: Any) -> Mapping[str, Place]:
        """The sites that a model of this config has, and where they are in each of its blocks."""
        return self.places

    def block(self, model: nn.Module, layer: int) -> nn.Module:
        """The 0-based block whose input is `resid_pre.layer` and whose output is `resid_post.layer`."""
        return model.get_submodule(f"{self.blocks_path}.{layer}")

    def final_norm(self, model: nn.Module) -> nn.Module:
        """The norm in front of the unembedding."""
        return model.get_submodule(self.final_norm_path)

    def lm_head(self, model: nn.Module) -> nn.Module:
        """The unembedding; its `weight` is [vocab, d_model]. Soft-capping of logits, if any, is not part of it."""
        return model.get_output_embeddings()  # type: ignore[operator]
