"""GPT-2: blocks in `transformer.h`, then `transformer.ln_f`."""

from activations.families.base import WHOLE_BLOCK, DecoderFamily, Place, Writer

GPT2 = DecoderFamily(
    name="gpt2",
    model_types=frozenset({"gpt2"}),
    blocks_path="transformer.h",
    final_norm_path="transformer.ln_f",
    places=WHOLE_BLOCK
    | {
        "attn_out": Place("attn", "output"),
        "resid_mid": Place("ln_2", "input", shared=True),
        "mlp_out": Place("mlp", "output"),
    },
    writers={"attn_out": (Writer("attn.c_proj"),), "mlp_out": (Writer("mlp.c_proj"),)},
)
