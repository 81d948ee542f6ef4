"""What a request comes to, and what is refused before any engine sees it."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from activations.errors import ConfigError, MismatchError, ModelError, SaekitError, UnknownNameError
from activations.models import LoadedModel, find_source
from steer.library import Library
from steer.pack import About
from steer.scopes import Scope, latches_of
from steer.serving.items import Asked
from steer.vllm.catalogue import Catalogue, Markers, model_of
from steer.vllm.plugin import block_key
from steer.vllm.request import read_request
from tests.steer.vllm.conftest import put_sae


def asked(*items: dict[str, Any], **more: Any) -> Asked:
    return read_request({"steer": [*items], **more})


def test_a_request_is_read_from_an_object_and_from_a_string() -> None:
    given = {"steer": [{"vector": "plus", "dose": 0.5, "gate": {"on": 0.3}}, {"latent": 3, "clamp": 2}], "budget": 1}
    assert read_request(given) == read_request(json.dumps(given))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("{", "no JSON"),
        ({"library": "small", "steer": [{"vector": "plus"}]}, "library: Extra inputs"),
        ({"steer": [{"vector": "plus"}], "key": "x"}, "key: Extra inputs"),
        ({"steer": [{"vector": "plus"}] * 9}, "at most 8"),
        ({"steer": [{"vector": "plus", "dose": 1e9}]}, "less than or equal to 16"),
        ({"steer": [{"vector": "plus", "dose": float("nan")}]}, "dose"),
        ({"steer": [{"vector": "plus", "dose": "0.5"}]}, "dose: .*valid number"),
        ([1], "valid dictionary"),
    ],
)
def test_what_is_no_request_is_refused_with_what_is_wrong(given: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        read_request(given)


@pytest.mark.parametrize(
    ("item", "error", "said"),
    [
        ({"vector": "none"}, UnknownNameError, "one of chat, .*plus, some"),
        ({}, ConfigError, "a vector or a latent"),
        ({"vector": "plus", "latent": 1}, ConfigError, "both or neither"),
        ({"latent": 3}, ConfigError, "a dose, clamp or scale"),
        ({"latent": 8, "scale": 0}, UnknownNameError, "0 to 7"),
        ({"vector": "plus", "dose": 9}, ConfigError, "a dose of at most 2"),
        ({"vector": "plus", "clamp": 1}, ConfigError, "of a latent"),
        ({"vector": "chat", "scope": "thinking"}, ConfigError, "thinking markers in the model's chat template"),
        ({"vector": "plus", "scope": "no-tool-calls"}, ConfigError, "tool call markers in the model's chat template"),
        ({"vector": "plus", "scope": "sometimes"}, UnknownNameError, "words among"),
        ({"vector": "plus", "gate": {"on": 0.1, "off": 0.2}}, ConfigError, "off <= on"),
        ({"vector": "plus", "gate": {"on": 0.1, "tokens": 99}}, ConfigError, "at most 16 tokens"),
    ],
)
def test_what_cannot_be_done_is_refused_and_never_ignored(
    catalogue: Catalogue, item: dict[str, Any], error: type[SaekitError], said: str
) -> None:
    with pytest.raises(error, match=said):
        catalogue.prepare(asked(item), 5)


def test_more_of_a_kind_than_there_is_room_for_is_refused(catalogue: Catalogue) -> None:
    items = [{"vector": "plus", "operation": "ablate", "dose": 1.0, "scope": f"after:{i}"} for i in range(1, 6)]
    with pytest.raises(ConfigError, match="SAEKIT_VLLM_SLOTS"):
        catalogue.prepare(asked(*items), 5)


def test_so_are_more_gates_and_roles_than_there_is_room_for(catalogue: Catalogue) -> None:
    roles = [{"vector": "plus", "dose": 0.1, "scope": role} for role in ("user", "assistant", "system", "tool")]
    assert len(catalogue.prepare(asked(*roles), 5).latches) == 4
    with pytest.raises(ConfigError, match="at most 4 gates, roles, phases and tool calls a request, got 5"):
        catalogue.prepare(asked(*roles, {"vector": "gated"}), 5)


def test_saes_that_are_encoded_or_read_elsewhere_have_tables_from_the_start(
    tiny: LoadedModel, library: Path, apart: dict[str, Path], tmp_path: Path
) -> None:
    for name, hook_point in (("elsewhere", "resid_pre.0->resid_post.1"), ("beside", "resid_mid.1")):
        Library(vectors={}, about=About(name=name)).save(tmp_path / name)
        put_sae(tiny, tmp_path / name, hook_point, "standard")
    folders = [library, *apart.values(), tmp_path / "elsewhere", tmp_path / "beside"]
    catalogue = Catalogue(tiny, [str(each) for each in folders], 4)
    assert [str(point) for point in catalogue.points] == [f"resid_post.{layer}" for layer in range(3)]
    lanes = {(str(key.reads), str(key.acts), None if key.topk is None else key.topk.k): key for key in catalogue.lanes}
    assert {*lanes} == {
        ("resid_post.1", "resid_post.1", None), ("resid_post.1", "resid_post.1", 3),
        ("resid_post.0", "resid_post.1", None),
    }  # fmt: skip
    for name in ("encoded", "across"):
        (key,) = catalogue.prepare(asked({"latent": f"{name}/3", "clamp": 2}), 5).contents
        assert key in lanes.values(), "a lane that is made later is in no graph"
    for name, got in (("elsewhere", "resid_pre.0"), ("beside", "resid_mid.1")):
        with pytest.raises(ConfigError, match=f"resid_post, under vLLM, got {got}"):
            catalogue.prepare(asked({"latent": f"{name}/3", "clamp": 2}), 5)
    items = [{"latent": f"encoded/{latent}", "scale": 0} for latent in range(5)]
    with pytest.raises(ConfigError, match="SAEKIT_VLLM_SLOTS"):
        catalogue.prepare(asked(*items), 5)


def test_a_library_is_a_name_that_the_engine_was_started_with(catalogue: Catalogue, library: Path) -> None:
    assert len(catalogue.interventions(asked({"vector": "small/plus"}, {"latent": "small/3", "scale": 0}))) == 2
    for name in (str(library), "../small", "smollm2-135m"):
        with pytest.raises(UnknownNameError, match="engine was started with"):
            catalogue.interventions(asked({"vector": f"{name}/plus"}))


def test_a_library_of_other_weights_does_not_start(tiny: LoadedModel, library: Path) -> None:
    with pytest.raises(MismatchError, match="of other weights"):
        Catalogue(replace(tiny, fingerprint="0" * 64), [str(library)], 4)
    with pytest.raises(ConfigError, match="one of this name"):
        Catalogue(tiny, [str(library)] * 2, 4)


def test_the_stand_in_of_a_folder_is_the_model_that_was_loaded_from_it(tiny: LoadedModel, tiny_llama: Path) -> None:
    found = model_of(find_source(str(tiny_llama), print), tiny.model.config)
    assert (found.fingerprint, found.d_model, found.n_layers) == (tiny.fingerprint, tiny.d_model, tiny.n_layers)
    for words in ("assistant", "user generated", "final", "tool"):
        scope = Scope.parse(words)
        assert latches_of(scope, found.tokenizer) == latches_of(scope, tiny.tokenizer) != []


def test_a_folder_without_a_tokenizer_is_one_of_positions(tmp_path: Path) -> None:
    markers = Markers(lambda: tmp_path)
    assert latches_of(Scope.parse("generated after:3"), markers) == []
    with pytest.raises(ModelError):
        latches_of(Scope.parse("assistant"), markers)


def test_a_budget_is_kept(catalogue: Catalogue) -> None:
    items = [{"vector": "plus", "dose": 1.0}, {"vector": "out", "operation": "add", "dose": 1.0}]
    free, bounded = (catalogue.prepare(asked(*items, budget=b), 5).contents for b in (None, 0.5))
    (free_row,), (row,) = ((row for (rows,) in found.values() for row in rows) for found in (free, bounded))
    assert float(free_row.slot.writes.norm() * free_row.slot.constant) > 1.0 * 4.0
    assert float(row.slot.writes.norm() * row.slot.constant) == pytest.approx(0.5 * 4.0)


def test_the_key_is_of_content_and_of_all_that_is_asked_for(tiny: LoadedModel, catalogue: Catalogue, tmp_path: Path,
                                                            library: Path) -> None:  # fmt: skip
    one, gates = asked({"vector": "plus"}), [{"on": on, "tokens": n} for on, n in ((0.1, 1), (0.2, 1), (0.2, 2))]
    items = [{"vector": "out"}, {"latent": 3, "clamp": 2}, {"latent": 3, "scale": 2}]
    uses = [{"dose": 0.1}, {"operation": "ablate"}, {"scope": "prompt"}, *({"gate": gate} for gate in gates)]
    others = [*items, *({"vector": "plus", **use} for use in uses)]
    keys = {catalogue.key(each) for each in (one, asked({"vector": "plus"}, budget=1), *map(asked, others))}
    assert len(keys) == 2 + len(others)
    vectors = Library.open(library).vectors
    vectors["plus"] = replace(vectors["plus"], coefficient=2.1)
    Library(vectors=vectors, about=About(name="small")).save(tmp_path / "small")
    assert Catalogue(tiny, [str(tmp_path / "small")], 4).key(one) != catalogue.key(one)


def test_a_record_says_what_steered(catalogue: Catalogue) -> None:
    request = asked({"vector": "pair", "dose": 0.5}, {"vector": "out"}, {"latent": 3, "clamp": 2}, budget=1)
    record, hashes = catalogue.record(request), catalogue.hashes
    assert (record["key"], record["budget"]) == (catalogue.key(request), 1)
    assert {(each["library"], each["library_sha256"]) for each in record["steering"]} == {*hashes.items()}
    assert [(e["item"], e["hook_point"], e["operation"], e.get("coefficient", e.get("value")))
            for e in record["steering"]] == [
        (1, "resid_post.1", "add", 2.0), (1, "resid_post.2", "add", 2.0), (2, "resid_post.1", "ablate", 1.0),
        (3, "resid_post.1", "clamp", 2.0),
    ]  # fmt: skip


# --- keys of the prefix cache ---------------------------------------------------------------------------------------


def keys(catalogue: Catalogue, item: dict[str, Any], n_prompt: int) -> list[str | None]:
    """Of blocks of 8 tokens, up to token 40."""
    request = asked(item)
    bounds = [list(each) for each in catalogue.prepare(request, n_prompt).bounds]
    extra = {"saekit": {"key": catalogue.key(request), "bounds": bounds}}
    stand_in = SimpleNamespace(sampling_params=SimpleNamespace(extra_args=extra))
    return [block_key(stand_in, end) for end in range(8, 48, 8)]


def test_blocks_in_front_of_what_is_steered_are_shared(catalogue: Catalogue) -> None:
    late = keys(catalogue, {"vector": "late"}, 20)
    assert late[:2] == [None, None]
    assert all(late[2:])
    assert None not in keys(catalogue, {"vector": "plus"}, 20)
    assert keys(catalogue, {"vector": "plus", "scope": "after:10"}, 20)[:2] == [None, late[1] or keys(
        catalogue, {"vector": "plus", "scope": "after:10"}, 30)[1]]  # fmt: skip


def test_blocks_are_shared_between_prompts_as_far_as_they_are_steered_alike(catalogue: Catalogue) -> None:
    short, long = (keys(catalogue, {"vector": "early"}, n) for n in (20, 30))
    assert short[:2] == long[:2]
    assert short[2] != long[2], "one ends to be steered at 20, the other not yet"
    short, long = (keys(catalogue, {"vector": "late"}, n) for n in (20, 22))
    assert short[2] != long[2], "in the block of both, steering starts elsewhere"


def test_an_unsteered_request_has_no_key() -> None:
    for extra in (None, {}, {"other": 1}):
        assert block_key(SimpleNamespace(sampling_params=SimpleNamespace(extra_args=extra)), 8) is None
    assert block_key(SimpleNamespace(sampling_params=None), 8) is None
