"""Which hook points an SAE reads and which it writes, as one line of text.

    resid_post.12                   a sparse autoencoder: reads and writes one
    resid_mid.12->mlp_out.12        a transcoder: reads one, writes another
    resid_post.10+resid_post.12     a crosscoder: reads and writes several at once, side by side

Left out: what an architecture makes of it.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from activations.errors import ConfigError
from activations.hook_points import HookPoint

FIX = "Write SITE.LAYER, A->B for a transcoder, or A+B for a crosscoder."


class Wiring(NamedTuple):
    """Hook points by what an SAE does with them."""

    reads: tuple[str, ...]
    """its input, concatenated in this order"""
    writes: tuple[str, ...]
    """what it reconstructs; equal to `reads` unless it transcodes"""

    @classmethod
    def parse(cls, text: str) -> "Wiring":
        """Read the text form; raises HookPointError for a part that is no hook point, ConfigError for other mistakes.

        >>> Wiring.parse("resid_mid.3->mlp_out.3").writes
        ('mlp_out.3',)
        """
        sides = [tuple(part.strip() for part in side.split("+")) for side in text.split("->")]
        if len(sides) > 2:
            raise ConfigError(f"hook point '{text}'", expected="at most one arrow", got=len(sides) - 1, fix=FIX)
        for name in (name for side in sides for name in side):
            HookPoint.parse(name)
        for side in sides:
            if len(set(side)) < len(side):
                raise ConfigError(f"hook point '{text}'", expected="different hook points", got="a repeat", fix=FIX)
        return cls(sides[0], sides[-1])

    @property
    def transcodes(self) -> bool:
        """Whether it writes something else than it reads."""
        return self.reads != self.writes

    @property
    def hook_points(self) -> tuple[str, ...]:
        """All of them, once each."""
        return tuple(dict.fromkeys(self.reads + self.writes))

    @property
    def file_name(self) -> str:
        """The text form in characters that no shell minds."""
        return str(self).replace("->", "-to-")

    def __str__(self) -> str:
        """The text form."""
        reads = "+".join(self.reads)
        return f"{reads}->{'+'.join(self.writes)}" if self.transcodes else reads


def side_by_side(
    activations: Mapping[str, Float[np.ndarray, "*token d_model"]], names: tuple[str, ...]
) -> Float[np.ndarray, "*token d"]:
    """Activations of several hook points, concatenated along the last axis; of one, as they are."""
    return activations[names[0]] if len(names) == 1 else np.concatenate([activations[name] for name in names], axis=-1)
