"""Llama-shaped decoders: blocks in `model.layers`, then `model.norm`; a norm in front of each sub-layer.

Models that scale what a sub-layer returns before they add it, such as Granite, do not belong here: their `attn_out`
would not be what is added.
"""

from activations.families.base import PRE_NORM, PRE_NORM_WRITERS, DecoderFamily

LLAMA = DecoderFamily(
    name="llama",
    model_types=frozenset(
        {
            "arcee",
            "cwm",
            "ernie4_5",
            "gemma",
            "glm",
            "helium",
            "hunyuan_v1_dense",
            "llama",
            "ministral",
            "ministral3",
            "mistral",
            "nemotron",
            "olmo",
            "phi3",
            "qwen2",
            "qwen3",
            "seed_oss",
            "smollm3",
            "starcoder2",
        }
    ),
    blocks_path="model.layers",
    final_norm_path="model.norm",
    places=PRE_NORM,
    writers=PRE_NORM_WRITERS,
)
