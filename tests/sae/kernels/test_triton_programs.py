"""Triton's programs, run by its interpreter on a CPU (tests/conftest.py), equal plain PyTorch.

On a GPU, benchmarks/train_step.py --check compares whole training runs.
"""

import importlib.util
import math
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import sae.kernels

pytest.importorskip("triton", reason="Triton is published for Linux only")


def interpreted() -> ModuleType:
    """The programs; without jaxtyping's import hook, which hides their source from the interpreter."""
    path = Path(sae.kernels.__file__).parent / "triton_programs.py"
    spec = importlib.util.spec_from_file_location("interpreted_triton_programs", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


triton_programs = interpreted()

BATCH, D_SAE, D, SLOTS, PADDED = 5, 300, 40, 12, 16

PRODUCTS = {
    "normal": lambda: torch.randn(BATCH, D_SAE),
    "float16": lambda: torch.randn(BATCH, D_SAE).to(torch.float16),
    "ties": lambda: torch.randint(-2, 3, (BATCH, D_SAE)).float(),
    "all equal": lambda: torch.ones(BATCH, D_SAE),
    "few above 0": lambda: torch.where(torch.rand(BATCH, D_SAE) < 0.01, 1.0, -1.0),
    "none above 0": lambda: -torch.rand(BATCH, D_SAE) - 2,
    "in one class": lambda: torch.where(torch.arange(D_SAE) % 32 == 3, 2.0 + torch.rand(BATCH, D_SAE), 0.1),
    "subnormal and huge": lambda: torch.exp(40 * torch.randn(BATCH, D_SAE)) * 1e-20,
}

GROUPS = [(1, 1), (2, 1), (3, 2), (5, 4)]
"""how many, and one less rounded up to a power of 2"""


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def blank(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Memory that no program has written to yet."""
    return torch.full(shape, -7, dtype=dtype)


def keep_largest(
    products: torch.Tensor, b: torch.Tensor, k: int | list[int], rows: int, rows_a_sae: int = 8
) -> tuple[torch.Tensor, ...]:
    batch, ks = len(products), torch.tensor(k, dtype=torch.int32).ravel()
    values, indices = blank(batch, SLOTS), blank(batch, SLOTS, dtype=torch.int32)
    passing, classes = blank(batch, dtype=torch.int32), blank(batch, PADDED, dtype=torch.int32)
    thresholds = 0.5 * torch.arange(1, len(ks) + 1)
    triton_programs.keep_largest[(math.ceil(batch / rows),)](
        products, b, ks, thresholds, values, indices, passing, classes, BATCH=batch, D_SAE=D_SAE, SLOTS=SLOTS,
        PADDED=PADDED, CHUNK=32, DEPTH=16, ROWS=rows, ROWS_A_SAE=rows_a_sae,
    )  # fmt: skip
    return values, indices, passing


def densify(values: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    return torch.zeros(BATCH, D_SAE + 1).scatter_(1, indices.long(), values)[:, :D_SAE]


def group_of_each(n_groups: int) -> torch.Tensor:
    """The group of each latent, where group 0 has 10 and the rest fall to the others."""
    return torch.bucketize(torch.arange(D_SAE), torch.linspace(10, D_SAE, n_groups)[:-1], right=True).int()


@pytest.fixture
def codes() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Values, indices and how many are in use: row i has 3 i of SLOTS."""
    used = torch.arange(SLOTS) < 3 * torch.arange(BATCH)[:, None]
    indices = torch.stack([torch.randperm(D_SAE)[:SLOTS] for _ in range(BATCH)])
    indices[:, 0] = 7  # a latent that is active on many tokens
    values = torch.where(used, torch.rand(BATCH, SLOTS) + 0.1, 0)
    return values, torch.where(used, indices, D_SAE).int(), used.sum(dim=1).int()


@pytest.mark.parametrize("case", PRODUCTS)
@pytest.mark.parametrize(("k", "rows"), [(1, 1), (7, 2), (12, 4)])
def test_the_k_largest_are_kept(case: str, k: int, rows: int) -> None:
    products, b = PRODUCTS[case](), torch.randint(0, 2, (D_SAE,)).float() * (case == "normal")
    values, indices, passing = keep_largest(products, b, k, rows)
    pre = products.float() + b
    expected = torch.relu(pre).sort(dim=1, descending=True).values[:, :k]
    torch.testing.assert_close(values.sort(dim=1, descending=True).values[:, :k], expected, rtol=0, atol=0)
    assert torch.equal(passing, (pre > 0.5).sum(dim=1).int())
    in_use = values > 0
    assert (in_use.sum(dim=1) == (expected > 0).sum(dim=1)).all()
    assert (in_use.long().diff(dim=1) <= 0).all(), "unused slots come last"
    assert (indices[~in_use] == D_SAE).all()
    for row in range(BATCH):
        latents = indices[row][in_use[row]].long()
        assert len(latents.unique()) == len(latents)
        assert torch.equal(pre[row][latents], values[row][in_use[row]])


def test_what_float16_cannot_hold_is_cut() -> None:
    products = torch.randn(BATCH, D_SAE).to(torch.float16)
    products[2, 100] = torch.inf
    values, indices, _ = keep_largest(products, torch.zeros(D_SAE), 1, 1)
    assert (values[2, 0], indices[2, 0]) == (65504, 100)


def test_nan_is_kept_rather_than_lost() -> None:
    products = torch.randn(BATCH, D_SAE)
    products[2, 100] = torch.nan
    values, _, _ = keep_largest(products, torch.zeros(D_SAE), 3, 2)
    assert values.isnan().sum(dim=1).tolist() == [0, 0, 1, 0, 0]


def test_stacked_saes_have_a_bias_a_k_and_a_threshold_each() -> None:
    products, b = torch.randn(2 * BATCH, D_SAE), torch.rand(2, D_SAE)
    values, indices, passing = keep_largest(products, b, [3, 7], 1, rows_a_sae=BATCH)
    for i, k in enumerate((3, 7)):
        mine = slice(i * BATCH, (i + 1) * BATCH)
        alone = keep_largest(products[mine], b[i], k, 1)
        assert torch.equal(values[mine], alone[0])
        assert torch.equal(indices[mine], alone[1])
        assert torch.equal(passing[mine], (products[mine] + b[i] > 0.5 * (i + 1)).sum(dim=1).int())


def test_keep_above_moves_what_reaches_the_cutoff_forward(codes: tuple[torch.Tensor, ...]) -> None:
    values, indices, _ = codes
    cutoffs = torch.stack([values[2, 2], values[4, 5]])  # of one SAE with 3 tokens, and of one with 2
    kept, where = blank(BATCH, SLOTS), blank(BATCH, SLOTS, dtype=torch.int32)
    triton_programs.keep_above[(3,)](
        values, indices, cutoffs, kept, where,
        BATCH=BATCH, D_SAE=D_SAE, SLOTS=SLOTS, PADDED=PADDED, ROWS=2, ROWS_A_SAE=3,
    )  # fmt: skip
    reaches = values >= cutoffs[torch.tensor([0, 0, 0, 1, 1])][:, None]
    expected = densify(torch.where(reaches, values, 0), indices)
    assert torch.equal(densify(kept, where), expected)
    assert 0 < (kept > 0).sum() < (values > 0).sum()
    assert ((kept > 0).long().diff(dim=1) <= 0).all()


def test_sum_of_active_rows(codes: tuple[torch.Tensor, ...]) -> None:
    values, indices, in_use = codes
    W, out = torch.randn(D_SAE, D), blank(BATCH, D)
    triton_programs.sum_active_rows[(BATCH, 2)](values, indices, in_use, W, out, D=D, SLOTS=SLOTS, COLUMNS=32)
    torch.testing.assert_close(out, densify(values, indices) @ W)


@pytest.mark.parametrize(("n_groups", "smaller"), GROUPS)
def test_sums_of_nested_rows(codes: tuple[torch.Tensor, ...], n_groups: int, smaller: int) -> None:
    values, indices, in_use = codes
    groups, W, out = group_of_each(n_groups), torch.randn(D_SAE, D), blank(BATCH, n_groups, D)
    triton_programs.sum_nested_rows[(BATCH, 2)](
        values, indices, in_use, groups, W, out, D=D, SLOTS=SLOTS, GROUPS=n_groups, SMALLER=smaller, COLUMNS=32
    )
    up_to = groups <= torch.arange(n_groups)[:, None]
    torch.testing.assert_close(out, torch.einsum("bl,ml,ld->bmd", densify(values, indices), up_to.float(), W))


@pytest.mark.parametrize("n_groups", [n for n, _ in GROUPS])
def test_dot_with_active_rows(codes: tuple[torch.Tensor, ...], n_groups: int) -> None:
    values, indices, in_use = codes
    groups, W, g, out = (
        group_of_each(n_groups),
        torch.randn(D_SAE, D),
        torch.randn(BATCH, n_groups, D),
        blank(BATCH, SLOTS),
    )
    triton_programs.dot_active_rows[(BATCH, 3)](
        indices, in_use, groups, W, g, out, D=D, SLOTS=SLOTS, GROUPS=n_groups, ROWS=4, COLUMNS=16
    )
    expected = (g[:, groups.long()] * W).sum(dim=2).gather(1, indices.clamp(max=D_SAE - 1).long())
    torch.testing.assert_close(out, torch.where(values > 0, expected, 0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("n_groups", [n for n, _ in GROUPS])
def test_sums_by_latent(codes: tuple[torch.Tensor, ...], n_groups: int) -> None:
    _, indices, _ = codes
    groups, weights, rows = group_of_each(n_groups), torch.randn(BATCH, SLOTS), torch.randn(BATCH, n_groups, D)
    latents, counts = indices.ravel(), torch.zeros(D_SAE, dtype=torch.int32)
    triton_programs.count_slots[(4,)](latents, counts, N=len(latents), D_SAE=D_SAE, BLOCK=16)
    assert torch.equal(counts, latents.bincount(minlength=D_SAE + 1)[:D_SAE].int())
    first = torch.cat([torch.zeros(1), counts.cumsum(0)]).int()
    order = latents.sort(stable=True).indices.int()
    out, totals = blank(D_SAE, D), blank(D_SAE)
    triton_programs.sum_by_latent[(D_SAE, 2)](
        first, order, weights, groups, rows, out, totals, D=D, SLOTS=SLOTS, GROUPS=n_groups, ROWS=2, COLUMNS=32
    )
    dense = densify(weights, indices)
    torch.testing.assert_close(out, torch.einsum("bl,bld->ld", dense, rows[:, groups.long()]))
    torch.testing.assert_close(totals, dense.sum(dim=0))


@pytest.mark.parametrize("on_sphere", [False, True])
def test_descend_takes_a_step_of_adam(on_sphere: bool) -> None:
    W, g, mean, square = (torch.randn(D_SAE, D) for _ in range(4))
    W, square = torch.nn.functional.normalize(W, dim=1), square.abs()
    beta1, beta2, rate, correction = 0.9, 0.99, 0.01, 3.0
    scale = torch.where(torch.arange(D_SAE) < 100, 0.5, 0.25)[:, None]  # of an SAE of 100 latents, and of the next ones
    projected = scale * (g - (g * W).sum(dim=1, keepdim=True) * W if on_sphere else g)
    next_mean, next_square = beta1 * mean + 0.1 * projected, beta2 * square + 0.01 * projected**2
    expected = W - rate * next_mean / ((correction * next_square).sqrt() + 1e-8)
    expected = torch.nn.functional.normalize(expected, dim=1) if on_sphere else expected
    scalars = torch.tensor([[clip, beta1, beta2, rate, correction] for clip in (0.5, 0.25, 0.25)])
    triton_programs.descend[(D_SAE,)](
        W, g, mean, square, scalars, W, mean, square, D=D, PADDED=64, ON_SPHERE=on_sphere, ROWS_A_SAE=100
    )
    for got, wanted in ((W, expected), (mean, next_mean), (square, next_square)):
        torch.testing.assert_close(got, wanted)


def test_what_a_step_runs_compiles_for_gpus(tmp_path: Path) -> None:
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    script = Path(__file__).with_name("compile_programs.py")
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    compiled = [line.split() for line in done.stdout.splitlines()]
    assert {line[0] for line in compiled} == {"80", "90"}
    programs = {name for name, value in vars(triton_programs).items() if hasattr(value, "arg_names")}
    assert {line[1] for line in compiled} == {name for name in programs if not name.startswith("_")}
    assert all(int(line[-1]) < 100_000 for line in compiled), "shared memory that any of these GPUs has"
