"""Mixtures of experts in a Llama-shaped block: what the experts add together, routing included, is mlp_out.

Left out: single experts and the router.
"""

from activations.families.base import PRE_NORM, PRE_NORM_WRITERS, DecoderFamily

MOE = DecoderFamily(
    name="moe",
    model_types=frozenset(
        {"dots1", "ernie4_5_moe", "glm4_moe", "gpt_oss", "mixtral", "olmoe", "qwen2_moe", "qwen3_moe"}
    ),
    blocks_path="model.layers",
    final_norm_path="model.norm",
    places=PRE_NORM,
    writers=PRE_NORM_WRITERS,
)
