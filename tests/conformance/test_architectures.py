"""What every row of ARCHITECTURES promises, against dense references that share no code with it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from activations.errors import ConfigError, UnknownNameError
from sae.architectures import ARCHITECTURES, check_wiring, find
from sae.architectures.base import Context, Means, Output, Scaling, SparseCoder
from sae.architectures.batchtopk import BatchTopK
from sae.architectures.jumprelu import JumpReLU
from sae.architectures.penalised import Penalised
from sae.architectures.selecting import Selecting
from sae.artefact import SaeArtefact
from sae.config import SaeConfig
from sae.jax_view import JaxSae
from sae.kernels import densify, project_gradient, unit_rows
from sae.wiring import Wiring

BATCH, D_IN, D_SAE, K = 48, 12, 40, 4
D_OUT = {"transcoder": 10, "skip_transcoder": 10}
GROUPS = (0.1, 0.2, 0.3, 0.4)
VARIANCE, NEVER, ALWAYS, N_STEPS = 12.0, 10**6, 0, 100
WIRINGS = {"one": "resid_post.1", "pair": "resid_mid.1->mlp_out.1", "several": "resid_post.1+resid_post.2"}
SELECTING = [name for name, kind in ARCHITECTURES.items() if issubclass(kind, Selecting)]
JUMPING = ["jumprelu", "jumprelu_tanh"]
PENALISED = [name for name, kind in ARCHITECTURES.items() if issubclass(kind, Penalised)]
Parameters = dict[str, jax.Array]


def build(name: str, **changes: Any) -> SparseCoder:
    """One whose encoder is no longer tied and whose biases are not zero, as after some training."""
    settings = {"architecture": name, "d_sae": D_SAE, "k": K, "k_anneal": 0.0, "aux_k": 10, "groups": GROUPS}
    config = SaeConfig(**settings | changes)
    d_out = D_OUT.get(name, D_IN)
    means = Means(jnp.ones(D_IN) / 2, jnp.linspace(0, 1, d_out) if name in D_OUT else jnp.ones(d_out) / 2)
    sae = find(name)(config, means, jax.random.key(0))
    for i, param in enumerate(("W_enc", "b_enc", "W_skip", "r_mag", "b_mag", "threshold")):
        if isinstance(value := getattr(sae, param, None), nnx.Param):
            value[...] += 0.1 * jax.random.normal(jax.random.key(i + 1), value[...].shape)
    return sae


@pytest.fixture(params=ARCHITECTURES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def sae(name: str) -> SparseCoder:
    return build(name)


@pytest.fixture
def x() -> jax.Array:
    return jax.random.normal(jax.random.key(7), (BATCH, D_IN)) + 0.5


@pytest.fixture
def y(name: str, x: jax.Array) -> jax.Array:
    return jnp.tanh(x[:, : D_OUT[name]]) + 0.1 if name in D_OUT else x


def context(dead_after: int = NEVER, **changes: Any) -> Context:
    """Latent j was last active j tokens ago."""
    return Context(VARIANCE, jnp.arange(D_SAE, dtype=jnp.int32), dead_after, 0, N_STEPS)._replace(**changes)


def parameters(sae: SparseCoder) -> Parameters:
    _, params, _ = nnx.split(sae, nnx.Param, ...)
    return {str(key): value[...] for key, value in params.items()}


def gradients(sae: SparseCoder, scalar: Callable[[SparseCoder], jax.Array]) -> Parameters:
    graph, params, rest = nnx.split(sae, nnx.Param, ...)
    grads: Any = jax.grad(lambda p: scalar(nnx.merge(graph, p, rest)))(params)
    return {str(key): value[...] for key, value in grads.items()}


def used(sae: SparseCoder, x: jax.Array, y: jax.Array) -> SparseCoder:
    """The SAE after it observed two batches: a running threshold is then defined, and equal to no pre-activation."""
    for part in (slice(None), slice(BATCH // 2)):
        sae.observe(sae.loss(x[part], y[part], context()), context())
    return sae


def scaling(name: str, scale: float) -> Scaling:
    """One scale everywhere; for a crosscoder one a hook point, for a transcoder one a side."""
    inputs = np.full(D_IN, scale, np.float32)
    if name == "crosscoder":
        inputs[D_IN // 2 :] *= 3
    outputs = inputs if name not in D_OUT else np.full(D_OUT[name], 2 * scale, np.float32)
    return Scaling(inputs, outputs)


def selected(name: str, pre: np.ndarray) -> np.ndarray:
    """Which latents a training batch keeps, by sorting everything."""
    positive = np.maximum(pre, 0)
    if name == "topk":
        cutoff = np.sort(positive, axis=1)[:, -K][:, None]
    else:
        positive *= positive >= np.sort(positive, axis=1)[:, -2 * K][:, None]  # no token takes more than 2k
        cutoff = np.sort(positive, axis=None)[-K * len(pre)]
    return (positive >= cutoff) & (positive > 0)


def dense_latents(name: str, p: Parameters, x: jax.Array, mask: np.ndarray | None) -> jax.Array:
    """Latents of every architecture; `mask` holds those of the selecting ones fixed."""
    centre = 0.5 if name in D_OUT else p["b_dec"]
    projected = (x - centre) @ p["W_enc"]
    if name == "gated":
        gate = projected + p["b_enc"]
        return (gate > 0) * jax.nn.relu(projected * jnp.exp(p["r_mag"]) + p["b_mag"])
    pre = projected + p["b_enc"]
    if name.startswith("jumprelu"):
        return jax.nn.relu(pre) * (pre > p["threshold"])
    return jax.nn.relu(pre) * (1 if mask is None else mask)


def reference_cost(name: str, p: Parameters, x: jax.Array, y: jax.Array, mask: np.ndarray | None) -> jax.Array:
    """The loss without what revives dead latents, dense and differentiable by JAX alone, steps excepted."""
    latents = dense_latents(name, p, x, mask)
    skip = (x - 0.5) @ p["W_skip"].T if name == "skip_transcoder" else 0
    full = y - latents @ p["W_dec"] - p["b_dec"] - skip
    cost = (full**2).sum(1).mean() / VARIANCE
    if name == "matryoshka":
        nested = [y - latents[:, :n] @ p["W_dec"][:n] - p["b_dec"] for n in (4, 12, 24, 40)]
        cost = sum((error**2).sum(1).mean() / VARIANCE for error in nested) / 4
    if name == "standard":
        cost += 0.1 * latents.sum(1).mean() / D_IN
    if name == "gated":
        gate = jax.nn.relu((x - p["b_dec"]) @ p["W_enc"] + p["b_enc"])
        W_dec, b_dec = jax.lax.stop_gradient((p["W_dec"], p["b_dec"]))
        cost += 0.1 * gate.sum(1).mean() / D_IN + ((x - gate @ W_dec - b_dec) ** 2).sum(1).mean() / D_IN
    if name == "jumprelu_tanh":
        cost += 0.1 * jnp.tanh(4 * latents).sum(1).mean() / D_IN
    if name == "jumprelu":
        cost += 0.1 * ((latents > 0).sum(1).mean() / K - 1) ** 2
    return cost


def reference_revival(name: str, p: Parameters, x: jax.Array, residual: jax.Array, dead: np.ndarray) -> jax.Array:
    """What dead latents leave of a residual."""
    centre = 0.5 if name in D_OUT else jax.lax.stop_gradient(p["b_dec"])
    pre = jax.nn.relu((x - centre) @ p["W_enc"] + p["b_enc"])
    error = residual - (pre * dead) @ p["W_dec"]
    return (error**2).sum() / ((residual - residual.mean(0)) ** 2).sum() if dead.any() else jnp.float32(0)


def gradients_of_steps(p: Parameters, name: str, x: jax.Array, y: jax.Array, bandwidth: float) -> Parameters:
    """By definition: pre - threshold within half a bandwidth passes on what a latent, or its count, would cost."""
    above = (x - p["b_dec"]) @ p["W_enc"] + p["b_enc"] - p["threshold"]

    def of_latents(latents: jax.Array) -> jax.Array:
        cost = ((y - latents @ p["W_dec"] - p["b_dec"]) ** 2).sum(1).mean() / VARIANCE
        return cost + (0.1 * jnp.tanh(4 * latents).sum(1).mean() / D_IN if name == "jumprelu_tanh" else 0)

    latents = dense_latents(name, p, x, None)
    of_count = 0.1 * 2 * ((latents > 0).sum(1).mean() / K - 1) / K / BATCH if name == "jumprelu" else 0
    passed = (jnp.abs(above) < bandwidth / 2) * (p["threshold"] * jax.grad(of_latents)(latents) + of_count) / bandwidth

    def weighted(q: Parameters) -> jax.Array:
        return (passed * ((x - q["b_dec"]) @ q["W_enc"] + q["b_enc"] - q["threshold"])).sum()

    return jax.grad(weighted)(p)


def test_it_starts_with_unit_rows_at_the_mean(name: str) -> None:
    d_out = D_OUT.get(name, D_IN)
    means = Means(jnp.arange(D_IN, dtype=jnp.float32), jnp.arange(d_out, dtype=jnp.float32))
    sae = find(name)(SaeConfig(architecture=name, d_sae=D_SAE, k=K, groups=GROUPS), means, jax.random.key(0))
    if d_out == D_IN:
        np.testing.assert_array_equal(sae.W_enc[...], sae.W_dec[...].T)
    for rows in (sae.W_dec[...], sae.W_enc[...].T):
        np.testing.assert_allclose(jnp.linalg.norm(rows, axis=1), 1, atol=1e-6)
    np.testing.assert_array_equal(sae.b_dec[...], means.outputs)
    assert not sae.b_enc[...].any()


def test_shapes(name: str, sae: SparseCoder, x: jax.Array, y: jax.Array) -> None:
    out = sae.loss(x, y, context())
    assert out.loss.shape == out.l0.shape == ()
    assert out.active.shape == (D_SAE,)
    assert {"fvu", "aux"} <= out.terms.keys()
    artefact = sae.to_artefact(scaling(name, 1.0), {})
    assert (artefact.d_model, artefact.d_sae, artefact.d_out) == (D_IN, D_SAE, D_OUT.get(name, D_IN))
    assert artefact.transcodes == (name in D_OUT)


@pytest.mark.parametrize("name", SELECTING)
def test_training_keeps_the_latents_of_the_sorted_reference(name: str, x: jax.Array) -> None:
    sae = build(name)
    assert isinstance(sae, Selecting)
    pre = sae.preactivations(x)
    mask = selected(name, np.asarray(pre))
    np.testing.assert_array_equal(densify(sae.select(x, K, 2 * K)[0], D_SAE), np.where(mask, pre, 0))
    assert mask.sum() == K * BATCH, "k latents a token"
    if name == "topk":
        assert (mask.sum(axis=1) == K).all(), "in each token"


@pytest.mark.parametrize("dead_after", [NEVER, 35, ALWAYS])
def test_loss_and_gradients_equal_the_dense_reference(
    name: str, sae: SparseCoder, x: jax.Array, y: jax.Array, dead_after: int
) -> None:
    params = parameters(sae)
    mask = selected(name, np.asarray(sae.preactivations(x))) if name in SELECTING else None
    dead = (np.arange(D_SAE) >= D_SAE - 10) & (np.arange(D_SAE) >= dead_after)
    latents = dense_latents(name, params, x, mask)
    skip = (x - 0.5) @ params["W_skip"].T if name == "skip_transcoder" else 0
    residual = y - latents @ params["W_dec"] - params["b_dec"] - skip

    def reference(p: Parameters) -> jax.Array:
        return reference_cost(name, p, x, y, mask) + reference_revival(name, p, x, residual, dead) / 32

    expected, grads = jax.value_and_grad(reference)(params)
    if "threshold" in grads:
        grads = jax.tree.map(jnp.add, grads, gradients_of_steps(params, name, x, y, sae.config.bandwidth))
    out = sae.loss(x, y, context(dead_after))
    assert float(out.loss) == pytest.approx(float(expected), rel=1e-5)
    assert float(out.terms["fvu"]) == pytest.approx(float((residual**2).sum(1).mean() / VARIANCE), rel=1e-5)
    got = gradients(sae, lambda s: s.loss(x, y, context(dead_after)).loss)
    assert got.keys() == grads.keys()
    for tensor, value in got.items():
        np.testing.assert_allclose(value, grads[tensor], rtol=1e-4, atol=2e-6, err_msg=tensor)


@pytest.mark.parametrize("name", JUMPING)
def test_gradients_of_steps_from_every_nth_token_are_right_on_average(name: str, x: jax.Array, y: jax.Array) -> None:
    every, some = build(name), build(name, step_tokens=BATCH // 4)
    exact = gradients(every, lambda s: s.loss(x, y, context()).loss)
    rolled = [(jnp.roll(x, i, axis=0), jnp.roll(y, i, axis=0)) for i in range(4)]
    estimates = [gradients(some, lambda s, pair=pair: s.loss(*pair, context()).loss) for pair in rolled]
    assert not np.allclose(estimates[0]["threshold"], exact["threshold"], rtol=0.1), "one estimate is not it"
    for tensor, value in exact.items():
        mean = sum(estimate[tensor] for estimate in estimates) / 4
        np.testing.assert_allclose(mean, value, rtol=1e-4, atol=2e-6, err_msg=tensor)


def test_a_token_whose_steps_count_is_one_and_the_same_everywhere(x: jax.Array) -> None:
    """Of 11 tokens the first and the fifth stand for all where every fourth does."""
    x = x[:11]
    sae = build("jumprelu", step_tokens=3)
    others = [i for i in range(11) if i not in (0, 4)]
    swapped = jnp.array([0, *others[:3], 4, *others[:2:-1]])
    a, b = (gradients(sae, lambda s, o=o: s.loss(x[o], x[o], context()).loss) for o in (jnp.arange(11), swapped))
    for tensor, value in a.items():
        np.testing.assert_allclose(b[tensor], value, rtol=1e-4, atol=2e-6, err_msg=tensor)


def test_of_many_that_pass_those_farthest_above_their_thresholds_are_kept(x: jax.Array) -> None:
    sae = build("jumprelu", k=2)
    assert isinstance(sae, JumpReLU)
    sae.threshold[...] *= 0.1
    codes, passing = sae.select(x, context())
    pre, threshold = np.asarray(sae.preactivations(x)), np.asarray(jax.nn.relu(sae.threshold[...]))
    above = np.maximum(pre - threshold, 0)
    kept = (above >= np.sort(above, axis=1)[:, -8][:, None]) & (above > 0)
    np.testing.assert_array_equal(passing, (above > 0).sum(axis=1))
    assert (passing > 8).any(), "four times k is not enough here"
    np.testing.assert_allclose(densify(codes, D_SAE), np.where(kept, pre, 0), rtol=1e-5, atol=1e-6)


def test_what_is_counted_as_active_is_active(name: str, sae: SparseCoder, x: jax.Array, y: jax.Array) -> None:
    mask = selected(name, np.asarray(sae.preactivations(x))) if name in SELECTING else None
    latents = np.asarray(dense_latents(name, parameters(sae), x, mask))
    out = sae.loss(x, y, context())
    np.testing.assert_array_equal(out.active, (latents > 0).sum(0))
    assert float(out.l0) == pytest.approx((latents > 0).sum() / BATCH)


def test_revival_reaches_the_weights_of_dead_latents_only(
    name: str, sae: SparseCoder, x: jax.Array, y: jax.Array
) -> None:
    def revived(dead_after: int) -> Parameters:
        return gradients(sae, lambda s: s.revival(x, y - 0.5, context(dead_after)))

    grads = revived(35)
    reached = np.asarray(jnp.abs(grads["W_enc"]).sum(axis=0)) > 0
    assert reached[35:].all()
    assert not reached[:35].any()
    assert (np.asarray(jnp.abs(grads["W_dec"]).sum(axis=1)) > 0).tolist() == reached.tolist()
    assert not np.asarray(revived(NEVER)["W_enc"]).any()


def test_inference_in_the_saved_form_is_what_training_computes(
    name: str, sae: SparseCoder, x: jax.Array, y: jax.Array
) -> None:
    sae = used(sae, x, y)
    scales = Scaling(np.ones(D_IN), np.ones(D_IN)) if name == "crosscoder" else scaling(name, 1.0)
    artefact = sae.to_artefact(scales, {})
    latents = np.asarray(JaxSae(artefact).encode(x))
    assert (latents >= 0).all()
    if name in SELECTING:
        assert (latents > 0).sum() / BATCH == pytest.approx(K, abs=0 if name == "topk" else 0.3)
    if name in PENALISED:
        norm = 1 / scaling(name, 1.0).outputs[0]
        np.testing.assert_allclose(latents, dense_latents(name, parameters(sae), x, None) * norm, rtol=1e-4, atol=1e-5)


def test_saving_and_loading_keeps_the_outputs_bitwise(
    name: str, sae: SparseCoder, x: jax.Array, y: jax.Array, tmp_path: Path
) -> None:
    artefact = used(sae, x, y).to_artefact(scaling(name, 0.37), {"hook_point": WIRINGS[type(sae).reads]})
    artefact.save(tmp_path / "sae")
    before, after = JaxSae(artefact), JaxSae(SaeArtefact.load(tmp_path / "sae"))
    latents = before.encode(x)
    np.testing.assert_array_equal(after.encode(x), latents)
    np.testing.assert_array_equal(after.reconstruct(x, latents), before.reconstruct(x, latents))


@pytest.mark.parametrize("scale", [0.01, 30.0])
def test_folding_scales_and_norms_keeps_the_outputs(
    name: str, sae: SparseCoder, x: jax.Array, y: jax.Array, scale: float
) -> None:
    """Against the scaled SAE computed in float64, with raw inputs and outputs."""
    sae, scales = used(sae, x, y), scaling(name, scale)
    artefact = sae.to_artefact(scales, {})
    np.testing.assert_allclose(np.linalg.norm(artefact.W_dec, axis=1), 1, rtol=1e-5)
    p = {key: np.asarray(value, np.float64) for key, value in parameters(sae).items()}
    raw = np.asarray(x, np.float64) / scales.inputs
    folded = JaxSae(artefact)
    latents = np.asarray(folded.encode(jnp.asarray(raw, jnp.float32)), np.float64)
    norm = np.linalg.norm(p["W_dec"] / scales.outputs, axis=1)
    threshold = getattr(sae, "threshold", None)
    mask = None
    if name in SELECTING:
        pre = np.asarray(sae.preactivations(x))
        mask = selected(name, pre) if name == "topk" else pre > float(threshold[...])  # type: ignore[index]
    expected = np.asarray(dense_latents(name, parameters(sae), x, mask), np.float64)
    np.testing.assert_allclose(latents, expected * norm, rtol=2e-4, atol=1e-4 * norm.max())
    y_hat = expected @ p["W_dec"] + p["b_dec"]
    y_hat += (np.asarray(x) - 0.5) @ p["W_skip"].T if name == "skip_transcoder" else 0
    got = folded.reconstruct(jnp.asarray(raw, jnp.float32), jnp.asarray(latents, jnp.float32))
    np.testing.assert_allclose(np.asarray(got) * scales.outputs, y_hat, rtol=1e-3, atol=2e-4)


def test_adopting_a_saved_sae_gives_it_back(name: str, sae: SparseCoder, x: jax.Array, y: jax.Array) -> None:
    scales = scaling(name, 0.37)
    artefact = used(sae, x, y).to_artefact(scales, {})
    other = build(name)
    other.W_dec[...] = unit_rows(jax.random.normal(jax.random.key(99), other.W_dec[...].shape))
    other.adopt(artefact, scales)
    again = other.to_artefact(scales, {})
    raw = x / scales.inputs
    latents = JaxSae(artefact).encode(raw)
    np.testing.assert_allclose(JaxSae(again).encode(raw), latents, rtol=1e-3, atol=1e-4 * float(latents.max()))
    np.testing.assert_allclose(
        JaxSae(again).reconstruct(raw, latents), JaxSae(artefact).reconstruct(raw, latents), rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("name", SELECTING)
def test_more_latents_are_selected_at_first(name: str, x: jax.Array, y: jax.Array) -> None:
    sae = build(name, k_anneal=0.5)
    l0 = [float(sae.loss(x, y, context(step=step)).l0) for step in (0, 25, 50, 99)]
    assert l0 == pytest.approx([2 * K, 1.5 * K, K, K], abs=0.01)
    once = build(name).loss(x, y, context())
    late = sae.loss(x, y, context(step=50))
    assert float(late.loss) == pytest.approx(float(once.loss), rel=1e-6)


@pytest.mark.parametrize("name", [name for name in SELECTING if issubclass(ARCHITECTURES[name], BatchTopK)])
def test_the_threshold_settles_where_k_pass(name: str, x: jax.Array, y: jax.Array) -> None:
    """Also from a threshold that is far off, where a mean of the batches' cutoffs would let more pass."""
    sae = build(name)
    assert isinstance(sae, BatchTopK)
    sae.observe(sae.loss(x, y, context()), context())
    assert float(sae.threshold[...]) == pytest.approx(float(sae.loss(x, y, context()).observed["cutoff"]))
    observe = nnx.jit(lambda sae: sae.observe(sae.loss(x, y, context()), context()))
    for start in (1e-3, 30.0):
        sae.threshold[...] = jnp.float32(start)
        for _ in range(120):
            observe(sae)
        passing = (sae.preactivations(x) > sae.threshold[...]).sum() / BATCH
        assert float(passing) == pytest.approx(K, abs=0.15)


