"""What every row of SAE_FORMATS promises: what it can hold comes back the same, and nothing else is written."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from activations.errors import (
    ConfigError,
    MismatchError,
    MissingArtefactError,
    SaekitError,
    ShapeError,
    UnknownNameError,
)
from sae.artefact import KINDS, SaeArtefact
from sae.formats import SAE_FORMATS, at_hook_point, detect, find, read_any
from sae.formats.convert import convert
from sae.torch_view import TorchSae

ALL = set(KINDS)
SKIPS = {name for name in KINDS if "skip" in name}
HOLDS = {
    "saekit": ALL,
    "saelens": ALL - {"topk_transcoder", "topk_skip_transcoder"},
    "sparsify": {"topk", "topk_transcoder", "topk_skip_transcoder"},
    "dictionary_learning": {"standard", "topk", "jumprelu"},
    "gemma_scope": {"standard", "jumprelu", "transcoder", "jumprelu_transcoder"},
    "gemma_scope_2": {name for name in KINDS if not name.startswith("topk")},
}
"""format -> architectures that it can express"""
SAYS_TRANSCODER = {"saekit", "saelens", "sparsify", "gemma_scope_2"}
POINTS = {False: "resid_post.3", True: "resid_mid.3->mlp_out.3"}


def random_artefact(name: str, d_model: int = 6, d_sae: int = 11, seed: int = 0, **changes: Any) -> SaeArtefact:
    """An SAE of a kind by the name that cfg.json has for it."""
    kind, rng = KINDS[name], np.random.default_rng(seed)

    def normal(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    is_jumprelu = kind.architecture == "jumprelu"
    artefact = SaeArtefact(
        architecture=kind.architecture,
        W_enc=normal(d_model, d_sae),
        b_enc=normal(d_sae),
        W_dec=normal(d_sae, d_model),
        b_dec=normal(d_model),
        threshold=np.where(normal(d_sae) > 1.5, np.inf, normal(d_sae)).astype(np.float32) if is_jumprelu else None,
        k=min(3, d_sae) if kind.architecture == "topk" else None,
        W_skip=normal(d_model, d_model) if kind.skips else None,
        apply_b_dec_to_input=not kind.transcodes,
        transcodes=kind.transcodes,
        metadata={"hook_point": POINTS[kind.transcodes], "model": {"id": "tiny", "fingerprint": "f00d"}},
    )
    return replace(artefact, **changes)


def outputs(artefact: SaeArtefact, n: int = 40) -> tuple[np.ndarray, np.ndarray]:
    """Latents and reconstruction of the same random inputs for all."""
    x, sae = np.random.default_rng(9).normal(size=(n, artefact.d_model)).astype(np.float32), TorchSae(artefact)
    latents = sae.encode(torch.tensor(x))
    return latents.numpy(), sae.reconstruct(torch.tensor(x), latents).numpy()


def assert_same_function(got: SaeArtefact, expected: SaeArtefact) -> None:
    for a, b in zip(outputs(got), outputs(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


@pytest.fixture(params=SAE_FORMATS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def cases() -> list[tuple[str, str]]:
    return [(name, kind) for name in SAE_FORMATS for kind in KINDS]


def test_the_table_here_has_a_row_for_each_format() -> None:
    assert HOLDS.keys() == SAE_FORMATS.keys()


@pytest.mark.parametrize(("name", "kind"), cases())
@pytest.mark.parametrize("is_centred", [True, False])
def test_what_it_can_hold_comes_back_and_the_rest_is_refused(
    tmp_path: Path, name: str, kind: str, is_centred: bool
) -> None:
    before = random_artefact(kind)
    if not before.transcodes:
        before = replace(before, apply_b_dec_to_input=is_centred)
    path = tmp_path / "layers.3"
    if kind not in HOLDS[name]:
        with pytest.raises((MismatchError, ShapeError)):
            find(name).write(before, path)
        assert list(tmp_path.iterdir()) == []
        return
    find(name).write(before, path)
    after = read_any(path)
    assert detect(path) == name
    assert (after.d_model, after.d_sae, after.d_out, after.k) == (6, 11, 6, before.k)
    assert after.transcodes == (before.transcodes and name in SAYS_TRANSCODER)
    assert_same_function(after, before)


@pytest.mark.parametrize("kind", ["standard", "topk", "jumprelu"])
def test_one_format_matches_each_directory(tmp_path: Path, name: str, kind: str) -> None:
    if kind in HOLDS[name]:
        find(name).write(random_artefact(kind), tmp_path / "sae")
        assert [other for other in SAE_FORMATS if find(other).matches(tmp_path / "sae")] == [name]


@settings(deadline=None, max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(d_model=st.integers(1, 9), d_sae=st.integers(1, 20), seed=st.integers(0, 2**32 - 1), data=st.data())
def test_weights_come_back_bitwise_where_nothing_is_folded(
    tmp_path: Path, name: str, d_model: int, d_sae: int, seed: int, data: st.DataObject
) -> None:
    kind = data.draw(st.sampled_from(sorted(HOLDS[name] - SKIPS)))
    before = random_artefact(kind, d_model, d_sae, seed)
    if (name == "dictionary_learning" and kind == "jumprelu") or name.startswith("gemma"):
        before = replace(before, apply_b_dec_to_input=False)
    path = tmp_path / "sae"
    shutil.rmtree(path, ignore_errors=True)
    find(name).write(before, path)
    after = read_any(path)
    for tensor in before.tensors():
        np.testing.assert_array_equal(after.tensors()[tensor], before.tensors()[tensor])


def test_a_wider_output_is_kept_or_refused(tmp_path: Path, name: str) -> None:
    rng = np.random.default_rng(0)
    wide = {"W_dec": rng.normal(size=(11, 9)).astype(np.float32), "b_dec": np.ones(9, np.float32)}
    before = random_artefact("jumprelu_transcoder", **wide)
    if name in ("saekit", "saelens", "gemma_scope_2"):
        find(name).write(before, tmp_path / "sae")
        assert_same_function(read_any(tmp_path / "sae"), before)
    else:
        with pytest.raises((MismatchError, ShapeError)):
            find(name).write(before, tmp_path / "sae")
        topk = random_artefact("topk_transcoder", **wide)
        with pytest.raises((MismatchError, ShapeError)):
            find(name).write(topk, tmp_path / "sae")


def test_nothing_is_written_over(tmp_path: Path, name: str) -> None:
    kind = "topk" if name == "sparsify" else "jumprelu"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "cfg.json").write_text("{}")
    with pytest.raises(MismatchError, match="nothing, or an empty directory"):
        find(name).write(random_artefact(kind), tmp_path / "mine")
    assert (tmp_path / "mine" / "cfg.json").read_text() == "{}"
    (tmp_path / "empty").mkdir()
    find(name).write(random_artefact(kind), tmp_path / "empty")
    assert detect(tmp_path / "empty") == name
    assert {path.name for path in tmp_path.iterdir()} == {"mine", "empty"}, "nothing temporary stays"


FILES = {
    "saekit": ("cfg.json", "saekit.json", "sae_weights.safetensors"),
    "saelens": ("cfg.json", "sae_weights.safetensors"),
    "sparsify": ("cfg.json", "sae.safetensors"),
    "dictionary_learning": ("config.json", "ae.pt"),
    "gemma_scope": ("params.npz",),
    "gemma_scope_2": ("config.json", "params.safetensors"),
}


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An SAE of each format."""
    folder = tmp_path_factory.mktemp("originals")
    for name in SAE_FORMATS:
        find(name).write(random_artefact("topk" if name == "sparsify" else "jumprelu"), folder / name)
    return {name: folder / name for name in SAE_FORMATS}


