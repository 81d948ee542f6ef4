"""Gemma 2 and the text models of Gemma 3: norms on both sides of each sub-layer. Gemma 1 is Llama-shaped."""

from activations.families.base import WHOLE_BLOCK, DecoderFamily, Place

GEMMA = DecoderFamily(
    name="gemma",
    model_types=frozenset({"gemma2", "gemma3_text"}),
    blocks_path="model.layers",
    final_norm_path="model.norm",
    places=WHOLE_BLOCK
    | {
        "attn_out": Place("post_attention_layernorm", "output"),
        "resid_mid": Place("pre_feedforward_layernorm", "input", shared=True),
        "mlp_out": Place("post_feedforward_layernorm", "output"),
    },
)
