"""Linear algebra on latents: a few active ones a token, kept as values and indices, or all of them.

With k of d_sae latents active, decoding and every gradient touch k rows of a matrix instead of d_sae. Flow of a step:
1. `largest` chooses the active latents of each token; 2. `attach` gives their values a gradient; 3. `decode` sums their
decoder rows; 4. `descend` moves the weights.

    codes.py            Codes, the sparse form, and its dense form
    selection.py        largest, keep_above, kth_largest
    products.py         decode, attach, sum_rows, count_active, with hand-written gradients
    dense.py            project, reconstruct, stored_product, where any number of latents may be active
    nested.py           decode_nested, the same for nested dictionaries
    descent.py          descend, Adam for matrices whose rows may be unit vectors
    choice.py           which of the ways below a step takes
    devices.py          which device keeps which latents and computes which tokens
    gpu.py              Triton's programs as functions of JAX arrays
    triton_programs.py  the programs

Each function has a way that runs everywhere and, where that pays, one for a CPU and one for an NVIDIA GPU; tests prove
them equal. Left out: which latents an architecture selects.
"""

from sae.kernels.choice import LOW, Kernels, using, why_not_triton
from sae.kernels.codes import Codes, densify
from sae.kernels.dense import project, reconstruct, stored_product
from sae.kernels.descent import Rates, descend, project_gradient, squared_norm, unit_rows
from sae.kernels.nested import decode_nested
from sae.kernels.products import attach, count_active, decode, sum_rows, total
from sae.kernels.selection import keep_above, kth_largest, largest

__all__ = [
    "LOW",
    "Codes",
    "Kernels",
    "Rates",
    "attach",
    "count_active",
    "decode",
    "decode_nested",
    "densify",
    "descend",
    "keep_above",
    "kth_largest",
    "largest",
    "project",
    "project_gradient",
    "reconstruct",
    "squared_norm",
    "stored_product",
    "sum_rows",
    "total",
    "unit_rows",
    "using",
    "why_not_triton",
]
