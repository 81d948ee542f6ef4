"""Phi-1 and Phi-2: attention and MLP read the same residual stream, so there is no resid_mid. Phi-3 is Llama-shaped."""

from activations.families.base import PRE_NORM_WRITERS, WHOLE_BLOCK, DecoderFamily, Place

PHI = DecoderFamily(
    name="phi",
    model_types=frozenset({"phi"}),
    blocks_path="model.layers",
    final_norm_path="model.final_layernorm",
    places=WHOLE_BLOCK | {"attn_out": Place("self_attn", "output"), "mlp_out": Place("mlp", "output")},
    writers=PRE_NORM_WRITERS,
)