@pytest.mark.parametrize("name", PENALISED)
def test_a_penalty_moves_towards_k(name: str, x: jax.Array) -> None:
    def moved(l0: float, **changes: Any) -> float:
        sae: Any = build(name, **changes)
        before = float(sae.coefficient[...])
        zero = jnp.float32(0)
        sae.observe(Output(zero, {}, jnp.float32(l0), jnp.zeros(D_SAE, jnp.int32), {}), context())
        return float(sae.coefficient[...]) / before

    if name == "jumprelu":
        assert moved(10 * K) == 1, "it moves its target instead"
    else:
        assert moved(10 * K) > moved(1.1 * K) > moved(K) == 1 > moved(0.5 * K)
    assert moved(10 * K, sparsity_coefficient=0.3) == 1


def test_the_target_of_jumprelu_moves_until_l0_is_k() -> None:
    def moved(l0: float, steps: int = 1) -> float:
        sae = build("jumprelu")
        assert isinstance(sae, JumpReLU)
        assert float(sae.target[...]) == K
        for _ in range(steps):
            sae.observe(Output(jnp.float32(0), {}, jnp.float32(l0), jnp.zeros(D_SAE, jnp.int32), {}), context())
        return float(sae.target[...])

    assert moved(10 * K) < moved(1.1 * K) < moved(K) == K < moved(0.5 * K)
    assert moved(10 * K, steps=200) == K / 4, "and no farther"


