"""GPT-NeoX, which is also Pythia: blocks in `gpt_neox.layers`, then `gpt_neox.final_layer_norm`.

With `use_parallel_residual`, as most of them have it, attention and MLP read the same residual stream, and there is
no resid_mid.
"""

from collections.abc import Mapping
from typing import Any

from activations.families.base import WHOLE_BLOCK, DecoderFamily, Place, Writer


class _GPTNeoX(DecoderFamily):
    def sites(self, config: Any) -> Mapping[str, Place]:
        sequential = {"resid_mid": Place("post_attention_layernorm", "input", shared=True)}
        return self.places if config.use_parallel_residual else {**self.places, **sequential}


GPT_NEOX = _GPTNeoX(
    name="gpt_neox",
    model_types=frozenset({"gpt_neox"}),
    blocks_path="gpt_neox.layers",
    final_norm_path="gpt_neox.final_layer_norm",
    places=WHOLE_BLOCK | {"attn_out": Place("attention", "output"), "mlp_out": Place("mlp", "output")},
    writers={"attn_out": (Writer("attention.dense"),), "mlp_out": (Writer("mlp.dense_4h_to_h"),)},
)
