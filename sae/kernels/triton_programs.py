"""Triton programs for sparse latents on a GPU; `sae.kernels.triton` calls them from JAX.

    keep_largest     dense pre-activations -> the k largest of each row       one program a few tokens
    keep_above       candidates -> those at or above a cutoff, moved forward  one program a few tokens
    sum_active_rows  values, indices -> sum_s values[s] W[indices[s]]         one program a token and block of columns
    sum_nested_rows  the same for each of several nested ranges of latents    one program a token and block of columns
    dot_active_rows  indices, g -> W[indices[s]] . g                          one program a token and block of slots
    count_slots      indices -> number of slots of each latent                one program a block of slots
    sum_by_latent    slots sorted by latent -> sum of weighted rows of each   one program a latent and block of columns
    descend          a step of Adam, on the sphere for unit rows              one program a row

Sums are in float32 and in a fixed order, so that a step gives the same bits each time. Floats at or above 0 order like
their bits, so selection works on bits: it is exact, and NaN counts as largest, so that it is selected and seen rather
than lost. Which of equal values is kept is fixed, but not always the one of the lowest index, as in `lax.top_k`. Left
out: JAX.
"""

import triton
import triton.language as tl

# Triton's own annotations take a block for a number.
# pyright: reportArgumentType=false, reportOperatorIssue=false


@triton.jit
def _bits(values):
    """Integers that order like the values, where those are at or above 0; below 0 for values below 0."""
    return values.to(tl.float32).to(tl.int32, bitcast=True)


@triton.jit
def _largest(bits, k):
    """Which k of each row of a block of integers are largest; only those above 0, and the first of equal ones.

    The k-th largest is the largest integer that k of them reach, found by bisection, which ends as soon as just k reach
    some integer: where few are equal, after half of the 31 rounds.
    """
    low = tl.zeros_like(tl.max(bits, axis=1))
    high = tl.max(bits, axis=1) + 1
    while tl.max(high - low, axis=0) > 1:
        middle = low + (high - low) // 2
        n = tl.sum((bits >= middle[:, None]).to(tl.int32), axis=1)
        low = tl.where(n >= k, middle, low)
        high = tl.where(n > k, high, middle + (n == k).to(tl.int32))
    above = bits > low[:, None]
    equal = (bits == low[:, None]).to(tl.int32)
    n_above = tl.sum(above.to(tl.int32), axis=1)
    return (above | ((equal > 0) & (n_above[:, None] + tl.cumsum(equal, axis=1) <= k))) & (bits > 0)


