"""A sweep: each of its SAEs is the one that would come of training it alone, and the run is as safe as any other."""

import json
import re
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from activations.errors import ConfigError, InterruptedRunError, MismatchError, NumericsError
from activations.store import ActivationStore
from activations.store_schema import HookStats
from sae.architectures import ARCHITECTURES
from sae.artefact import SaeArtefact
from sae.config import SaeConfig, SweepConfig, TrainConfig
from sae.log import read_log
from sae.plan import plan
from sae.step import Plan, StepMetrics, TrainState, create, make_step, start
from sae.sweep import make_sweep_step, owned, points, stack, unstack, widest
from sae.train import train
from sae.wiring import Wiring
from tests.sae.runs import BATCH, HOOK, OTHERS, WIRINGS, before_batch, short_run

D_MODEL, STEPS = 16, 25
MakeStore = Callable[..., ActivationStore]


@pytest.fixture
def store(make_store: MakeStore) -> ActivationStore:
    return make_store(hook_points=(HOOK, *OTHERS))


@pytest.fixture
def config(store: ActivationStore, tmp_path: Path) -> TrainConfig:
    sae, sweep = SaeConfig(d_sae=48, k=4, aux_k=8), SweepConfig(k=(3, 5), lr=(0.003, 0.01))
    return short_run(store, tmp_path / "run", STEPS, sae=sae, sweep=sweep, eval_every=10, checkpoint_every=10)


