"""What other projects call a hook point, where their name and ours mean the same tensor in every model.

Left out on purpose: names whose tensor depends on the model, such as the output of the module `mlp`, which a norm may
follow, and places that are no hook point here, such as the normed input of an MLP or the heads of attention.
"""

import re
from collections.abc import Iterable

from activations.errors import ConfigError
from activations.hook_points import HookPoint
from sae.wiring import Wiring

# The hook_attn_in and hook_mlp_in of TransformerLens are something else than the sites of these names here.
TRANSFORMER_LENS = {
    "resid_pre": "hook_resid_pre",
    "attn_in": "attn_hc.hook_out",
    "attn_out": "hook_attn_out",
    "resid_mid": "hook_resid_mid",
    "mlp_in": "mlp_hc.hook_out",
    "mlp_out": "hook_mlp_out",
    "resid_post": "hook_resid_post",
}
"""Site -> its name in `blocks.N.` of TransformerLens, and so of SAELens"""
GEMMA_MODULES = {
    "resid_pre": "input",
    "attn_out": "post_attention_layernorm.output",
    "resid_mid": "pre_feedforward_layernorm.input",
    "mlp_out": "post_feedforward_layernorm.output",
    "resid_post": "output",
}
"""Site -> its module in `model.layers.N.` of Gemma 2 and 3, which norm what a sub-layer adds"""


def to_transformer_lens(point: str) -> str:
    """Raises HookPointError for what is no hook point.

    >>> to_transformer_lens("resid_post.12")
    'blocks.12.hook_resid_post'
    """
    site, layer = HookPoint.parse(point)
    return f"blocks.{layer}.{TRANSFORMER_LENS[site]}"


def from_transformer_lens(name: object) -> str | None:
    """The hook point, or None if there is none of this name."""
    return _from(r"blocks\.(\d{1,4})\.(.+)", TRANSFORMER_LENS, name)


def to_gemma_module(point: str) -> str | None:
    """The path of a module of Gemma with `input` or `output`, or None if it has none there."""
    site, layer = HookPoint.parse(point)
    return f"model.layers.{layer}.{GEMMA_MODULES[site]}" if site in GEMMA_MODULES else None


def from_gemma_module(name: object) -> str | None:
    """The hook point, or None if there is none of this name."""
    return _from(r"model\.layers\.(\d{1,4})\.(.+)", GEMMA_MODULES, name)


def from_block(name: object) -> str | None:
    """`layers.12`, or `h.12` in GPT-2: the output of a block, by its path inside the base model.

    >>> from_block("layers.12"), from_block("layers.12.mlp")
    ('resid_post.12', None)
    """
    match = re.fullmatch(r"(?:layers|h)\.(\d{1,4})", name) if isinstance(name, str) else None
    return f"resid_post.{int(match[1])}" if match else None


def wiring_text(reads: Iterable[str | None], writes: Iterable[str | None] | None = None) -> str | None:
    """The text form of a wiring, or None if a part of it is not known; without `writes`, it writes what it reads.

    >>> wiring_text(["resid_mid.3"], ["mlp_out.3"]), wiring_text(["resid_mid.3"], [None])
    ('resid_mid.3->mlp_out.3', None)
    """
    inputs = list(reads)
    outputs = inputs if writes is None else list(writes)
    known = [[name for name in side if name] for side in (inputs, outputs)]
    if not inputs or not outputs or known != [inputs, outputs]:
        return None
    try:
        return str(Wiring.parse("->".join("+".join(side) for side in known)))
    except ConfigError:
        return None


def _from(pattern: str, table: dict[str, str], name: object) -> str | None:
    match = re.fullmatch(pattern, name) if isinstance(name, str) else None
    sites = {module: site for site, module in table.items()}
    return f"{sites[match[2]]}.{int(match[1])}" if match and match[2] in sites else None
