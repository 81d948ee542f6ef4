"""Names of places in the residual stream.

`resid_post.12` is the residual stream after 0-based block 12, which is the output of `layers[12]`. A hook point is its
site and its layer; families say where in a model that is. No framework is imported here.
"""

import re
from typing import NamedTuple

from activations.errors import HookPointError

SITES: dict[str, str] = {
    "resid_pre": "the residual stream entering a block",
    "resid_post": "the residual stream leaving a block",
}

_PATTERN = re.compile(r"(?P<site>[a-z_]+)\.(?P<layer>\d+)")


class HookPoint(NamedTuple):
    """One place in the residual stream.

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

    def check(self, n_layers: int) -> "HookPoint":
        """Return self if a model of `n_layers` blocks has this layer, else raise HookPointError."""
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
