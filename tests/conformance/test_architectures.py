"""What every row of ARCHITECTURES promises, against dense references that share no code with it."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from activations.errors import UnknownNameError
from sae.architectures import ARCHITECTURES, find
from sae.architectures.base import SparseCoder, project_gradient, unit_rows
from sae.artefact import SaeArtefact
from sae.config import SaeConfig
from sae.kernels import densify

BATCH, D_MODEL, D_SAE, K = 48, 12, 40, 4
VARIANCE, NEVER, ALWAYS = 12.0, 10**6, 0
PARAMETERS = ("W_enc", "b_enc", "W_dec", "b_dec")


@pytest.fixture(params=ARCHITECTURES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def sae(name: str) -> SparseCoder:
    """One whose encoder is no longer tied and whose biases are not zero, as after some training."""
    config = SaeConfig(architecture=name, d_sae=D_SAE, k=K, aux_k=10)
    sae = find(name)(config, jnp.ones(D_MODEL) / 2, jax.random.key(0))
    sae.W_enc[...] += 0.1 * jax.random.normal(jax.random.key(1), (D_MODEL, D_SAE))
    sae.b_enc[...] = 0.3 * jax.random.normal(jax.random.key(2), (D_SAE,))
    return sae


@pytest.fixture
def x() -> jax.Array:
    return jax.random.normal(jax.random.key(3), (BATCH, D_MODEL)) + 0.5


@pytest.fixture
def idle() -> jax.Array:
    """Latent j was last active j tokens ago."""
    return jnp.arange(D_SAE, dtype=jnp.int32)


def reference_mask(name: str, pre: np.ndarray) -> np.ndarray:
    """Which latents a training batch keeps, by sorting everything."""
    positive = np.maximum(pre, 0)
    if name == "topk":
        cutoff = np.sort(positive, axis=1)[:, -K][:, None]
    else:
        positive *= positive >= np.sort(positive, axis=1)[:, -2 * K][:, None]  # no token takes more than 2k
        cutoff = np.sort(positive, axis=None)[-K * len(pre)]
    return (positive >= cutoff) & (positive > 0)


def reference_loss(params: dict[str, jax.Array], x: jax.Array, mask: np.ndarray, dead: np.ndarray) -> jax.Array:
    """Dense, differentiated by JAX alone; `dead` are the latents that model the residual."""
    pre = jax.nn.relu((x - params["b_dec"]) @ params["W_enc"] + params["b_enc"])
    error = x - (pre * mask) @ params["W_dec"] - params["b_dec"]
    residual = jax.lax.stop_gradient(error)
    aux_pre = jax.nn.relu((x - jax.lax.stop_gradient(params["b_dec"])) @ params["W_enc"] + params["b_enc"])
    aux_error = residual - (aux_pre * dead) @ params["W_dec"]
    aux = (aux_error**2).sum() / ((residual - residual.mean(0)) ** 2).sum() if dead.any() else 0.0
    return (error**2).sum(1).mean() / VARIANCE + aux / 32


def parameters(sae: SparseCoder) -> dict[str, jax.Array]:
    return {name: getattr(sae, name)[...] for name in PARAMETERS}


def gradients(sae: SparseCoder, x: jax.Array, idle: jax.Array, dead_after: int) -> dict[str, jax.Array]:
    graph, params, rest = nnx.split(sae, nnx.Param, ...)
    grads: Any = jax.grad(lambda p: nnx.merge(graph, p, rest).loss(x, VARIANCE, idle, dead_after).loss)(params)
    return {name: grads[name][...] for name in PARAMETERS}


def trained_threshold(sae: SparseCoder, x: jax.Array) -> SparseCoder:
    """The SAE after it observed two batches: a running threshold is then defined, and equal to no pre-activation."""
    sae.observe(sae.select(sae.preactivations(x)))
    sae.observe(sae.select(sae.preactivations(x[: BATCH // 2])))
    return sae


def test_it_starts_tied_with_unit_rows_at_the_mean(name: str) -> None:
    mean = jnp.arange(D_MODEL, dtype=jnp.float32)
    sae = find(name)(SaeConfig(architecture=name, d_sae=D_SAE, k=K), mean, jax.random.key(0))
    np.testing.assert_array_equal(sae.W_enc[...], sae.W_dec[...].T)
    np.testing.assert_allclose(jnp.linalg.norm(sae.W_dec[...], axis=1), 1, atol=1e-6)
    np.testing.assert_array_equal(sae.b_dec[...], mean)
    assert not sae.b_enc[...].any()


def test_shapes(sae: SparseCoder, x: jax.Array) -> None:
    latents = trained_threshold(sae, x).encode(x)
    assert latents.shape == (BATCH, D_SAE)
    assert sae.decode(latents).shape == x.shape


def test_training_keeps_the_latents_of_the_sorted_reference(name: str, sae: SparseCoder, x: jax.Array) -> None:
    pre = sae.preactivations(x)
    mask = reference_mask(name, np.asarray(pre))
    np.testing.assert_array_equal(densify(sae.select(pre), D_SAE), np.where(mask, pre, 0))
    assert mask.sum() == K * BATCH, "k latents a token"
    if name == "topk":
        assert (mask.sum(axis=1) == K).all(), "in each token"


def test_inference_keeps_about_k_latents_and_no_negative_one(name: str, sae: SparseCoder, x: jax.Array) -> None:
    latents = np.asarray(trained_threshold(sae, x).encode(x))
    assert (latents >= 0).all()
    assert (latents > 0).sum() / BATCH == pytest.approx(K, abs=0 if name == "topk" else 0.05)


@pytest.mark.parametrize("dead_after", [NEVER, 35, ALWAYS])
def test_loss_and_gradients_equal_the_dense_reference(
    name: str, sae: SparseCoder, x: jax.Array, idle: jax.Array, dead_after: int
) -> None:
    mask = reference_mask(name, np.asarray(sae.preactivations(x)))
    longest = np.arange(D_SAE) >= D_SAE - 10
    dead = longest & (np.asarray(idle) >= dead_after)
    expected, grads = jax.value_and_grad(reference_loss)(parameters(sae), x, mask, dead)
    assert float(sae.loss(x, VARIANCE, idle, dead_after).loss) == pytest.approx(float(expected), rel=1e-5)
    for tensor, got in gradients(sae, x, idle, dead_after).items():
        np.testing.assert_allclose(got, grads[tensor], rtol=1e-4, atol=1e-6, err_msg=tensor)


def test_aux_gradient_reaches_the_encoder_of_dead_latents_only(sae: SparseCoder, x: jax.Array, idle: jax.Array) -> None:
    def aux(dead_after: int) -> Any:
        graph, params, rest = nnx.split(sae, nnx.Param, ...)
        residual = x - 0.5
        return jax.grad(lambda p: nnx.merge(graph, p, rest).aux_loss(x, residual, idle, dead_after))(params)

    grads = aux(dead_after=35)
    reached = np.asarray(jnp.abs(grads["W_enc"][...]).sum(axis=0)) > 0
    assert reached[35:].all()
    assert not reached[:35].any()
    assert (np.asarray(jnp.abs(grads["W_dec"][...]).sum(axis=1)) > 0).tolist() == reached.tolist()
    assert not np.asarray(aux(dead_after=NEVER)["W_enc"][...]).any()


def test_masked_by_selection_means_no_gradient(sae: SparseCoder, x: jax.Array, idle: jax.Array) -> None:
    fired = np.asarray(densify(sae.select(sae.preactivations(x)), D_SAE) > 0).any(axis=0)
    moved = np.asarray(jnp.abs(gradients(sae, x, idle, NEVER)["b_enc"])) > 0
    np.testing.assert_array_equal(moved, fired)


def test_saving_and_loading_keeps_the_outputs_bitwise(sae: SparseCoder, x: jax.Array, tmp_path: Path) -> None:
    latents = trained_threshold(sae, x).encode(x)
    sae.to_artefact(1.0, {"note": "x"}).save(tmp_path / "sae")
    loaded = type(sae).from_artefact(SaeArtefact.load(tmp_path / "sae"))
    np.testing.assert_array_equal(loaded.encode(x), latents)
    np.testing.assert_array_equal(loaded.decode(latents), sae.decode(latents))


@pytest.mark.parametrize("scale", [0.01, 30.0])
def test_folding_the_scale_keeps_the_outputs(sae: SparseCoder, x: jax.Array, scale: float) -> None:
    latents = trained_threshold(sae, x).encode(x)
    folded = type(sae).from_artefact(sae.to_artefact(scale, {}))
    raw = x / scale
    np.testing.assert_allclose(folded.encode(raw), latents / scale, rtol=1e-4, atol=1e-6 / scale)
    np.testing.assert_allclose(
        folded.decode(latents / scale), sae.decode(latents) / scale, rtol=1e-4, atol=1e-5 / scale
    )


def test_projected_gradients_keep_the_norm_to_first_order() -> None:
    W, g = (jax.random.normal(jax.random.key(i), (D_SAE, D_MODEL)) for i in (0, 1))
    W = unit_rows(W)
    projected = project_gradient(W, g)
    np.testing.assert_allclose((projected * W).sum(axis=1), 0, atol=1e-5)
    np.testing.assert_allclose(projected + (g * W).sum(axis=1, keepdims=True) * W, g, atol=1e-5)


def test_unknown_names_list_the_known() -> None:
    with pytest.raises(UnknownNameError, match="one of topk, batchtopk, got 'gated'"):
        find("gated")
