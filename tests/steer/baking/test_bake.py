"""Vectors of a library become weights that do what steering does, or nothing is written."""

import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from activations.errors import ConfigError, MismatchError, ModelError, NumericsError, SaekitError
from activations.models import LoadedModel, load_model
from sae.checked_files import safetensors_heads
from steer.baking import adapter, bake, receipt, weights
from steer.baking.bake import RECEIPT
from steer.cli import main
from steer.config import BakeConfig
from steer.library import save_library
from steer.operations import Intervention
from steer.runtime import steering
from steer.vectors import SteeringVector


@pytest.fixture
def made(tmp_path: Path, vector: SteeringVector, tiny: LoadedModel) -> Callable[..., BakeConfig]:
    """A config that bakes this vector, changed."""

    def make(*vectors: dict[str, Any], **settings: Any) -> BakeConfig:
        usual = {"name": "v", "coefficient": 2.0}
        save_library(tmp_path / "library", [replace(vector, **usual | changes) for changes in vectors or ({},)])
        fixed = {"library": tmp_path / "library", "model": tiny.spec, "device": "cpu", "prompts": 2, "texts": 2}
        return BakeConfig(**fixed | {"out": tmp_path / "out", "first_token_kl": 100.0} | settings)

    return make


ABLATION = {"operation": "ablate", "hook_point": "mlp_out.2", "coefficient": 1.0}
PAIR = [{"name": "v@attn_out.1", **ABLATION, "hook_point": "attn_out.1"}, {"name": "v@mlp_out.2", **ABLATION}]


@torch.no_grad()
def logits(loaded: LoadedModel, model: Any = None) -> torch.Tensor:
    ids = torch.tensor([loaded.tokenizer("the cat sat on the mat, and the dog looked on")["input_ids"]])
    return (model or loaded.model)(ids).logits[0]


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing", "ignore:.*lora_bias=True")
@pytest.mark.parametrize("form", ["lora", "weights"])
@pytest.mark.parametrize("vectors", [[{}], [ABLATION], PAIR], ids=["add", "ablate", "two"])
def test_what_is_written_steers(vectors: Any, form: str, made: Any, tiny: LoadedModel) -> None:
    config = made(*vectors, form=form)
    told = bake.bake(config)
    assert told == json.loads((config.out / RECEIPT).read_text())
    assert {each["name"] for each in told["vectors"]} == {each.get("name", "v") for each in vectors}
    if form == "weights":
        baked = logits(load_model(str(config.out), device="cpu", dtype="float32"))
    else:
        from peft import PeftModel

        fresh = load_model(tiny.spec, device="cpu", dtype="float32")
        baked = logits(fresh, PeftModel.from_pretrained(fresh.model, str(config.out)))
    used = [*bake.find_vectors(config.library, None)]
    with receipt.on_every_token(tiny, used):
        torch.testing.assert_close(baked, logits(tiny), rtol=0, atol=1e-4)
    assert (baked - logits(tiny)).abs().max() > 1e-2
    for texts in ("prompts", "unrelated"):
        assert told["every_token"][texts]["max_abs"] < told["tolerance"] < 0.01 < told["effect"][texts]["max_abs"]
        assert told["every_token"][texts]["kl"] < 1e-6 < told["runtime"][texts]["kl"]
    assert sorted(path.name for path in config.out.parent.iterdir()) == ["library", "out"], "nothing is left beside it"


def test_what_it_is_compared_with_is_the_runtime_but_for_the_first_token(
    vector: SteeringVector, tiny: LoadedModel
) -> None:
    used = [replace(vector, coefficient=2.0), replace(vector, **ABLATION)]

    def first_left_alone(edited: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return torch.cat([value[:, :1], edited[:, 1:]], dim=1)

    with pytest.MonkeyPatch.context() as patch:
        write = receipt._writing
        patch.setattr(receipt, "_writing", lambda group: lambda h: first_left_alone(write(group)(h), h))
        with receipt.on_every_token(tiny, used):
            alike = logits(tiny)
    with receipt.on_every_token(tiny, used):
        everywhere = logits(tiny)
    with steering(tiny, [Intervention.of(each) for each in used]):
        torch.testing.assert_close(logits(tiny), alike, rtol=0, atol=1e-5)
        assert (logits(tiny) - everywhere).abs().max() > 1e-3


@pytest.mark.parametrize("form", ["lora", "weights"])
def test_what_differs_from_steering_is_not_kept(form: str, made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong: Any = bake.edits_of

    def too_much(vectors: Any, loaded: Any) -> Any:
        return wrong([replace(each, coefficient=1.01 * each.coefficient) for each in vectors], loaded)

    monkeypatch.setattr(bake, "edits_of", too_much)
    config = made(form=form)
    with pytest.raises(NumericsError, match="from those of the steered model"):
        bake.bake(config)
    assert [path.name for path in config.out.parent.iterdir()] == ["library"]


def test_a_first_token_that_matters_is_a_reason_to_refuse(made: Any) -> None:
    with pytest.raises(NumericsError, match="first_token_kl"):
        bake.bake(made(first_token_kl=0.0))
    assert not made().out.exists()


def test_gates_are_refused(made: Any, vector: SteeringVector) -> None:
    with pytest.raises(MismatchError, match="weights do not look at the token"):
        bake.bake(made({"gate": vector.energy_gate(0.2)}))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"scope": "generated"}, "the scope all"),
        ({"operation": "rotate"}, "which are affine"),
        ({"operation": "ablate", "hook_point": "resid_post.2"}, "all sub-layers before it wrote"),
        ({"hook_point": "resid_pre.0"}, "in front of which nothing has a bias"),
        ({"coefficient": 0.0}, "other than 0"),
        ({"coefficient": 1000.0}, "a dose of at most"),
        ({"window": (0.5, 1.0)}, "its calibrated window ends"),
        ({"model": None}, "made from"),
    ],
)
def test_what_weights_cannot_do_is_refused(changes: Any, words: str, made: Any, vector: SteeringVector) -> None:
    if "model" in changes:
        changes = {"model": vector.model.model_copy(update={"fingerprint": "ab" * 32})}
    for form in ("lora", "weights"):
        config = made(changes, form=form)
        with pytest.raises(SaekitError, match=words):
            bake.bake(config)
        assert not config.out.exists()