@triton.jit
def keep_largest(
    products,  # [BATCH, D_SAE] float16 or float32
    b,  # [n_saes, D_SAE] float32, added to each row of an SAE
    k_pointer,  # [n_saes] int32: how many a row, at most SLOTS
    threshold_pointer,  # [n_saes] float32
    values,  # [BATCH, SLOTS] float32, out: the k largest that are above 0, in any order; the rest 0
    indices,  # [BATCH, SLOTS] int32, out: their latents; D_SAE where a slot is unused
    n_passing,  # [BATCH] int32, out: how many of the row are above the threshold
    classes,  # [BATCH, PADDED] int32, scratch
    BATCH: tl.constexpr,
    D_SAE: tl.constexpr,
    SLOTS: tl.constexpr,
    PADDED: tl.constexpr,  # SLOTS, rounded up to a power of 2
    CHUNK: tl.constexpr,  # at least PADDED
    DEPTH: tl.constexpr,  # D_SAE / CHUNK, rounded up to a power of 2
    ROWS: tl.constexpr,  # must divide ROWS_A_SAE
    ROWS_A_SAE: tl.constexpr,
):
    """Read each row once, and then what may be among its largest.

    The row falls into CHUNK classes of columns. The k classes with the largest maxima hold k values that reach the
    least of these maxima, and no other class holds a larger one: so their k largest are the k largest of the row.
    """
    tokens = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    exists = tokens < BATCH
    rows = products + tokens.to(tl.int64)[:, None] * D_SAE
    sae = tl.program_id(0) * ROWS // ROWS_A_SAE
    b += sae * D_SAE
    k = tl.load(k_pointer + sae)
    threshold = tl.load(threshold_pointer + sae)
    columns = tl.arange(0, CHUNK)
    maxima = tl.zeros((ROWS, CHUNK), tl.int32)
    passing = tl.zeros((ROWS, CHUNK), tl.int32)
    for start in range(0, D_SAE, CHUNK):
        inside = start + columns < D_SAE
        bias = tl.load(b + start + columns, mask=inside, other=0.0)
        here = tl.load(rows + (start + columns)[None, :], mask=exists[:, None] & inside[None, :], other=-1.0)
        here = here.to(tl.float32) + bias[None, :]
        passing += (here > threshold).to(tl.int32)
        maxima = tl.maximum(maxima, _bits(here))
    tl.store(n_passing + tokens, tl.sum(passing, axis=1), mask=exists)
    chosen = _largest(maxima, k)
    place = tokens[:, None] * PADDED + tl.cumsum(chosen.to(tl.int32), axis=1) - 1
    tl.store(classes + place, tl.broadcast_to(columns[None, :], (ROWS, CHUNK)), mask=chosen & exists[:, None])
    n_classes = tl.sum(chosen.to(tl.int32), axis=1)
    tl.debug_barrier()
    members = tl.arange(0, PADDED * DEPTH)
    known = exists[:, None] & ((members // DEPTH)[None, :] < n_classes[:, None])
    of_class = tl.load(classes + tokens[:, None] * PADDED + (members // DEPTH)[None, :], mask=known, other=0)
    latents = of_class + (members % DEPTH)[None, :] * CHUNK
    known &= latents < D_SAE
    candidates = tl.load(rows + latents, mask=known, other=-1.0).to(tl.float32)
    if products.dtype.element_ty == tl.float16:
        candidates = tl.where(candidates == float("inf"), 65504.0, candidates)  # no product is infinite, but some large
    candidates += tl.load(b + latents, mask=known, other=0.0)
    chosen = _largest(_bits(candidates), k)
    _store_codes(values, indices, tokens, exists, candidates, latents, chosen, D_SAE, SLOTS, PADDED)


@triton.jit
def _store_codes(
    values, indices, tokens, exists, candidates, latents, chosen,
    D_SAE: tl.constexpr, SLOTS: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """Write what was chosen, in order, and clear the slots behind it."""
    place = tokens[:, None] * SLOTS + tl.cumsum(chosen.to(tl.int32), axis=1) - 1
    tl.store(values + place, candidates, mask=chosen & exists[:, None])
    tl.store(indices + place, latents, mask=chosen & exists[:, None])
    slots = tl.arange(0, PADDED)[None, :]
    unused = (slots >= tl.sum(chosen.to(tl.int32), axis=1)[:, None]) & (slots < SLOTS) & exists[:, None]
    rest = tokens[:, None] * SLOTS + slots
    tl.store(values + rest, tl.zeros_like(rest).to(tl.float32), mask=unused)
    tl.store(indices + rest, tl.full(rest.shape, D_SAE, tl.int32), mask=unused)


@triton.jit
def keep_above(
    candidates,  # [BATCH, SLOTS] float32
    latents,  # [BATCH, SLOTS] int32
    cutoff_pointer,  # [n_saes] float32
    values,  # [BATCH, SLOTS] float32, out: what reaches the cutoff, first; the rest 0
    indices,  # [BATCH, SLOTS] int32, out
    BATCH: tl.constexpr,
    D_SAE: tl.constexpr,
    SLOTS: tl.constexpr,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    ROWS_A_SAE: tl.constexpr,
):
    """Keep what reaches the cutoff and is above 0, in the order it had."""
    tokens = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    exists = tokens < BATCH
    slots = tl.arange(0, PADDED)[None, :]
    known = exists[:, None] & (slots < SLOTS)
    here = tl.load(candidates + tokens[:, None] * SLOTS + slots, mask=known, other=0.0)
    which = tl.load(latents + tokens[:, None] * SLOTS + slots, mask=known, other=0)
    cutoffs = tl.load(cutoff_pointer + tokens // ROWS_A_SAE, mask=exists, other=0.0)
    chosen = (_bits(here) >= _bits(cutoffs)[:, None]) & (_bits(here) > 0)
    _store_codes(values, indices, tokens, exists, here, which, chosen, D_SAE, SLOTS, PADDED)


@triton.jit
def sum_active_rows(
    values,  # [batch, SLOTS] float32
    indices,  # [batch, SLOTS] int32
    n_active,  # [batch] int32: slots in use, which come first
    W,  # [D_SAE, D] bfloat16 or float32
    out,  # [batch, D] float32, out
    D: tl.constexpr,
    SLOTS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """sum_s values[b, s] W[indices[b, s]]."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < D
    total = tl.zeros((COLUMNS,), tl.float32)
    for slot in range(tl.load(n_active + token)):
        value = tl.load(values + token * SLOTS + slot)
        latent = tl.load(indices + token * SLOTS + slot).to(tl.int64)
        total += value * tl.load(W + latent * D + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + token * D + columns, total, mask=inside)


@triton.jit
def sum_nested_rows(
    values,  # [batch, SLOTS] float32
    indices,  # [batch, SLOTS] int32
    n_active,  # [batch] int32
    groups,  # [D_SAE] int32: group of each latent
    W,  # [D_SAE, D] bfloat16 or float32
    out,  # [batch, GROUPS, D] float32, out
    D: tl.constexpr,
    SLOTS: tl.constexpr,
    GROUPS: tl.constexpr,
    SMALLER: tl.constexpr,  # GROUPS - 1, rounded up to a power of 2
    COLUMNS: tl.constexpr,
):
    """For each group m, sum_s values[b, s] W[indices[b, s]] over the latents of groups 0..m.

    The sum over all groups has a block of its own: the default five groups then fill blocks of 4 + 1 rows, not of 8.
    """
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = columns < D
    members = tl.arange(0, SMALLER)[:, None]
    n = tl.load(n_active + token)
    total = tl.zeros((1, COLUMNS), tl.float32)
    smaller = tl.zeros((SMALLER, COLUMNS), tl.float32)
    values += token * SLOTS
    indices += token * SLOTS
    value, group, row = _active_row(values, indices, groups, W + columns, inside, n > 0, D)
    for slot in range(1, n + 1):  # reads one slot ahead, or each addition would wait for its row
        following = _active_row(values + slot, indices + slot, groups, W + columns, inside, slot < n, D)
        total += value * row.to(tl.float32)
        smaller += tl.where(members >= group, value, 0.0) * row.to(tl.float32)
        value, group, row = following
    places = out + token * GROUPS * D + columns
    tl.store(places + members * D, smaller, mask=(members < GROUPS - 1) & inside)
    tl.store(places + (GROUPS - 1) * D, total, mask=inside)


@triton.jit
def _active_row(value, index, groups, W, inside, used, D: tl.constexpr):
    """Of a slot: its value, and the group and the row of its latent; something else where it is not used."""
    latent = tl.load(index, mask=used, other=0).to(tl.int64)
    value = tl.load(value, mask=used, other=0.0)
    return value, tl.load(groups + latent), tl.load(W + latent * D, mask=inside, other=0.0)


@triton.jit
def dot_active_rows(
    indices,  # [batch, SLOTS] int32
    n_active,  # [batch] int32
    groups,  # [D_SAE] int32: group of each latent; not read for one group
    W,  # [D_SAE, D] bfloat16 or float32
    g,  # [batch, GROUPS, D] float32 or bfloat16
    out,  # [batch, SLOTS] float32, out; 0 where a slot is unused
    D: tl.constexpr,
    SLOTS: tl.constexpr,
    GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """W[indices[b, s]] . g[b, group of the latent]."""
    token = tl.program_id(0).to(tl.int64)
    slots = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    used = slots < tl.load(n_active + token)
    latents = tl.load(indices + token * SLOTS + slots, mask=used, other=0).to(tl.int64)
    row = token if GROUPS == 1 else token * GROUPS + tl.load(groups + latents, mask=used, other=0)
    columns = tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    if tl.program_id(1) * ROWS < tl.load(n_active + token):
        for start in range(0, D, COLUMNS):
            inside = start + columns < D
            if GROUPS == 1:
                part = tl.load(g + row * D + start + columns, mask=inside, other=0.0).to(tl.float32)
            else:
                places = g + row[:, None] * D + (start + columns)[None, :]
                part = tl.load(places, mask=used[:, None] & inside[None, :], other=0.0).to(tl.float32)
            places = W + latents[:, None] * D + (start + columns)[None, :]
            rows = tl.load(places, mask=used[:, None] & inside[None, :], other=0.0).to(tl.float32)
            total += rows * (part[None, :] if GROUPS == 1 else part)
    tl.store(out + token * SLOTS + slots, tl.sum(total, axis=1), mask=slots < SLOTS)


@triton.jit
def count_slots(
    indices,  # [N] int32
    counts,  # [D_SAE] int32, in and out: starts at 0
    N: tl.constexpr,
    D_SAE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """How many slots hold each latent; indices out of range are left out."""
    slots = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    latents = tl.load(indices + slots, mask=slots < N, other=D_SAE)
    tl.atomic_add(counts + latents, tl.full((BLOCK,), 1, tl.int32), mask=latents < D_SAE)


@triton.jit
def sum_by_latent(
    first,  # [D_SAE + 1] int32: where the slots of each latent begin among the sorted ones
    order,  # [N] int32: slots sorted by latent
    weights,  # [N] float32: of each slot
    groups,  # [D_SAE] int32: group of each latent; not read for one group
    rows,  # [batch, GROUPS, D] bfloat16 or float32
    out,  # [D_SAE, D] float32, out
    totals,  # [D_SAE] float32, out: sum of the weights
    D: tl.constexpr,
    SLOTS: tl.constexpr,  # slots a token
    GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """sum_i weights[order[i]] rows[order[i] // SLOTS, group of the latent] over the slots of a latent."""
    latent = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < D
    start = tl.load(first + latent)
    stop = tl.load(first + latent + 1)
    group = 0 if GROUPS == 1 else tl.load(groups + latent)
    lanes = tl.arange(0, ROWS)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    weight_total = tl.zeros((ROWS,), tl.float32)
    for at in range(start, stop, ROWS):
        used = at + lanes < stop
        slots = tl.load(order + at + lanes, mask=used, other=0)
        weight = tl.load(weights + slots, mask=used, other=0.0)
        row = (slots // SLOTS).to(tl.int64) * GROUPS + group
        part = tl.load(rows + row[:, None] * D + columns[None, :], mask=used[:, None] & inside[None, :], other=0.0)
        total += weight[:, None] * part.to(tl.float32)
        weight_total += weight
    tl.store(out + latent * D + columns, tl.sum(total, axis=0), mask=inside)
    if tl.program_id(1) == 0:
        tl.store(totals + latent, tl.sum(weight_total, axis=0))


@triton.jit
def descend(
    W,  # [ROWS, D] float32
    g,  # [ROWS, D] float32: gradient
    mean,  # [ROWS, D] float32: Adam's mean of gradients
    square,  # [ROWS, D] float32: Adam's mean of squared gradients
    scalars,  # [n_saes, 5] float32: scale of the gradient, beta1, beta2, rate / (1 - beta1^t), 1 / (1 - beta2^t)
    new_W,  # out, each in the place of its input
    new_mean,
    new_square,
    D: tl.constexpr,
    PADDED: tl.constexpr,  # D, rounded up to a power of 2
    ON_SPHERE: tl.constexpr,
    ROWS_A_SAE: tl.constexpr,
):
    """As `sae.kernels.descent.descend`."""
    row = tl.program_id(0).to(tl.int64) * D
    scalars += tl.program_id(0) // ROWS_A_SAE * 5
    columns = tl.arange(0, PADDED)
    inside = columns < D
    scale = tl.load(scalars)
    beta1 = tl.load(scalars + 1)
    beta2 = tl.load(scalars + 2)
    rate = tl.load(scalars + 3)
    correction = tl.load(scalars + 4)
    weight = tl.load(W + row + columns, mask=inside, other=0.0)
    gradient = tl.load(g + row + columns, mask=inside, other=0.0)
    if ON_SPHERE:
        gradient -= tl.sum(gradient * weight, axis=0) * weight
    gradient *= scale
    first = beta1 * tl.load(mean + row + columns, mask=inside, other=0.0) + (1 - beta1) * gradient
    second = beta2 * tl.load(square + row + columns, mask=inside, other=0.0) + (1 - beta2) * gradient * gradient
    weight -= rate * first / (tl.sqrt(second * correction) + 1e-8)
    if ON_SPHERE:
        weight /= tl.maximum(tl.sqrt(tl.sum(weight * weight, axis=0)), 1e-12)
    tl.store(new_W + row + columns, weight, mask=inside)
    tl.store(new_mean + row + columns, first, mask=inside)
    tl.store(new_square + row + columns, second, mask=inside)
