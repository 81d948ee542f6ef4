"""Random numbers that belong to places of a text, so that a sample does not depend on the order it is drawn in.

Keeping the n entries of smallest priority is a uniform sample without replacement (a bottom-k sample; Cohen & Kaplan
2007, doi:10.1145/1281100.1281133), and samples of two texts, merged, are the sample of both: the priority of an entry
is a hash of what it is. The hash is the finaliser of splitmix64 (Steele et al. 2014, doi:10.1145/2660193.2660195) in
int64 arithmetic that wraps, the same on every device.
"""

import torch
from jaxtyping import Int
from torch import Tensor

LARGEST = 2**63 - 1
"""a priority that no place has, but for one in 2^63"""
_PLACES = 1 << 24
"""places that a sequence has at most"""


def _signed(bits: int) -> int:
    return bits - (1 << 64) if bits >> 63 else bits


_STEP, _FIRST, _SECOND = (_signed(bits) for bits in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def mix(x: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
    """Scatter int64 evenly over all int64, one to one."""
    x = x + _STEP
    x = (x ^ _shifted(x, 30)) * _FIRST
    x = (x ^ _shifted(x, 27)) * _SECOND
    return x ^ _shifted(x, 31)


def of_places(source: int, sequence: Int[Tensor, " n"], position: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
    """Priorities in 0..LARGEST of tokens; `source` is an int64 that stands for the text and the seed."""
    start = mix(torch.full_like(sequence, source))
    return mix(mix(start + sequence * _PLACES + position)) & LARGEST


def of_entries(places: Int[Tensor, " n"], latent: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
    """Priorities in 0..LARGEST of latents at places with these priorities."""
    return mix(places + latent) & LARGEST


def _shifted(x: Int[Tensor, " n"], bits: int) -> Int[Tensor, " n"]:
    return (x >> bits) & ((1 << (64 - bits)) - 1)
