"""Every family, on tiny random models: what is baked does what steering does, on every token, or is refused.

A vector is steered with at a hook point of the middle block and baked both ways; what comes back from the files is
compared. Which families refuse what is written down here, so that a refusal is no way out.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from activations.errors import MismatchError
from activations.hook_points import SITES, HookPoint
from activations.models import LoadedModel
from activations.quiet import quiet_transformers
from activations.store_schema import ModelRef
from steer.baking.adapter import with_adapter, write_adapter
from steer.baking.edits import edits_of
from steer.baking.receipt import on_every_token
from steer.baking.weights import write_weights
from steer.vectors import SteeringVector
from tests.conformance.test_families import D_MODEL, N_LAYERS, Case, all_cases, each_case, tiny_model, token_ids
from tests.conformance.test_steering import loaded

FORMS = ("lora", "weights")
BEHIND_NORMS = {"gemma2", "gemma3_text", "exaone4", "flex_olmo", "olmo2", "olmo3"}
"""what a sub-layer writes has been normed: no weights do what a vector does there"""
EXPERTS = {"deepseek_v2", "deepseek_v3", "deepseek_v4", "deepseek_v4-sliding", "dots1", "ernie4_5_moe", "glm4_moe",
           "gpt_oss", "mixtral", "olmoe", "qwen2_moe", "qwen3_moe"}  # fmt: skip
"""their MLPs, in block 1, are experts: no LoRA of modules"""
DENSE_FIRST = {"deepseek_v2", "deepseek_v3", "dots1", "ernie4_5_moe", "glm4_moe"}
"""of these, those whose block 0, which writes resid_pre.1, has no experts"""
ALL_WEIGHED = {"gpt_oss", "mixtral", "olmoe", "qwen2_moe", "qwen3_moe"}
"""of these, those without an expert that every token gets as it is: no constant"""
ATTENTION_BIAS = {"deepseek_v2", "deepseek_v3", "gpt2", "gpt_neox", "gpt_neox-sequential", "arcee", "ernie4_5", "gemma",
                  "hunyuan_v1_dense", "llama", "nemotron", "olmo", "qwen3", "seed_oss", "smollm3", "starcoder2",
                  "dots1", "ernie4_5_moe", "gpt_oss", "olmoe", "qwen3_moe", "phi"}  # fmt: skip
"""whose attention can write a constant: it has a bias, or a switch for one"""
MLP_BIAS = {"deepseek_v2", "deepseek_v4", "deepseek_v4-sliding", "gpt2", "gpt_neox", "gpt_neox-sequential", "arcee",
            "cwm", "ernie4_5", "helium", "llama", "nemotron", "seed_oss", "smollm3", "starcoder2", "ernie4_5_moe",
            "phi"}  # fmt: skip
"""whose MLP can"""
DIRECTION = np.cos(np.arange(D_MODEL)).astype(np.float32)
DIRECTION /= np.linalg.norm(DIRECTION)


def vector(site: str, operation: str, coefficient: float) -> SteeringVector:
    model = ModelRef(id="tiny", fingerprint="", n_layers=N_LAYERS, d_model=D_MODEL)
    return SteeringVector("v", DIRECTION, f"{site}.1", model, 4.0, {}, coefficient, operation=operation)


def is_exact(case: Case, site: str, operation: str, form: str) -> bool:
    """Whether there are weights for it."""
    if case.name in BEHIND_NORMS or site.endswith("_in") or (operation == "ablate" and site.startswith("resid")):
        return False
    if case.has_streams and site.startswith("resid"):
        return False
    is_attention = site in ("attn_out", "resid_mid")
    has_experts = not is_attention and case.name in EXPERTS
    if form == "lora":
        return not has_experts or (site == "resid_pre" and case.name in DENSE_FIRST)
    if operation == "ablate":
        return True
    if has_experts and case.name in ALL_WEIGHED:
        return False
    return case.name in (ATTENTION_BIAS if is_attention else MLP_BIAS)


@pytest.fixture
def stored(tmp_path: Path) -> Any:
    """A model of a case in a folder, loaded from it, so that it may be changed."""

    def load(case: Case) -> LoadedModel:
        folder = tmp_path / "source"
        if not folder.exists():
            tiny_model(case).save_pretrained(folder)
        return replace(loaded(case), model=reloaded(folder), spec=str(folder))

    return load


def reloaded(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    with quiet_transformers():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(token_ids(), use_cache=False).logits


def baked(source: LoadedModel, vectors: list[SteeringVector], form: str, folder: Path) -> Tensor:
    """Logits of what was written, once it was read again."""
    folder.mkdir(exist_ok=True)
    edits = edits_of(vectors, source)
    if form == "weights":
        assert write_weights(edits, source, folder)
        return logits(reloaded(folder))
    assert write_adapter(edits, source, folder)
    with with_adapter(source.model, folder):
        return logits(source.model)


def steered(source: LoadedModel, vectors: list[SteeringVector]) -> Tensor:
    with on_every_token(source, vectors):
        return logits(source.model)


@each_case
@pytest.mark.parametrize("form", FORMS)
def test_what_is_baked_is_what_steering_does(case: Case, form: str, stored: Any, tmp_path: Path) -> None:
    for number, (site, operation, coefficient) in enumerate(
        (site, operation, coefficient)
        for site in case.sites
        for operation, coefficient in (("add", 2.5), ("ablate", 0.75))
    ):
        source, given = stored(case), [vector(site, operation, coefficient)]
        if not is_exact(case, site, operation, form):
            with pytest.raises(MismatchError, match="Steer with it while the model runs"):
                baked(source, given, form, tmp_path / f"{number}")
            continue
        expected, plain = steered(source, given), logits(source.model)
        assert (expected - plain).abs().max() > 1e-2
        torch.testing.assert_close(baked(source, given, form, tmp_path / f"{number}"), expected, rtol=0, atol=2e-4)


def test_the_lists_name_families_that_there_are() -> None:
    names = {case.name for case in all_cases()}
    assert names >= BEHIND_NORMS | EXPERTS | ATTENTION_BIAS | MLP_BIAS
    assert EXPERTS >= ALL_WEIGHED | DENSE_FIRST


@each_case
@pytest.mark.parametrize("form", FORMS)
def test_several_vectors_at_one_writer(case: Case, form: str, stored: Any, tmp_path: Path) -> None:
    """Two ablations along directions that are not orthogonal, and adds before and behind, at once."""
    if not is_exact(case, "attn_out", "add", form):
        return
    other = np.roll(DIRECTION, 3) + DIRECTION
    has_behind = "resid_mid" in case.sites and is_exact(case, "resid_mid", "add", form)
    several = [
        vector("attn_out", "ablate", 1.0), vector("attn_out", "add", 1.5),
        replace(vector("attn_out", "ablate", -0.5), direction=(other / np.linalg.norm(other)).astype(np.float32)),
        *([vector("resid_mid", "add", -2.0)] if has_behind else []),
    ]  # fmt: skip
    source = stored(case)
    expected = steered(source, several)
    torch.testing.assert_close(baked(source, several, form, tmp_path / "out"), expected, rtol=0, atol=2e-4)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing", "ignore:.*lora_bias=True")
@each_case
def test_peft_reads_the_adapter(case: Case, stored: Any, tmp_path: Path) -> None:
    from peft import PeftModel

    source = stored(case)
    given = [each for each in (vector("attn_out", "ablate", 1.0), vector("mlp_out", "add", 1.0))
             if is_exact(case, HookPoint.parse(each.hook_point).site, each.operation, "lora")]  # fmt: skip
    if not given:
        assert case.name in BEHIND_NORMS
        return
    expected = baked(source, given, "lora", tmp_path / "out")
    adapted = PeftModel.from_pretrained(source.model, str(tmp_path / "out")).eval()
    torch.testing.assert_close(logits(adapted), expected, rtol=0, atol=1e-5)
    with adapted.disable_adapter():
        assert (logits(adapted) - expected).abs().max() > 1e-2


@each_case
def test_a_layer_beside_it_is_something_else(case: Case, stored: Any, tmp_path: Path) -> None:
    """The comparison would notice."""
    if not is_exact(case, "attn_out", "ablate", "lora"):
        return
    source = stored(case)
    there = baked(source, [vector("attn_out", "ablate", 1.0)], "lora", tmp_path / "out")
    beside = replace(vector("attn_out", "ablate", 1.0), hook_point="attn_out.0")
    assert (there - steered(source, [beside])).abs().max() > 1e-2


@each_case
def test_nothing_is_in_front_of_the_first_block(case: Case, stored: Any) -> None:
    source = stored(case)
    for site in SITES:
        if site == "resid_pre":
            first = replace(vector(site, "add", 1.0), hook_point="resid_pre.0")
            with pytest.raises(MismatchError, match=r"several" if case.has_streams else "in front of which"):
                edits_of([first], source)