def read_or_refuse(path: Path, name: str) -> None:
    try:
        artefact = find(name).read(path)
    except SaekitError:
        return
    assert all(np.isfinite(tensor).all() for key, tensor in artefact.tensors().items() if key != "threshold")


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damage_is_a_saekit_error_or_harmless(
    tmp_path: Path, originals: dict[str, Path], name: str, data: st.DataObject
) -> None:
    path = tmp_path / "sae"
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(originals[name], path)
    file = path / data.draw(st.sampled_from(FILES[name]))
    content = bytearray(file.read_bytes())
    how = data.draw(st.sampled_from(["cut", "flip", "garbage", "gone", "insert"]))
    place = data.draw(st.integers(0, len(content) - 1))
    if how == "cut":
        file.write_bytes(content[:place])
    elif how == "flip":
        content[place] ^= 1 << data.draw(st.integers(0, 7))
        file.write_bytes(content)
    elif how == "garbage":
        file.write_bytes(data.draw(st.binary(max_size=200)))
    elif how == "insert":
        file.write_bytes(content[:place] + data.draw(st.binary(min_size=1, max_size=20)) + content[place:])
    else:
        file.unlink()
    read_or_refuse(path, name)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6) | st.just(2**70) | st.just(-1),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_hostile_configs_are_a_saekit_error_or_harmless(
    tmp_path: Path, originals: dict[str, Path], name: str, data: st.DataObject
) -> None:
    configs = [file for file in FILES[name] if file.endswith(".json")]
    if not configs:
        return
    path = tmp_path / "sae"
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(originals[name], path)
    file = path / data.draw(st.sampled_from(configs))
    config = json.loads(file.read_text())
    inner = config.get("trainer", config)
    keys = st.sampled_from([*inner, "metadata", "normalize_activations", "rescale_acts_by_decoder_norm", "num_latents"])
    for _ in range(data.draw(st.integers(1, 3))):
        inner[data.draw(keys)] = data.draw(JSON)
    file.write_text(json.dumps(config))
    read_or_refuse(path, name)


