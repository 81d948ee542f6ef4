"""How a latent of a saved SAE is read, and where; shared by vectors, gates and operations.

Left out: encoding tokens (`sae.torch_view`).
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from activations.errors import MismatchError, UnknownNameError
from activations.hook_points import HookPoint
from sae.artefact import SaeArtefact
from sae.wiring import Wiring


class Places(NamedTuple):
    """The two hook points of an SAE, which differ if it transcodes."""

    reads: HookPoint
    """where its latents are read"""
    writes: HookPoint
    """where its decoder rows belong"""


def places_of(artefact: SaeArtefact) -> Places:
    """Where an SAE is read and steered with. Raises: MismatchError if it reads or writes several hook points."""
    wiring = Wiring.parse(artefact.hook_point)
    for verb, names in (("reads", wiring.reads), ("writes", wiring.writes)):
        if len(names) > 1:
            raise MismatchError(
                f"SAE of {wiring}",
                expected="one hook point that it reads and one that it writes, to steer at",
                got=f"one that {verb} {len(names)}",
                fix="Choose an autoencoder or a transcoder.",
            )
    return Places(HookPoint.parse(wiring.reads[0]), HookPoint.parse(wiring.writes[0]))


class EncoderRow(NamedTuple):
    """How one latent is read: z = s where s = weight·x + bias is above the threshold, else 0."""

    weight: Float[Tensor, " d_model"]
    bias: float
    threshold: float
    """at least 0; a TopK SAE asks besides that s be one of the k largest"""


def encoder_row(artefact: SaeArtefact, latent: int) -> EncoderRow:
    """The encoder of a latent, b_dec folded into its bias. Raises: UnknownNameError if there is no such latent."""
    check_latent(artefact, latent)
    weight = torch.tensor(artefact.W_enc[:, latent])
    bias = float(artefact.b_enc[latent])
    if artefact.apply_b_dec_to_input:
        bias -= float(torch.tensor(artefact.b_dec).double() @ weight.double())
    threshold = 0.0 if artefact.threshold is None else max(0.0, float(artefact.threshold[latent]))
    return EncoderRow(weight, bias, threshold)


def check_latent(artefact: SaeArtefact, latent: int) -> None:
    """Raise UnknownNameError unless the SAE has such a latent."""
    if not 0 <= latent < artefact.d_sae:
        raise UnknownNameError(
            f"latent {latent}", expected=f"0 to {artefact.d_sae - 1}", got=latent, fix="Choose a latent of this SAE."
        )