def test_force_goes_beyond_a_window(made: Any) -> None:
    assert bake.bake(made({"window": (0.5, 1.0)}, force=True))["vectors"][0]["coefficient"] == 2.0
    with pytest.raises(MismatchError, match="an empty directory"):
        bake.bake(made())
    with pytest.raises(ConfigError):
        BakeConfig.load(None, ["form=merged"])


def test_another_coefficient(made: Any) -> None:
    assert bake.bake(made(coefficient=0.5))["vectors"][0]["coefficient"] == 0.5


def test_quantised_weights_are_refused(made: Any, tiny_llama: Path, tmp_path: Path) -> None:
    other = tmp_path / "quantised"
    other.mkdir()
    for path in tiny_llama.iterdir():
        os.link(path, other / path.name)
    content = json.loads((tiny_llama / "config.json").read_text()) | {"quantization_config": {"quant_method": "fp8"}}
    (other / "config.json").unlink()
    (other / "config.json").write_text(json.dumps(content))
    with pytest.raises(ModelError, match="not quantised"):
        bake.bake(made(model=str(other)))


def test_weights_that_did_not_change_keep_their_dtype_and_values(made: Any, tiny_llama: Path, tmp_path: Path) -> None:
    half = tmp_path / "half"
    model = load_model(str(tiny_llama), device="cpu", dtype="bfloat16")
    model.model.save_pretrained(half)
    model.tokenizer.save_pretrained(half)
    source = load_model(str(half), device="cpu", dtype="float32")
    config = made({**ABLATION, "model": source.ref}, model=str(half), form="weights")
    told = bake.bake(config)
    assert told["changed"] == ["model.layers.2.mlp.down_proj.weight"]
    heads = safetensors_heads(config.out / "model.safetensors")
    assert {name for name, head in heads.items() if head.dtype == "F32"} == set(told["changed"])
    baked = load_model(str(config.out), device="cpu", dtype="float32")
    for (name, old), (_, new) in zip(
        source.model.state_dict().items(), baked.model.state_dict().items(), strict=True
    ):  # fmt: skip
        assert torch.equal(old, new) == (name not in told["changed"])
    assert baked.fingerprint != source.fingerprint, "vectors of the one do not pass for those of the other"
    assert baked.tokenizer_fingerprint == source.tokenizer_fingerprint


def test_biases_that_come_with_a_switch_are_zeros(made: Any) -> None:
    config = made(form="weights")
    bake.bake(config)
    assert json.loads((config.out / "config.json").read_text())["mlp_bias"] is True
    state = load_model(str(config.out), device="cpu", dtype="float32").model.state_dict()
    filled = [name for name, each in state.items() if name.endswith(".bias") and each.any()]
    assert filled == ["model.layers.1.mlp.down_proj.bias"]


def test_an_ablation_that_is_whole_leaves_nothing(tiny: LoadedModel, vector: SteeringVector, tmp_path: Path) -> None:
    used = replace(vector, **ABLATION)
    adapter.write_adapter(bake.edits_of([used], tiny), tiny, tmp_path)
    tensors = adapter.load_file(tmp_path / "adapter_model.safetensors")
    a, b = (tensors[f"base_model.model.model.layers.2.mlp.down_proj.lora_{each}.weight"] for each in "AB")
    weight = tiny.model.model.layers[2].mlp.down_proj.weight
    assert float((torch.from_numpy(used.direction) @ (weight + b @ a)).abs().max()) < 1e-6
    assert np.linalg.matrix_rank((b @ a).numpy(), tol=1e-6) == 1
    assert set(weights.SWITCHES) > {"mlp_bias"}


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing", "ignore:.*lora_bias=True")
def test_the_verb_bakes_shows_and_refuses(
    made: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = made({"name": "v"}, {"name": "turn", "operation": "rotate", "coefficient": 0.5})
    given = [f"{key}={getattr(config, key)}" for key in ("library", "model", "device", "prompts", "texts", "out")]

    def saekit(*more: str) -> tuple[int, str, str]:
        sets = [word for each in (*given, "first_token_kl=100") for word in ("--set", each)]
        monkeypatch.setattr(sys, "argv", ["saekit", "library", "bake", *sets, *more])
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        return code, *capsys.readouterr()

    code, out, _ = saekit("--dry-run", "--json")
    assert (code, json.loads(out)["config"]["form"], config.out.exists()) == (0, "lora", False)
    code, out, err = saekit("--set", "vector=turn")
    assert (code, out, config.out.exists()) == (1, "", False)
    assert "rotate" in err.splitlines()[-1]
    code, out, _ = saekit("--set", "vector=v", "--json")
    assert code == 0
    assert json.loads(out) == json.loads((config.out / RECEIPT).read_text())
    assert {path.name for path in config.out.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors", RECEIPT}
    code, _, err = saekit("--set", "vector=v")
    assert code == 1
    assert str(config.out) in err, "what is there is not written over"
