"""What the plugin does in a process that has no vLLM: nothing, or what needs none of it."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from activations.errors import ConfigError
from activations.models import LoadedModel
from sae.artefact import SaeArtefact
from steer.operations import ClampLatents, Intervention
from steer.vllm import plugin
from steer.vllm.catalogue import Catalogue, check_supported


def test_without_libraries_it_does_not_even_import_vllm() -> None:
    code = "import sys; from steer.vllm.plugin import register; register(); print({'jax', 'vllm'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        (plugin.LIBRARIES, "smollm2-135m", "a JSON list of folders"),
        (plugin.LIBRARIES, '{"a": 1}', "a JSON list of folders"),
        (plugin.SLOTS, "0", "a number from 1 to 64"),
        (plugin.SLOTS, "many", "a number from 1 to 64"),
    ],
)
def test_settings_are_refused_with_what_they_should_be(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, said: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=said):
        plugin._libraries() if name == plugin.LIBRARIES else plugin._slots()


def config(**changes: Any) -> Any:
    fields = {"pipeline_parallel_size": 1, "enable_sp": False, "additional_config": {}, **changes}
    return SimpleNamespace(
        parallel_config=SimpleNamespace(pipeline_parallel_size=fields["pipeline_parallel_size"]),
        compilation_config=SimpleNamespace(pass_config=SimpleNamespace(enable_sp=fields["enable_sp"])),
        additional_config=fields["additional_config"],
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"pipeline_parallel_size": 2}, "pipeline"),
        ({"enable_sp": True}, "sequence"),
        ({"additional_config": 1}, "no dict"),
    ],
)
def test_an_engine_that_it_would_steer_wrongly_does_not_start(changes: dict[str, Any], said: str) -> None:
    plugin._check(config())
    with pytest.raises(ConfigError, match=said):
        plugin._check(config(**changes))


def steering_of(catalogue: Catalogue, item: dict[str, Any], speculative: Any = None) -> dict[str, Any]:
    """What the plugin makes of a request to an engine."""
    engine = SimpleNamespace(saekit=catalogue, vllm_config=SimpleNamespace(speculative_config=speculative))
    request = SimpleNamespace(prompt_token_ids=[5, 6, 7], prompt_embeds=None)
    return plugin._steering(engine, request, {"steer": [item]})


@pytest.mark.parametrize("item", [{"vector": "chat"}, {"vector": "plus", "scope": "final"}, {"vector": "gated"}])
def test_what_depends_on_all_tokens_before_takes_none_from_the_cache_and_no_speculation(
    catalogue: Catalogue, item: dict[str, Any]
) -> None:
    assert steering_of(catalogue, item)["has_flags"]
    plain = steering_of(catalogue, {"vector": "late"}, speculative="ngram")
    assert not plain["has_flags"]
    with pytest.raises(ConfigError, match="roles, phases or tool calls: expected tokens that are computed once"):
        steering_of(catalogue, item, speculative="ngram")


def test_markers_are_those_of_the_tokenizer_that_the_engine_was_given(tiny_llama: Path, tmp_path: Path) -> None:
    def folder(tokenizer: Path) -> Path:
        told = {"model": str(tiny_llama), "revision": None, "tokenizer": str(tokenizer), "tokenizer_revision": None}
        return plugin._tokenizer_folder(SimpleNamespace(model_config=SimpleNamespace(**told)))

    assert folder(tiny_llama) == tiny_llama.resolve()
    assert folder(tmp_path) == tmp_path.resolve()


def artefact(tiny: LoadedModel, **changes: Any) -> SaeArtefact:
    rng = np.random.default_rng(0)
    d, n = tiny.d_model, 64
    fields: dict[str, Any] = {
        "architecture": "standard", "W_enc": rng.standard_normal((d, n)).astype(np.float32),
        "b_enc": np.zeros(n, np.float32), "W_dec": rng.standard_normal((n, d)).astype(np.float32),
        "b_dec": np.zeros(d, np.float32), "metadata": {"hook_point": "resid_post.1"},
    }  # fmt: skip
    return SaeArtefact(**{**fields, **changes})


def transcoder(reads: str) -> dict[str, Any]:
    return {"transcodes": True, "apply_b_dec_to_input": False, "metadata": {"hook_point": f"{reads}->resid_post.1"}}


@pytest.mark.parametrize(
    ("changes", "got"),
    [
        ({"architecture": "topk", "k": 4}, None),
        (transcoder("resid_post.0"), None),
        (transcoder("resid_pre.1"), "resid_pre.1"),
        ({"metadata": {"hook_point": "resid_mid.1"}}, "resid_mid.1"),
    ],
)
def test_latents_are_refused_that_are_read_or_act_where_it_does_not_steer(
    tiny: LoadedModel, changes: dict[str, Any], got: str | None
) -> None:
    clamped = Intervention(ClampLatents(artefact(tiny, **changes), {3: 1.0}), name="latent 3")
    if got is None:
        check_supported(clamped)
        return
    with pytest.raises(ConfigError, match=f"resid_post, under vLLM, got {got}"):
        check_supported(clamped)
