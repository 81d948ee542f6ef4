"""Llama-shaped decoders: blocks in `model.layers`, then `model.norm`."""

from activations.families.base import DecoderFamily

LLAMA = DecoderFamily(
    name="llama",
    model_types=frozenset(
        {
            "gemma",
            "gemma2",
            "gemma3_text",
            "llama",
            "mistral",
            "olmo",
            "olmo2",
            "olmo3",
            "phi3",
            "qwen2",
            "qwen3",
            "smollm3",
            "starcoder2",
        }
    ),
    blocks_path="model.layers",
    final_norm_path="model.norm",
)