@pytest.mark.parametrize("content", [b"", b"PK\x05\x06" + bytes(18), b"\x80\x02.", b"[" * 100_000])
def test_files_of_another_kind_are_refused(
    originals: dict[str, Path], tmp_path: Path, name: str, content: bytes
) -> None:
    for file in FILES[name]:
        path = tmp_path / file
        shutil.copytree(originals[name], path)
        (path / file).write_bytes(content)
        with pytest.raises(SaekitError):
            find(name).read(path)


def test_what_is_no_sae_is_named(tmp_path: Path) -> None:
    with pytest.raises(MissingArtefactError, match=r"one of: saekit directory, SAELens directory.*got nothing"):
        detect(tmp_path / "absent")
    with pytest.raises(MissingArtefactError, match="got none of their files"):
        detect(tmp_path)
    with pytest.raises(UnknownNameError, match="one of saekit, saelens"):
        read_any(tmp_path, "pickle")


def test_several_formats_in_one_place_need_a_choice(tmp_path: Path, originals: dict[str, Path]) -> None:
    for name in ("gemma_scope", "gemma_scope_2"):
        shutil.copytree(originals[name], tmp_path / "both", dirs_exist_ok=True)
    with pytest.raises(MismatchError, match=r"those of gemma_scope, gemma_scope_2.*--from"):
        detect(tmp_path / "both")
    assert read_any(tmp_path / "both", "gemma_scope_2").architecture == "jumprelu"


def test_a_hook_point_can_be_named_and_an_arrow_makes_a_transcoder() -> None:
    plain = random_artefact("jumprelu", apply_b_dec_to_input=False)
    assert at_hook_point(plain, "resid_pre.4").hook_point == "resid_pre.4"
    made = at_hook_point(plain, "resid_mid.4->mlp_out.4")
    assert (made.transcodes, made.saved_name) == (True, "jumprelu_transcoder")
    with pytest.raises(ConfigError, match="subtracts b_dec"):
        at_hook_point(random_artefact("jumprelu"), "resid_mid.4->mlp_out.4")
    wide = {"W_dec": np.ones((11, 9), np.float32), "b_dec": np.ones(9, np.float32)}
    with pytest.raises(ConfigError, match="widths 6 and 9"):
        at_hook_point(random_artefact("transcoder", **wide), "resid_mid.4")


def pairs() -> list[Any]:
    return [pytest.param(a, b, id=f"{a}-{b}") for a in SAE_FORMATS for b in SAE_FORMATS if HOLDS[a] & HOLDS[b]]


@pytest.mark.parametrize(("source", "target"), pairs())
def test_conversion_between_any_two_keeps_the_function(tmp_path: Path, source: str, target: str) -> None:
    kind = sorted(HOLDS[source] & HOLDS[target] - SKIPS, key=len)[0]
    before = random_artefact(kind, metadata={"hook_point": POINTS[KINDS[kind].transcodes]})
    find(source).write(before, tmp_path / "a")
    dry = convert(tmp_path / "a", tmp_path / "b", target, dry_run=True)
    assert (dry["from"], dry["to"], dry["written"], dry["d_sae"]) == (source, target, False, 11)
    assert not (tmp_path / "b").exists()
    convert(tmp_path / "a", tmp_path / "b", target)
    assert_same_function(read_any(tmp_path / "b"), before)
