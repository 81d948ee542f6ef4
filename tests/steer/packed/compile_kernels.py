"""Compile what a hook point on a GPU would run, without a GPU, for Ampere and for Hopper; prints a line for each.

python compile_kernels.py          in a process of its own, since tests interpret Triton's programs
"""

from typing import Any

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from activations.hook_points import HookPoint
from sae.artefact import SaeArtefact
from steer.packed import apart, kernel, tables
from steer.packed.rows import Rows
from steer.packed.tables import Sizes
from steer.tables import LaneKey

D, LATENTS = 2048, 512
READ, POINT = HookPoint("resid_post", 0), HookPoint("resid_post", 1)
POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.long: "*i64", torch.uint8: "*u8"}
CAPABILITIES = 80, 90
OPTIONS = ("num_warps",)


class Noted:
    """Stands in for a kernel, and remembers with what it would be compiled."""

    def __init__(self, program: Any):
        """Args: program: of Triton."""
        self.program, self.calls = program, dict[str, dict[str, Any]]()

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        """What is called in place of a launch."""
        return self._note

    def _note(self, *given: Any, **named: Any) -> None:
        found = dict(zip(self.program.arg_names, given, strict=False)) | named
        types = {name: POINTERS[value.dtype] for name, value in found.items() if isinstance(value, torch.Tensor)}
        self.calls[str(types) + str(found.get("has_residual")) + str(found.get("is_encoded"))] = {**found, **types}

    def compiled(self, capability: int) -> list[int]:
        """Shared memory that each call takes, in bytes."""
        return [self._compiled(call, GPUTarget("cuda", capability, 32)) for call in self.calls.values()]

    def _compiled(self, call: dict[str, Any], target: GPUTarget) -> int:
        params = {param.name: param for param in self.program.params}
        constants = {name: value for name, value in call.items() if name in params and params[name].is_constexpr}
        signature = {
            name: "constexpr" if name in constants else value if isinstance(value, str) else "i32"
            for name, value in call.items() if name in params
        }  # fmt: skip
        source = ASTSource(
            self.program,
            {name: signature[name] for name in self.program.arg_names},
            {(self.program.arg_names.index(name),): value for name, value in constants.items()},
        )
        options = {name: call[name] for name in OPTIONS if name in call}
        return triton.compile(source, target=target, options=options).metadata.shared


def main() -> None:
    """Steer at two hook points with an SAE that has to be encoded, and with one that reads elsewhere, then compile."""
    noted = {name: Noted(getattr(module, name)) for module, name in WHERE}
    for module, name in WHERE:
        setattr(module, name, noted[name])
    tables.has_kernel = lambda value: True
    W, zeros = np.zeros((D, LATENTS), np.float32), [np.zeros(n, np.float32) for n in (LATENTS, D)]
    sae = SaeArtefact("topk", W, zeros[0], np.ascontiguousarray(W.T), zeros[1], k=8)
    for key in (LaneKey(POINT, POINT, sae, False), LaneKey(POINT, READ, None, False)):
        rows = Rows([READ, POINT], Sizes(D, 64, 16, 4, 64), [key])
        for dtype, residual in ((torch.float32, None), (torch.bfloat16, torch.zeros(2, D).bfloat16())):
            for site in rows.sites.values():
                site.act(torch.zeros(2, D, dtype=dtype), residual)
    for capability in CAPABILITIES:
        for name, each in noted.items():
            for shared in each.compiled(capability):
                print(capability, name, shared)  # noqa: T201


WHERE = ((kernel, "_steer"), (apart, "_encode"), (apart, "_find"))

if __name__ == "__main__":
    main()
