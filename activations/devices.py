"""Tensors on their way to a device; left out: which device that is (`activations.models`)."""

import torch
from torch import Tensor


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """The same there. Pinned on the way to a GPU: a copy from other memory waits for all that was asked before."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
