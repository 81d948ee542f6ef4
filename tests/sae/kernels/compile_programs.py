"""Compile what a training step on a GPU would run, without a GPU, for Ampere and for Hopper; prints a line for each.

python compile_programs.py          in a process of its own, since tests interpret Triton's programs
"""

from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sae.architectures.base import Means, Scaling
from sae.config import SaeConfig, TrainConfig
from sae.kernels import choice, gpu, triton_programs
from sae.step import Plan, create, start, step_of

BATCH, D, D_SAE, K = 8192, 2304, 65536, 64
POINTERS = {"float32": "*fp32", "bfloat16": "*bf16", "float16": "*fp16", "int32": "*i32"}
CAPABILITIES = 80, 90
calls: dict[str, tuple[list[str], dict[str, Any]]] = {}


def note(program: str, *inputs: jax.Array, out: Any, grid: Any, **sizes: Any) -> Any:
    """Stands in for `sae.kernels.gpu._call`, and remembers with what a program would be compiled."""
    arrays = [*inputs, *jax.tree.leaves(out)]
    calls[f"{program} {[str(array.dtype) for array in inputs]} {sizes.get('GROUPS', '')}"] = (
        [POINTERS[str(array.dtype)] for array in arrays],
        {key: value for key, value in sizes.items() if key not in ("zeroed_outputs", "input_output_aliases")},
    )
    return jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), out)


def trace(architecture: str, matmul: str) -> None:
    """Trace a step."""
    sae = SaeConfig(architecture=architecture, d_sae=D_SAE, k=K)
    given = {"sae": sae, "batch_size": BATCH, "train_tokens": 10 * BATCH, "compute": {"matmul": matmul}}
    config = TrainConfig.model_validate(given)
    one, zero = np.ones(D, np.float32), np.zeros(D, np.float32)
    plan = Plan(10, 1e-3, Scaling(one, one), Means(zero, zero), dead_after=BATCH)
    state = jax.eval_shape(lambda: start(config, plan, create(config, plan)))
    x = jax.ShapeDtypeStruct((BATCH, D), jnp.float32)
    jax.eval_shape(step_of(config, plan), state, x, x, plan.scaling)


def main() -> None:
    """Trace steps of two architectures, which take every program, then compile."""
    gpu._call, choice.why_not_triton = note, lambda: None
    for architecture, matmul in product(("batchtopk", "matryoshka"), ("bfloat16", "float32")):
        trace(architecture, matmul)
    for capability in CAPABILITIES:
        for name, (pointers, sizes) in calls.items():
            program = getattr(triton_programs, name.split()[0])
            arguments, options = program.arg_names, {"num_warps": sizes["num_warps"]}
            signature = {key: pointers[i] if i < len(pointers) else "constexpr" for i, key in enumerate(arguments)}
            constants = {(arguments.index(key),): value for key, value in sizes.items() if key != "num_warps"}
            source = ASTSource(program, signature, constants)
            compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
            print(capability, name, len(compiled.asm["cubin"]), compiled.metadata.shared)  # noqa: T201


if __name__ == "__main__":
    main()
