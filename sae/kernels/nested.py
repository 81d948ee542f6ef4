"""Decoding nested dictionaries: the first latents, more latents, and at last all of them.

Latents fall into consecutive groups, and the m-th dictionary has the latents of groups 0..m. So a latent of group m
adds to the reconstructions m, m + 1 and so on, and its gradients are those of plain decoding, where the gradient of the
reconstruction is the sum over these. Triton's programs decode all dictionaries in one pass over the active rows, and
take one pass for each gradient; elsewhere groups are decoded one by one. Left out: b_dec, and the loss.
"""

from functools import partial
from itertools import accumulate, pairwise

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sae.kernels import gpu
from sae.kernels.choice import operand, triton_is_chosen
from sae.kernels.codes import Codes, no_gradient, positive_first, restrict
from sae.kernels.devices import (
    AT_REST,
    BY_BOTH,
    BY_LATENT,
    BY_TOKEN,
    LATENT,
    n_devices,
    on_each,
    share_sum,
    sum_along,
    to_local,
)
from sae.kernels.products import decode

Bounds = tuple[int, ...]
"""0, where each group but the first begins, and d_sae"""


def decode_nested(
    codes: Codes, W_dec: Float[Array, "d_sae d_model"], bounds: Bounds
) -> Float[Array, "batch n_groups d_model"]:
    """For each m, the sum of values[b, s] W_dec[indices[b, s]] over the latents below bounds[m + 1].

    >>> codes = Codes(jnp.array([[2.0, 3.0]]), jnp.array([[2, 0]]))
    >>> decode_nested(codes, jnp.ones((3, 1)), (0, 1, 3)).tolist()
    [[[3.0], [5.0]]]
    """
    if triton_is_chosen():
        return _decode_in_one_pass(bounds, codes, W_dec)
    groups = pairwise(bounds)
    if n_devices() > 1:  # which lie with all of them, each group's latents and their slots
        within = (on_each(partial(_within, *group), (BY_BOTH,), BY_BOTH)(codes) for group in groups)
        added = [decode(part, W_dec) for part in within]
    else:
        added = [decode(restrict(codes, start, stop), W_dec[start:stop]) for start, stop in groups]
    return jnp.stack(list(accumulate(added)), axis=1)


def _within(start: int, stop: int, codes: Codes) -> Codes:
    inside = (codes.indices >= start) & (codes.indices < stop)
    return positive_first(codes._replace(values=jnp.where(inside, codes.values, 0)))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _decode_in_one_pass(bounds: Bounds, codes: Codes, W_dec: Array) -> Array:
    here = partial(_decode_here, len(bounds) - 1)
    return on_each(here, (BY_BOTH, BY_LATENT, BY_LATENT), BY_TOKEN)(codes, operand(W_dec), _group_of_each(bounds))


def _decode_here(n_groups: int, codes: Codes, W: Array, groups: Array) -> Array:
    return sum_along(LATENT, gpu.sum_nested_rows(to_local(codes, len(W)), W, groups, n_groups=n_groups))


def _forward(bounds: Bounds, codes: Codes, W_dec: Array) -> tuple[Array, tuple[Codes, Array]]:
    return _decode_in_one_pass(bounds, codes, W_dec), (codes, W_dec)


def _backward(bounds: Bounds, saved: tuple[Codes, Array], g: Array) -> tuple[Codes, Array]:
    (codes, W_dec), groups = saved, _group_of_each(bounds)
    from_largest = accumulate(g[:, m] for m in reversed(range(g.shape[1])))
    to_groups = operand(jnp.stack(list(from_largest)[::-1], axis=1))
    split = (BY_BOTH, BY_LATENT, BY_TOKEN, BY_LATENT)
    to_values, to_W_dec = on_each(_gradients_here, split, (BY_BOTH, AT_REST))(codes, operand(W_dec), to_groups, groups)
    return Codes(to_values, no_gradient(codes.indices)), to_W_dec


def _gradients_here(codes: Codes, W: Array, g: Array, groups: Array) -> tuple[Array, Array]:
    codes = to_local(codes, len(W))
    to_W, _ = gpu.sum_by_latent(codes, codes.values, g, groups, d_sae=len(W))
    return gpu.dot_active_rows(codes, W, g, groups), share_sum(to_W)


_decode_in_one_pass.defvjp(_forward, _backward)


def _group_of_each(bounds: Bounds) -> Int[Array, " d_sae"]:
    return jnp.asarray(np.repeat(np.arange(len(bounds) - 1, dtype=np.int32), np.diff(bounds)))