def test_projected_gradients_keep_the_norm_to_first_order() -> None:
    W, g = (jax.random.normal(jax.random.key(i), (D_SAE, D_IN)) for i in (0, 1))
    W = unit_rows(W)
    projected = project_gradient(W, g)
    np.testing.assert_allclose((projected * W).sum(axis=1), 0, atol=1e-5)
    np.testing.assert_allclose(projected + (g * W).sum(axis=1, keepdims=True) * W, g, atol=1e-5)


def test_unknown_names_list_the_known() -> None:
    with pytest.raises(UnknownNameError, match=r"one of standard, gated, topk, .*, got 'relu'"):
        find("relu")


def test_a_wiring_fits_or_is_refused(name: str) -> None:
    for kind, text in WIRINGS.items():
        if kind == find(name).reads:
            check_wiring(name, Wiring.parse(text))
        else:
            with pytest.raises(ConfigError, match=f"for {name}, got resid"):
                check_wiring(name, Wiring.parse(text))


@pytest.mark.parametrize(
    ("groups", "match"), [((0.5, 0.6), "add up to 1, got 1.1"), ((0.001, 0.999), r"at least one of d_sae=40 latents")]
)
def test_groups_must_split_the_latents(groups: tuple[float, ...], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        build("matryoshka", groups=groups)
