"""DeepSeek-V4, whose residual stream is `hc_mult` streams side by side (manifold-constrained hyper-connections).

    post, comb, collapsed = hc(streams)              collapsed [batch, pos, d_model] is what the sub-layer reads
    out = sublayer(norm(collapsed))
    streams <- post * out + combᵀ @ streams          post [.., streams], comb [.., streams, streams]

twice a block, with `attn_hc` around attention and `ffn_hc` around the experts. The columns of comb sum to 1, so what
is added to every stream alike is carried on unchanged: this is what an edit of resid_pre, resid_mid and resid_post
does, and it moves their mean by just as much. An edit of attn_out or mlp_out moves stream j by post_j times as much.

Behind the last block `model.hc_head` collapses the streams, and `model.norm` reads its output, not the mean.
"""

from activations.families.base import PRE_NORM_WRITERS, DecoderFamily, Place

DEEPSEEK_V4 = DecoderFamily(
    name="deepseek_v4",
    model_types=frozenset({"deepseek_v4"}),
    blocks_path="model.layers",
    final_norm_path="model.norm",
    places={
        "resid_pre": Place("", "input", streams=True),
        "attn_in": Place("attn_hc", "output", item=2),
        "attn_out": Place("self_attn", "output"),
        "resid_mid": Place("ffn_hc", "input", shared=True, streams=True),
        "mlp_in": Place("ffn_hc", "output", item=2),
        "mlp_out": Place("mlp", "output"),
        "resid_post": Place("", "output", streams=True),
    },
    writers=PRE_NORM_WRITERS,
)
