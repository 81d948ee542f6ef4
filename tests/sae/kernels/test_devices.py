"""A training step on several devices equals that on one; here on eight that XLA simulates (tests/conftest.py)."""

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import sae.step
from activations.errors import ConfigError
from sae.architectures import ARCHITECTURES
from sae.architectures.base import Means, Scaling
from sae.config import ComputeConfig, SaeConfig, TrainConfig
from sae.kernels import largest, using
from sae.kernels.devices import AT_REST, BY_TOKEN, DATA, LATENT, make_grid
from sae.step import Plan, StepMetrics, TrainState, create, make_step, start
from tests.sae.kernels.test_gpu import D_SAE, steps, take_triton

__all__ = ["take_triton"]

GRIDS = {
    "latents": ComputeConfig(latent_parallel=8),
    "data": ComputeConfig(data_parallel=8),
    "both": ComputeConfig(latent_parallel=2, data_parallel=4),
}


def same(got: tuple[TrainState, list[StepMetrics]], expected: tuple[TrainState, list[StepMetrics]]) -> None:
    for mine, wanted in zip(got[1], expected[1], strict=True):
        assert float(mine.loss) == pytest.approx(float(wanted.loss), rel=1e-5)
        assert float(mine.l0) == pytest.approx(float(wanted.l0))
        assert float(mine.grad_norm) == pytest.approx(float(wanted.grad_norm), rel=1e-4)
    assert float(got[1][-1].dead_fraction) > 0, "so that AuxK has worked"
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=5e-5), got[0], expected[0])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_steps_equal_those_of_one_device(architecture: str) -> None:
    expected = steps(architecture)
    for compute in GRIDS.values():
        state, metrics = steps(architecture, compute)
        same((state, metrics), expected)
        for tree in (state.params, state.moments.mean, state.moments.square):
            for name in ("W_enc", "W_dec", "b_enc"):
                shares = {share.data.shape[0] for share in tree[name][...].addressable_shards}
                assert shares == {D_SAE // 8}, f"each device keeps its share of {name}"


@pytest.mark.parametrize("architecture", ["topk", "batchtopk", "matryoshka"])
def test_dense_steps_equal_those_of_one_device(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an accelerator without Triton computes."""
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *arguments, default, **_: default(*arguments))
    same(steps(architecture, GRIDS["both"]), steps(architecture))


def part(spec: PartitionSpec, device: dict[str, int], shape: tuple[int, ...]) -> tuple[slice, ...]:
    """What a device of a grid of 2 x 2 has of an array."""
    slices = []
    for size, axes in zip(shape, (*spec, *[None] * (len(shape) - len(spec))), strict=True):
        names = axes if isinstance(axes, tuple) else [axes] if axes else []
        number = sum(device[axis] * 2**i for i, axis in enumerate(reversed(names)))
        mine = size // 2 ** len(names)
        slices.append(slice(number * mine, (number + 1) * mine))
    return tuple(slices)


DEVICES = [[{LATENT: i, DATA: j} for j in range(2)] for i in range(2)]


def shard_map_by_vmap(function: Callable[..., Any], *, in_specs: Any, out_specs: Any, **_: Any) -> Callable[..., Any]:
    """`jax.shard_map` on a grid of 2 x 2 with one device, since callbacks and simulated devices wait for each other."""

    def cut(spec: PartitionSpec, array: jax.Array) -> jax.Array:
        return jnp.stack([jnp.stack([array[part(spec, device, array.shape)] for device in row]) for row in DEVICES])

    def join(spec: PartitionSpec, stacked: jax.Array) -> jax.Array:
        shape, first = stacked.shape[2:], part(spec, DEVICES[0][0], stacked.shape[2:])
        whole = jnp.zeros([n * (n // mine.stop) for n, mine in zip(shape, first, strict=True)], stacked.dtype)
        for i, row in enumerate(DEVICES):
            for j, device in enumerate(row):
                whole = whole.at[part(spec, device, whole.shape)].set(stacked[i, j])
        return whole

    def call(*arguments: Any) -> Any:
        split = [jax.tree.map(partial(cut, spec), argument) for spec, argument in zip(in_specs, arguments, strict=True)]
        results = jax.vmap(jax.vmap(function, axis_name=DATA), axis_name=LATENT)(*split)
        is_spec = lambda tree: isinstance(tree, PartitionSpec)  # noqa: E731
        return jax.tree.map(
            lambda spec, result: jax.tree.map(partial(join, spec), result), out_specs, results, is_leaf=is_spec
        )

    return call


@pytest.mark.parametrize("architecture", ["topk", "batchtopk", "matryoshka"])
def test_steps_through_triton_equal_those_of_one_device(
    take_triton: Callable[[], None], monkeypatch: pytest.MonkeyPatch, architecture: str
) -> None:
    expected = steps(architecture)
    take_triton()
    monkeypatch.setattr(jax, "shard_map", shard_map_by_vmap)
    monkeypatch.setattr(jax.lax, "with_sharding_constraint", lambda tree, _: tree)
    monkeypatch.setattr(sae.step, "place", lambda tree, *_: tree)
    same(steps(architecture, ComputeConfig(latent_parallel=2, data_parallel=2)), expected)


def test_orthogonality_is_what_it_is_on_one_device() -> None:
    settings = {"orthogonality": 0.5, "orthogonality_every": 1, "orthogonality_chunk": 16}
    same(steps("batchtopk", GRIDS["both"], **settings), steps("batchtopk", **settings))


@pytest.mark.parametrize("values", ["ties", "all equal", "few positive", "all on one device"])
def test_the_k_largest_of_all_devices(values: str) -> None:
    """Each device's slots hold its own latents; ties beyond k are left out."""
    pre = {
        "ties": jax.random.randint(jax.random.key(0), (16, D_SAE), -2, 4).astype(jnp.float32),
        "all equal": jnp.ones((16, D_SAE)),
        "few positive": jnp.where(jnp.arange(D_SAE) % 20 == 3, 1.0, -1.0) * jnp.ones((16, 1)),
        "all on one device": jnp.where(jnp.arange(D_SAE) // 6 == 5, 9.0, 0.5) + jnp.arange(D_SAE) / 100,
    }[values] * jnp.ones((16, 1))
    x, W, zero = jnp.eye(16), pre, jnp.zeros(D_SAE)
    with using("xla", make_grid(8, 1)):
        codes, passing = jax.jit(lambda x, W: largest(x, W, zero, 5, 8))(x, W)
    found, where = np.asarray(codes.values), np.asarray(codes.indices)
    expected = np.sort(np.maximum(np.asarray(pre), 0), axis=1)[:, ::-1][:, :5]
    np.testing.assert_array_equal(np.sort(found, axis=1)[:, ::-1][:, :5], expected)
    assert ((found > 0).sum(axis=1) == (expected > 0).sum(axis=1)).all()
    device = np.arange(found.shape[1]) // (found.shape[1] // 8)
    for row in range(16):
        used = found[row] > 0
        assert len(set(where[row][used])) == used.sum()
        np.testing.assert_array_equal(np.asarray(pre)[row][where[row][used]], found[row][used])
        assert (where[row][used] // (D_SAE // 8) == device[used]).all()
    np.testing.assert_array_equal(passing, (np.asarray(pre) > 0).sum(axis=1))


def test_devices_that_split_latents_exchange_no_weights() -> None:
    """What they exchange is as large as activations: a matrix of weights has 80 times as many numbers here."""
    d, d_sae, batch = 24, 4096, 32
    config = TrainConfig(
        sae=SaeConfig(architecture="batchtopk", d_sae=d_sae, k=4, aux_k=4),
        batch_size=batch,
        train_tokens=10 * batch,
        compute=ComputeConfig(latent_parallel=8),
    )
    one, zero = np.ones(d, np.float32), np.zeros(d, np.float32)
    plan = Plan(10, 0.01, Scaling(one, one), Means(zero, zero), dead_after=batch)
    state = jax.eval_shape(lambda: start(config, plan, create(config, plan)))
    grid = make_grid(8, 1)
    assert grid is not None

    def placed(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        where = AT_REST if leaf.shape[:1] == (d_sae,) else BY_TOKEN if leaf.shape[:1] == (batch,) else None
        spec = where if where is not None else PartitionSpec()
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(grid, spec))

    x = placed(jax.ShapeDtypeStruct((batch, d), jnp.float32))
    text = make_step(config, plan).lower(jax.tree.map(placed, state), x, x, plan.scaling).compile().as_text()
    exchanged = re.findall(r"= (.*?) (?:all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)\(", text)
    sizes = [
        np.prod([int(n) for n in shape.split(",") if n])
        for line in exchanged
        for shape in re.findall(r"\[([\d,]*)\]", line)
    ]
    assert sizes, "they exchange something"
    assert max(sizes) <= max(d_sae, batch * 8 * 8), "no more than one number a latent, or a token and slot"


def test_more_devices_than_there_are_is_an_error() -> None:
    with pytest.raises(ConfigError, match="at most the 8 cpu devices that JAX sees, got 16"):
        make_grid(4, 4)
