"""benchmarks/train_step.py: its data and its dead latents are what it says, and it compares what it claims to."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import numpy as np
import pytest

TINY = ["--d-model", "16", "--d-sae", "64", "--k", "4", "--batch", "32", "--steps", "2", "--repeats", "3"]
Lines = Callable[..., list[dict[str, Any]]]


@pytest.fixture(scope="module")
def bench(load_benchmark: Callable[[str], ModuleType]) -> ModuleType:
    return load_benchmark("train_step")


@pytest.fixture
def run(bench: ModuleType, capsys: pytest.CaptureFixture[str]) -> Lines:
    """The lines that a command prints."""

    def lines(*words: str) -> list[dict[str, Any]]:
        bench.main([*TINY, *words])
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    return lines


def tiny(bench: ModuleType, **changes: Any) -> Any:
    return bench.Settings(**{"d_model": 16, "d_sae": 64, "k": 4, "batch": 32, **changes})


def test_activations_are_sparse_sums_that_vary_by_one_a_dimension(bench: ModuleType) -> None:
    settings = tiny(bench, batch=4096)
    data = bench.make_data(settings)
    assert len(data.batches) == bench.Settings().n_batches == 8
    x = np.concatenate(data.batches)
    assert len(np.unique(x[::4096], axis=0)) == 8, "batches differ"
    assert x.var(axis=0).mean() == pytest.approx(1, abs=0.05)
    rates, _ = bench.recipe(settings)
    assert rates.sum() == pytest.approx(4)
    assert len(rates) == 2 * x.shape[1]
    np.testing.assert_array_equal(bench.make_data(settings).batches[3], data.batches[3])
    np.testing.assert_allclose(data.stats[bench.HOOK_POINT].mean, x[:4096].mean(axis=0), atol=1e-4)
    assert tiny(bench, batch=2**20, d_model=4096).n_batches == 2, "fewer where they would take much memory"


@pytest.mark.parametrize("arch", ["topk", "batchtopk", "standard", "gated", "jumprelu", "jumprelu_tanh", "matryoshka"])
def test_every_architecture_gives_one_line(run: Lines, arch: str) -> None:
    (line,) = run("--arch", arch)
    assert line["who"] == "saekit"
    assert [line[name] for name in ("arch", "d_model", "d_sae", "k", "batch")] == [arch, 16, 64, 4, 32]
    assert len(line["all_ms"]) == line["repeats"] == 3
    assert line["ms_step"] == sorted(line["all_ms"])[1] > 0
    assert line["tok_s"] == pytest.approx(32_000 / line["ms_step"], rel=0.01)
    assert line["dtype"] == "float32"
    assert {"device", "kernels", "versions"} <= line.keys()
    assert not {"loss", "peak_bytes", "ratio_to_fastest_peer"} & line.keys()


def test_repeats_last_long_enough_unless_steps_are_given(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock on which a step takes 10 ms: half a second, found out in 1, 2, 4, 8 and 16 steps."""
    monkeypatch.setattr("_steps._clock", lambda run, steps: (run(steps), 0.01 * steps)[1])
    settings = tiny(bench, repeats=2, warm=3)
    config = bench.make_config(settings, {}, bench.LONG)
    trainer = bench.Trainer(settings, config, bench.make_data(settings), at=bench.LONG // 2)
    timing = bench.measure(trainer.run, settings)
    assert timing.steps == 50
    assert int(trainer.state.step) == bench.LONG // 2 + 3 + 31 + 2 * 50


@pytest.mark.parametrize("arch", ["topk", "batchtopk", "gated", "jumprelu"])
def test_so_many_latents_are_dead_all_the_time_and_no_others(bench: ModuleType, arch: str) -> None:
    settings = tiny(bench, arch=arch, dead=0.25)
    config, data = bench.make_config(settings, {}, bench.LONG), bench.make_data(settings)
    trainer = bench.Trainer(settings, config, data, at=bench.LONG // 2)
    for _ in range(60):
        state, metrics = trainer._step(trainer.state, data.batches[0], data.batches[0], trainer._plan.scaling)
        trainer.state = state
        assert metrics.dead_fraction == 0.25
        assert metrics.terms["aux"] > 0
    assert trainer.dead_latents == 16
    idle = np.asarray(state.idle)
    assert (idle[:16] == bench.LONGEST_IDLE).all()
    assert (idle[16:] == 0).any()

    awake = bench.Trainer(tiny(bench, arch=arch), config, data, at=bench.LONG // 2)
    _, metrics = awake._step(awake.state, data.batches[0], data.batches[0], awake._plan.scaling)
    assert (float(metrics.dead_fraction), float(metrics.terms["aux"])) == (0, 0)


def test_the_timed_steps_are_past_the_annealing_of_k(bench: ModuleType) -> None:
    settings = tiny(bench)
    config, data = bench.make_config(settings, {}, bench.LONG), bench.make_data(settings)
    trainer = bench.Trainer(settings, config, data, at=bench.LONG // 2)
    _, metrics = trainer._step(trainer.state, data.batches[0], data.batches[0], trainer._plan.scaling)
    assert metrics.l0 == settings.k


def test_check_trains_twice_from_the_same_start_and_tells_how_far_apart_they_end(
    bench: ModuleType, run: Lines, monkeypatch: pytest.MonkeyPatch
) -> None:
    (line,) = run("--check", "60", "--dead", "0.25")
    assert line["dead_latents"] == 16
    assert line["loss"] == line["loss_plain"] < 0.9
    assert line["loss_difference"] == 0
    assert 0 < line["difference_by_nudge"] < 0.01

    monkeypatch.setattr(bench, "kernels", lambda name: {"lr": 1e-5} if name == bench.PLAIN else {})
    (line,) = run("--check", "60")
    assert line["loss_plain"] > line["loss"]
    expected = (line["loss_plain"] - line["loss"]) / line["loss_plain"]
    assert line["loss_difference"] == pytest.approx(expected)


def test_settings_reach_the_config(bench: ModuleType, run: Lines) -> None:
    (line,) = run("--set", "sae.aux_coefficient=0", "--set", "compute.matmul=bfloat16")
    assert line["settings"] == {"sae.aux_coefficient": 0, "compute.matmul": "bfloat16"}
    assert line["dtype"] == "bfloat16"
    config = bench.make_config(tiny(bench), line["settings"], 10)
    assert (config.sae.aux_coefficient, config.train_tokens) == (0, 320)


def test_memory_is_told_where_jax_knows_it(run: Lines) -> None:
    (line,) = run("--memory")
    assert line["peak_bytes"] is None or line["peak_bytes"] > 0


def test_record_appends_a_row_a_line(run: Lines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("_results.FOLDER", tmp_path)
    (line,) = run("--record")
    written = (tmp_path / f"{line['device']}.csv").read_text()
    assert written.count("train_step") == 1


def test_a_peer_that_fails_gives_a_line_and_the_rest_goes_on(
    bench: ModuleType, run: Lines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken, fast = tmp_path / "broken", tmp_path / "fast"
    broken.write_text("#!/bin/sh\necho 'torch.OutOfMemoryError: no room' >&2\nexit 1\n")
    fast.write_text('#!/bin/sh\necho importing\necho \'{"tok_s": 1, "ms_step": 1}\'\n')
    for script in (broken, fast):
        script.chmod(0o755)
    monkeypatch.setenv("SAELENS_PYTHON", str(broken))
    monkeypatch.setenv("SPARSIFY_PYTHON", str(fast))
    lines = run("--peers")
    assert [line["who"] for line in lines] == ["saelens", "saelens", "sparsify", "saekit"]
    assert {line["failed"] for line in lines[:2]} == {"torch.OutOfMemoryError: no room"}
    assert [line["autocast"] for line in lines[:2]] == [False, True]
    assert lines[3]["ratio_to_fastest_peer"] == lines[3]["tok_s"]

    monkeypatch.setenv("SPARSIFY_PYTHON", str(tmp_path / "nowhere"))
    lines = run("--peer", "sparsify")
    assert "SPARSIFY_PYTHON" in lines[0]["failed"]
    assert "ratio_to_fastest_peer" not in lines[1]
    assert len(run("--peers", "--arch", "gated")) == 1, "none of the peers is asked for what it does not know"


def test_ours_failing_is_told_in_its_line(
    bench: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory\nand more")

    monkeypatch.setattr(bench, "measure", full)
    with pytest.raises(SystemExit) as stopped:
        bench.main(TINY)
    assert stopped.value.code == 1
    assert json.loads(capsys.readouterr().out)["failed"] == "RESOURCE_EXHAUSTED: Out of memory"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--arch", "transcoder"], "transcoder"),
        (["--d-sae", "many"], "many"),
        (["--k", "0"], "at least 1"),
        (["--k", "65"], "--d-sae, 64"),
        (["--dead", "1.5"], "1.5"),
        (["--kernels", "cuda"], "cuda"),
        (["--set", "lr"], "KEY=VALUE"),
        (["--set", "sae.nonsense=1"], "sae.nonsense"),
        (["--set", "compute.matmul=float8"], "compute.matmul"),
        (["--arch", "batchtopk", "--peer", "sparsify"], "sparsify"),
        (["--peer", "nobody"], "nobody"),
        (["--unknown"], "--unknown"),
    ],
)
def test_a_wrong_argument_is_told_in_one_line(bench: ModuleType, words: list[str], says: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        bench.main([*TINY, *words])
    message = stopped.value.code
    assert isinstance(message, str), "which Python prints, and exits with 1"
    assert says in message
    assert "\n" not in message