@pytest.fixture(params=["one by one, as on a CPU", "at once, as on an accelerator"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to take a step, with the kernels that go with them, on the CPU."""
    if "accelerator" in request.param:
        take_the_accelerators_path(monkeypatch)
    return request.param


def take_the_accelerators_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *arguments, default, **_: default(*arguments))


def with_architecture(name: str, **changes: Any) -> TrainConfig:
    sae = SaeConfig(architecture=name, d_sae=48, k=4, aux_k=8, groups=(0.25, 0.75))
    widths = (32, 48) if ARCHITECTURES[name].widens else None
    given = {"sae": sae, "sweep": SweepConfig(k=(3, 5), lr=(0.003, 0.01), d_sae=widths), "dead_fraction": 0.05}
    return TrainConfig(**given | {"batch_size": BATCH, "train_tokens": 30 * BATCH} | changes)


def plan_of(config: TrainConfig) -> Plan:
    wiring = Wiring.parse(WIRINGS[ARCHITECTURES[config.sae.architecture].reads])
    mean = np.full(D_MODEL, 1.0)
    stats = HookStats(100, mean, 4.0, mean_sq_norm=float(mean @ mean) + 4 * D_MODEL, norm_quantiles={})
    return Plan.make(config, wiring, dict.fromkeys((HOOK, *OTHERS), stats))


def first_state(config: TrainConfig) -> TrainState:
    """Six latents are hardly ever active, and so dead."""
    state = start(config, plan_of(config), create(config, plan_of(config)))
    state.params["b_enc"][...] = state.params["b_enc"][...].at[:6].set(-3)
    return state


def batch(i: int, d: int) -> np.ndarray:
    return np.random.default_rng(i).normal(1, 2, (BATCH, d)).astype(np.float32)


def run(config: TrainConfig, step: Any, state: TrainState) -> tuple[TrainState, list[Any], list[np.ndarray]]:
    """Take steps; returns the last state, each step's metrics, and after each step how long latents have been idle."""
    scaling, metrics, idle = plan_of(config).scaling, [], []
    for i in range(STEPS):
        x = batch(i, len(scaling.inputs))
        y = x if ARCHITECTURES[config.sae.architecture].reads != "pair" else batch(i + 100, len(scaling.outputs))
        state, got = step(state, x, y, scaling)
        metrics.append(jax.device_get(got))
        idle.append(np.array(state.idle))
    return state, metrics, idle


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_each_sae_is_what_it_would_be_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums of float32 come out in another order in another program, and Adam's steps amplify that: 1e-5 and no more.

    Which latents are active is the same on every step, so that each has been idle for the same time.
    """
    config = with_architecture(name)
    own = list(points(config).values())
    assert len(own) == (8 if ARCHITECTURES[name].widens else 4)
    alone = {i: run(own[i], make_step(own[i], plan_of(own[i])), first_state(own[i])) for i in (0, len(own) - 1)}
    for is_accelerated in (False, True):
        if is_accelerated:
            take_the_accelerators_path(monkeypatch)
        step = make_sweep_step(widest(config), plan_of(config), owned(own, [plan_of(point) for point in own]))
        states, metrics, idle = run(config, step, stack([first_state(point) for point in own]))
        for i, (state, expected, seen) in alone.items():
            assert max(float(each.terms["aux"]) for each in expected) > 0.1, "latents die and are revived"
            for got, wanted in zip(idle, seen, strict=True):
                np.testing.assert_array_equal(got[i, : len(wanted)], wanted)
            mine = jax.tree.map(lambda *values, i=i: [value[i] for value in values], *metrics)
            jax.tree.map(lambda wanted, got: close(got, wanted), together(expected), mine, is_leaf=is_list)
            np.testing.assert_array_equal(mine.l0, together(expected).l0)
            jax.tree.map(close, unstack(states, i, state), state)


def together(metrics: list[StepMetrics]) -> StepMetrics:
    return jax.tree.map(lambda *values: list(values), *metrics)


def is_list(value: object) -> bool:
    return isinstance(value, list)


def close(got: Any, wanted: Any) -> None:
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("path")
def test_what_pads_a_narrow_sae_stays_as_it_is() -> None:
    config = with_architecture("gated", sweep=SweepConfig(d_sae=(32, 48)))
    own = list(points(config).values())
    plans = [plan_of(point) for point in own]
    assert plans[0].lr > plans[1].lr, "automatic, each by its own width"
    step = make_sweep_step(widest(config), plans[0], owned(own, plans))
    states, metrics, _ = run(config, step, stack([first_state(point) for point in own]))
    assert (states.params["b_enc"][...][0, 32:] == -jnp.inf).all()
    assert (states.params["W_enc"][...][0, :, 32:] == 0).all()
    assert (states.params["W_dec"][...][0, 32:] == 0).all()
    assert (states.idle[0, 32:] == -1).all()
    assert all(np.isfinite(each.grad_norm).all() for each in metrics)
    assert np.isfinite(states.params["b_enc"][...][1]).all()


def test_on_an_accelerator_a_sweep_is_one_batched_step() -> None:
    """As many operations as for one SAE, all of them on a stack: no loop over SAEs, and no scatter that adds more."""

    def lowered(step: Any, state: TrainState, *more: Any) -> str:
        x = np.zeros((BATCH, D_MODEL), np.float32)
        return step.trace(state, x, x, plan_of(config).scaling, *more).lower(lowering_platforms=("cuda",)).as_text()

    for name in ("batchtopk", "jumprelu"):
        config = with_architecture(name, sweep=SweepConfig(k=(3, 5), lr=(0.003, 0.01)))
        own = list(points(config).values())
        ours = owned(own, [plan_of(point) for point in own])
        step = make_sweep_step(widest(config), plan_of(config), ours)
        assert isinstance(step, partial)
        many = lowered(step.func, stack([first_state(point) for point in own]), ours)
        one = lowered(make_step(own[0], plan_of(own[0])), first_state(own[0]))
        for operation in ("dot_general", "while", "scatter", "top_k", "sort"):
            pattern = rf"(?:stablehlo|chlo)\.{operation}\b"
            assert len(re.findall(pattern, many)) == len(re.findall(pattern, one)), operation
        assert not re.search(r"chlo\.top_k.*tensor<\d+x\d+x\d+x", many), "its fast form has two axes"
        products = re.findall(r"stablehlo\.dot_general.*", many)
        assert products
        assert all("batching_dims = [0] x [0]" in product for product in products)


# --- whole runs ------------------------------------------------------------------------------------------------------


def rows(path: Path) -> list[dict[str, Any]]:
    """Of the log, without what depends on the clock."""
    clock = ("tok_s", "eta_s")
    return [{key: row[key] for key in row if key not in clock} for row in read_log(path / "train.jsonl")]


def weights(path: Path) -> dict[str, bytes]:
    files = sorted((path / "sae").rglob("sae_weights.safetensors"))
    return {str(file.parent.relative_to(path / "sae")): file.read_bytes() for file in files}


def test_a_run_leaves_each_sae_with_its_own_name_config_and_log(config: TrainConfig, tmp_path: Path) -> None:
    config = config.model_copy(update={"sweep": SweepConfig(k=(3, 5), lr=(0.01,), seed=(0, 7), d_sae=(32, 48))})
    result = train(config)
    names = [f"k={k},lr=0.01,seed={seed},d_sae={width}" for k in (3, 5) for seed in (0, 7) for width in (32, 48)]
    assert list(result.saes) == list(weights(config.out)) == sorted(names, key=names.index)
    log = read_log(config.out / "train.jsonl")
    assert [(row["step"], row["sae"]) for row in log[:16]] == [(step, name) for step in (5, 10) for name in names]
    assert {row["hook_point"] for row in log} == {HOOK}
    for name, sae in result.saes.items():
        k, _, seed, width = (int(float(value)) for value in re.findall(r"=([^,]*)", name))
        saved = SaeArtefact.load(sae.path)
        assert (saved.d_sae, saved.hook_point, sae.path) == (width, HOOK, config.out / "sae" / name)
        last = [row for row in log if row["sae"] == name][-1]
        assert last["holdout_fvu"] == sae.metrics["fvu"]
        assert sum(last["holdout_density_histogram"]["counts"]) == width
        assert 0.6 * k < last["l0"] <= k + 0.1
        about = TrainConfig.model_validate(json.loads((sae.path / "saekit.json").read_text())["config"])
        assert (about.sae.k, about.lr, about.sae.d_sae, about.seed, about.weights_seed) == (k, 0.01, width, 0, seed)
        if name in (names[0], names[-1]):
            (alone,) = train(about.model_copy(update={"out": tmp_path / name})).saes.values()
            for tensor, value in alone.artefact.tensors().items():
                np.testing.assert_allclose(value, saved.tensors()[tensor], rtol=1e-5, atol=1e-5, err_msg=tensor)
    assert len({weights(config.out)[name] for name in names}) == len(names)


def test_a_sweep_goes_over_each_hook_point(config: TrainConfig) -> None:
    config = config.model_copy(update={"hook_points": (HOOK, "resid_post.0"), "sweep": SweepConfig(k=(3, 5))})
    result = train(config)
    names = [f"{hook}/k={k}" for hook in (HOOK, "resid_post.0") for k in (3, 5)]
    assert list(result.saes) == names
    assert set(weights(config.out)) == set(names)
    assert [row["sae"] for row in rows(config.out)[:4]] == names
    one = train(config.model_copy(update={"hook_points": (HOOK,), "out": config.out / "one"}))
    for k in (3, 5):
        assert one.saes[f"k={k}"].artefact.sha256 == result.saes[f"{HOOK}/k={k}"].artefact.sha256


def test_a_sweep_of_seeds_is_one_of_weights_on_the_same_data(config: TrainConfig, tmp_path: Path) -> None:
    config = config.model_copy(update={"sweep": SweepConfig(seed=(0, 7))})
    result = train(config)
    (alone,) = train(config.model_copy(update={"sweep": SweepConfig(), "out": tmp_path / "alone"})).saes.values()
    np.testing.assert_allclose(alone.artefact.W_enc, result.saes["seed=0"].artefact.W_enc, rtol=1e-5, atol=1e-5)
    assert not np.allclose(alone.artefact.W_enc, result.saes["seed=7"].artefact.W_enc, atol=0.01)


def test_an_accelerators_run_ends_as_that_of_a_cpu(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_cpu = train(config)
    take_the_accelerators_path(monkeypatch)
    at_once = train(config.model_copy(update={"out": tmp_path / "at_once"}))
    for name, sae in on_cpu.saes.items():
        np.testing.assert_allclose(sae.artefact.W_dec, at_once.saes[name].artefact.W_dec, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("path")
def test_an_interrupted_sweep_resumes_to_the_same_bits(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, broken = (config.model_copy(update={"out": tmp_path / out}) for out in ("whole", "broken"))
    train(whole)
    with monkeypatch.context() as patch:
        before_batch(patch, 12, lambda: signal.raise_signal(signal.SIGINT))
        with pytest.raises(InterruptedRunError, match="25 steps, got a stop after 13"):
            train(broken)
    assert train(broken).resumed_from == 13
    assert weights(broken.out) == weights(whole.out)
    assert rows(broken.out) == rows(whole.out)


def test_checkpoints_of_another_sweep_are_refused(config: TrainConfig) -> None:
    train(config)
    for sweep in (SweepConfig(k=(3, 5)), SweepConfig()):
        with pytest.raises(MismatchError, match=r"sweep=.*got sweep=\{'k': \[3, 5\], 'lr': \[0\.003, 0\.01\]\}"):
            train(config.model_copy(update={"sweep": sweep}))


def test_one_that_diverges_does_not_stop_the_others(config: TrainConfig, capsys: pytest.CaptureFixture[str]) -> None:
    def diverge(out: str, *lrs: float) -> TrainConfig:
        return config.model_copy(
            update={"sweep": SweepConfig(lr=lrs), "warmup_fraction": 0.0, "out": config.out / out, "log_every": 1}
        )

    result = train(diverge("some", 0.01, 1e38))
    assert list(result.saes) == ["lr=0.01"]
    assert capsys.readouterr().err.count("lr=1e+38 diverged by step") == 1
    last = rows(config.out / "some")[-1]
    assert (last["sae"], last["loss"]) == ("lr=1e+38", None)
    assert "holdout_fvu" not in last
    (alone,) = train(diverge("good", 0.01)).saes.values()
    np.testing.assert_allclose(alone.artefact.W_enc, result.saes["lr=0.01"].artefact.W_enc, rtol=1e-5, atol=1e-5)
    before = weights(config.out / "some")
    assert list(train(diverge("some", 0.01, 1e38)).saes) == ["lr=0.01"]
    assert weights(config.out / "some") == before
    with pytest.raises(NumericsError, match=r"lr=1e\+38, step"):
        train(diverge("all", 1e38, 2e38))


def test_finetuning_starts_each_point_from_the_same_sae(config: TrainConfig, tmp_path: Path) -> None:
    (first,) = train(config.model_copy(update={"sweep": SweepConfig()})).saes.values()
    again = {"finetune": first.path, "out": tmp_path / "again", "sweep": SweepConfig(lr=(1e-9, 0.01))}
    result = train(config.model_copy(update=again))
    np.testing.assert_allclose(result.saes["lr=1e-09"].artefact.W_enc, first.artefact.W_enc, atol=1e-5)
    assert not np.allclose(result.saes["lr=0.01"].artefact.W_enc, first.artefact.W_enc, atol=1e-3)


def test_a_dry_run_tells_what_a_sweep_takes(config: TrainConfig) -> None:
    one = plan(config.model_copy(update={"sweep": SweepConfig()}))
    many = plan(config)
    assert one is not None
    assert many is not None
    assert (many.n_steps, many.tokens) == (one.n_steps, one.tokens)
    assert many.memory_mb == pytest.approx(4 * one.memory_mb)
    assert [(name, sae.lr) for name, sae in many.saes.items()] == [
        ("k=3,lr=0.003", 0.003), ("k=3,lr=0.01", 0.01), ("k=5,lr=0.003", 0.003), ("k=5,lr=0.01", 0.01),
    ]  # fmt: skip
    widths = plan(config.model_copy(update={"sweep": SweepConfig(d_sae=(16, 48))}))
    assert widths is not None
    assert [sae.d_sae for sae in widths.saes.values()] == [16, 48]
    assert widths.memory_mb == pytest.approx(2 * one.memory_mb), "each takes the room of the widest"
    assert not config.out.exists()


@pytest.mark.parametrize(
    ("override", "match"),
    [
        ("sweep.k=[]", r"key 'sweep\.k': expected .*at least 1 item"),
        ("sweep.k=[16, 16]", r"key 'sweep\.k': expected each value once, got .*16, 16"),
        ("sweep.k=[0]", r"key 'sweep\.k\.0': expected .*greater than 0, got 0"),
        ("sweep.lr=0.1", r"key 'sweep\.lr': expected .*tuple, got 0\.1"),
        ("sweep.lr=[-1]", r"key 'sweep\.lr\.0'"),
        ("sweep.ks=[1]", r"unknown key 'sweep\.ks': expected one of the keys d_sae, k, lr, seed"),
    ],
)
def test_nonsense_is_refused_by_name(override: str, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        TrainConfig.load(None, [override])


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"sweep": SweepConfig(k=(4, 48))}, r"sweep\.k: expected less than d_sae=48, got 48"),
        ({"sweep": SweepConfig(d_sae=(4, 48))}, r"sae\.k: expected less than d_sae=4, got 4"),
        ({"sweep": SweepConfig(seed=(0, 1)), "finetune": Path("x")}, r"sweep\.seed: expected no finetune"),
        (
            {"sweep": SweepConfig(d_sae=(32, 48)), "sae": SaeConfig(architecture="matryoshka", k=4)},
            r"sweep\.d_sae: expected one width for matryoshka",
        ),
        (
            {"sweep": SweepConfig(d_sae=(32, 48)), "sae": SaeConfig(orthogonality=0.1, k=4)},
            r"sweep\.d_sae: expected one width with sae\.orthogonality",
        ),
    ],
)
def test_sweeps_that_cannot_be_are_refused(config: TrainConfig, change: dict[str, Any], match: str) -> None:
    for call in (train, plan):
        with pytest.raises(ConfigError, match=match):
            call(config.model_copy(update=change))
    assert not config.out.exists()
