"""Which of the ways to compute sparse products and selections a step takes, and on how many devices.

`xla` runs everywhere: row by row on a CPU, in dense products on accelerators. `triton` takes the programs of
sae/kernels/triton_programs.py, on an NVIDIA GPU where jax-triton is installed. The choice is made while a step is
traced.
"""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float

from activations.errors import ConfigError
from sae.kernels import devices

Kernels = Literal["auto", "xla", "triton"]
LOW = "BF16_BF16_F32"
OLDEST = 8.0
"""compute capability from which Triton has bfloat16"""

_triton: ContextVar[bool] = ContextVar("triton", default=False)


@contextmanager
def using(kernels: Kernels, grid: Mesh | None = None) -> Iterator[None]:
    """Take these kernels in what is traced inside, on each device of the grid.

    Raises: ConfigError if triton is asked for where it can't run.
    """
    missing = why_not_triton()
    if kernels == "triton" and missing:
        fix = "Set kernels to auto, which takes what is there."
        raise ConfigError("compute.kernels", expected="triton where it can run", got=missing, fix=fix)
    triton, on = _triton.set(kernels != "xla" and missing is None), devices.grid_in_use.set(grid)
    try:
        yield
    finally:
        _triton.reset(triton)
        devices.grid_in_use.reset(on)


def why_not_triton() -> str | None:
    """What keeps Triton's programs from running here, or None."""
    if jax.default_backend() != "gpu":
        return f"no GPU, but {jax.default_backend()}"
    device = jax.devices()[0]
    if "cuda" not in device.client.platform_version.lower():
        return "a GPU that is not NVIDIA's"
    if float(device.compute_capability) < OLDEST:
        return f"a GPU of compute capability {device.compute_capability}, below {OLDEST}"
    if importlib.util.find_spec("jax_triton") is None:
        return "a GPU without jax-triton (pip install saekit[gpu])"
    return None


def triton_is_chosen() -> bool:
    """Whether what is traced now takes Triton's programs."""
    return _triton.get()


def products_are_low() -> bool:
    """Whether what is traced now multiplies in 16 bits (`sae.step.matmul`)."""
    return jax.config.jax_default_matmul_precision == LOW  # type: ignore[attr-defined]


def operand(matrix: Float[Array, "..."]) -> Float[Array, "..."]:
    """The matrix as products read it: in bfloat16 where these are low."""
    return matrix.astype(jnp.bfloat16) if products_are_low() else matrix


def fine_operand(matrix: Float[Array, "..."]) -> Float[Array, "..."]:
    """As `operand`, but in float16, which has three bits more than bfloat16 and ends at 65,504; what is beyond is cut.

    For activations and encoders, where these are scaled to a variance of 1 a dimension: latents are chosen by products
    of theirs, of which many are equal in bfloat16 where there are many latents (docs/LOG.md).
    """
    most = float(jnp.finfo(jnp.float16).max)
    return jnp.clip(matrix, -most, most).astype(jnp.float16) if products_are_low() else matrix
