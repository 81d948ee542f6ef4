"""OLMo 2 and its like: no norm in front of a sub-layer, one behind it, so that what is added has been normed."""

from activations.families.base import WHOLE_BLOCK, DecoderFamily, Place

OLMO2 = DecoderFamily(
    name="olmo2",
    model_types=frozenset({"exaone4", "flex_olmo", "olmo2", "olmo3"}),
    blocks_path="model.layers",
    final_norm_path="model.norm",
    places=WHOLE_BLOCK
    | {
        "attn_out": Place("post_attention_layernorm", "output"),
        "resid_mid": Place("mlp", "input", shared=True),
        "mlp_out": Place("post_feedforward_layernorm", "output"),
    },
)
