"""Names of places in and around the residual stream.

`resid_post.12` is the residual stream after 0-based block 12, which is the output of `layers[12]`. A hook point is its
site and its layer; families say where in a model that is. Not every model has every site: only a block that runs MLP
after attention has resid_mid, and only one whose residual stream is several streams has attn_in and mlp_in, which
would else be other names of resid_pre and resid_mid. No framework is imported here.
"""

import re
from collections.abc import Collection
from typing import NamedTuple

from activations.errors import HookPointError

SITES: dict[str, str] = {
    "resid_pre": "the residual stream entering a block",
    "attn_in": "what attention reads of several residual streams, before its norm",
    "attn_out": "what attention adds to the residual stream",
    "resid_mid": "the residual stream between attention and MLP",
    "mlp_in": "what the MLP reads of several residual streams, before its norm",
    "mlp_out": "what the MLP adds to the residual stream",
    "resid_post": "the residual stream leaving a block",
}
"""Site -> what it is, in the order in which a block comes by them."""

_PATTERN = re.compile(r"(?P<site>[a-z_]+)\.(?P<layer>\d+)")


class HookPoint(NamedTuple):
    """One place in or around the residual stream.

    >>> HookPoint.parse("resid_post.12")
    HookPoint(site='resid_post', layer=12)
    >>> str(HookPoint("resid_post", 12))
    'resid_post.12'
    """

    site: str
    layer: int

    @classmethod
    def parse(cls, text: str) -> "HookPoint":
        """Read `SITE.LAYER`; raises HookPointError for anything else."""
        match = _PATTERN.fullmatch(text)
        if match is None or match["site"] not in SITES:
            raise HookPointError(
                f"hook point '{text}'",
                expected=f"SITE.LAYER with SITE one of {', '.join(SITES)}",
                got=f"'{text}'",
                fix="Write for example resid_post.12.",
            )
        return cls(match["site"], int(match["layer"]))

    @property
    def depth(self) -> tuple[int, int]:
        """Sorts hook points in the order in which a model comes by them."""
        return self.layer, list(SITES).index(self.site)

    def check(self, n_layers: int, sites: Collection[str] = SITES) -> "HookPoint":
        """Return self if a model of `n_layers` blocks with these sites has it, else raise HookPointError."""
        if self.site not in sites:
            raise HookPointError(
                f"hook point {self}",
                expected=f"a site that the model has: {', '.join(site for site in SITES if site in sites)}",
                got=self.site,
                fix="Choose one of these.",
            )
        if self.layer >= n_layers:
            raise HookPointError(
                f"hook point {self}",
                expected=f"a layer from 0 to {n_layers - 1}",
                got=self.layer,
                fix="Choose a layer that the model has.",
            )
        return self

    def __str__(self) -> str:
        return f"{self.site}.{self.layer}"
