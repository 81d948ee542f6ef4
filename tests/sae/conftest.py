"""Small activation stores with known content."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from jaxtyping import Float

from activations.store import ActivationStore
from activations.store_schema import HookState, ModelRef, StoreMeta, StoreState, scale_name, to_bfloat16_bits
from activations.store_writer import Group, StoreWriter

MakeStore = Callable[..., ActivationStore]
HOOK_POINT = "resid_post.1"


def sparse_mixture(n: int, d_model: int, seed: int) -> Float[np.ndarray, "token d_model"]:
    """About 3 of 2 * d_model directions a token, on a common mean, with a little noise."""
    rng = np.random.default_rng(seed)
    directions = rng.normal(size=(2 * d_model, d_model))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    weights = (rng.random((n, 2 * d_model)) < 1.5 / d_model) * rng.uniform(1, 3, (n, 2 * d_model))
    mean = rng.normal(size=d_model)
    return (weights @ directions + mean + 0.05 * rng.normal(size=(n, d_model))).astype(np.float32)


def numbered(n: int, d_model: int, seed: int) -> Float[np.ndarray, "token d_model"]:
    """Token i is (i + 1, 1, 1, ...), so that a batch tells which tokens it holds."""
    x = np.ones((n, d_model), np.float32)
    x[:, 0] = np.arange(1, n + 1)
    return x


def stored(name: str, x: np.ndarray, dtype: str) -> dict[str, np.ndarray]:
    """The arrays of a hook point on disk."""
    if dtype == "int8":
        scale = np.abs(x).max(axis=-1) / np.float32(127)
        return {name: np.rint(x / scale[..., None]).astype(np.int8), scale_name(name): scale}
    return {name: to_bfloat16_bits(x) if dtype == "bfloat16" else x.astype(dtype)}


def _counted(state: HookState | None, used: np.ndarray) -> HookState:
    return (state or HookState()).add(np.linalg.norm(used, axis=1), used.sum(axis=0, dtype=np.float64))


def write_store(
    folder: Path,
    name: str = "store",
    n_sequences: int = 64,
    ctx: int = 16,
    d_model: int = 16,
    chunk: int = 8,
    masked: float = 0.1,
    document: int = 5,
    complete: bool = True,
    fill: Callable[[int, int, int], np.ndarray] = sparse_mixture,
    seed: int = 0,
    hook_points: tuple[str, ...] = (HOOK_POINT,),
    store_dtype: str = "float32",
) -> ActivationStore:
    """Write a store into a folder, and open it."""
    first = fill(n_sequences * ctx, d_model, seed).reshape(n_sequences, ctx, d_model)
    xs = {
        hook_point: np.concatenate([first[..., :1], first[..., 1:] * (1 + i)], -1)
        for i, hook_point in enumerate(hook_points)
    }
    mask = np.random.default_rng(seed).random((n_sequences, ctx)) >= masked
    model = ModelRef(id="tiny", fingerprint="f00d", n_layers=2, d_model=d_model)
    meta = StoreMeta(
        model=model,
        tokenizer_fingerprint="t",
        text="x",
        text_fingerprint="x",
        hook_points=hook_points,
        ctx=ctx,
        store_dtype=store_dtype,
        compute_dtype="float32",
        batch_tokens=2048,
        commit_sequences=chunk,
        outlier_norm=10.0,
    )
    with StoreWriter.open(folder / name, meta) as writer:
        for start in range(0, n_sequences, chunk):
            part = slice(start, min(start + chunk, n_sequences))
            ids = np.arange(part.start, part.stop, dtype=np.int32)
            tokens = np.tile(ids[:, None], (1, ctx))
            hooks = {name: _counted(writer.state.hooks.get(name), x[part][mask[part]]) for name, x in xs.items()}
            state = StoreState(hooks=hooks, tokens=hooks[hook_points[0]].n_tokens)
            group = {k: v for name, x in xs.items() for k, v in stored(name, x[part], store_dtype).items()}
            writer.append(Group(tokens, mask[part], ids // document, group), state)
        writer.finish(complete=complete)
    return ActivationStore.open(folder / name)


@pytest.fixture
def make_store(tmp_path: Path) -> MakeStore:
    """A function that writes a store and opens it."""
    return partial(write_store, tmp_path)


@pytest.fixture
def numbered_tokens() -> Callable[[int, int, int], np.ndarray]:
    """A filling for `make_store` whose tokens can be told apart."""
    return numbered
