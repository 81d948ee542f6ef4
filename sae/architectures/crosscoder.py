"""Crosscoder: one dictionary for several hook points, such as one layer after the other.

Inputs and outputs are the activations of all hook points side by side, each scaled to unit variance on its own, so that
none outweighs the others; a latent has one activation and, in its decoder row, a direction for each hook point. Latents
are selected as in BatchTopK, which avoids the L1 penalty's shrinkage and its spurious exclusive latents; a row's norm
over all hook points is 1. Source: Lindsey et al. 2024, transformer-circuits.pub/2024/crosscoders; Minder et al. 2025,
arXiv:2504.02922.
"""

from typing import ClassVar

from sae.architectures.base import Reads
from sae.architectures.batchtopk import BatchTopK


class Crosscoder(BatchTopK):
    """BatchTopK over several hook points at once."""

    reads: ClassVar[Reads] = "several"
