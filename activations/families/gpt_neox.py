"""GPT-NeoX, which is also Pythia: blocks in `gpt_neox.layers`, then `gpt_neox.final_layer_norm`."""

from activations.families.base import DecoderFamily

GPT_NEOX = DecoderFamily(
    name="gpt_neox",
    model_types=frozenset({"gpt_neox"}),
    blocks_path="gpt_neox.layers",
    final_norm_path="gpt_neox.final_layer_norm",
)
