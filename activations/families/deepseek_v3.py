"""DeepSeek-V2 and V3: latent attention and, behind some dense blocks, experts, in a Llama-shaped block."""

from activations.families.base import PRE_NORM, PRE_NORM_WRITERS, DecoderFamily

DEEPSEEK_V3 = DecoderFamily(
    name="deepseek_v3",
    model_types=frozenset({"deepseek_v2", "deepseek_v3"}),
    blocks_path="model.layers",
    final_norm_path="model.norm",
    places=PRE_NORM,
    writers=PRE_NORM_WRITERS,
)
