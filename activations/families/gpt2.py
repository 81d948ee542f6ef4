"""GPT-2: blocks in `transformer.h`, then `transformer.ln_f`."""

from activations.families.base import DecoderFamily

GPT2 = DecoderFamily(
    name="gpt2",
    model_types=frozenset({"gpt2"}),
    blocks_path="transformer.h",
    final_norm_path="transformer.ln_f",
)
