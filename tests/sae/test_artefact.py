"""An SAE on disk: what was saved is what is loaded, and nothing else is."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from activations.errors import CorruptArtefactError, MismatchError, MissingArtefactError, NumericsError, ShapeError
from sae.artefact import KINDS, SaeArtefact

POINTS = {False: "resid_post.12", True: "resid_mid.12->mlp_out.12"}


def random_artefact(name: str, d_model: int = 4, d_sae: int = 7, seed: int = 0) -> SaeArtefact:
    """An SAE of the kind that cfg.json calls `name`; transcoders write one dimension more than they read."""
    kind, rng = KINDS[name], np.random.default_rng(seed)
    d_out = d_model + kind.transcodes

    def normal(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    return SaeArtefact(
        architecture=kind.architecture,
        W_enc=normal(d_model, d_sae),
        b_enc=normal(d_sae),
        W_dec=normal(d_sae, d_out),
        b_dec=normal(d_out),
        threshold=np.abs(normal(d_sae)) if kind.architecture == "jumprelu" else None,
        k=min(3, d_sae) if kind.architecture == "topk" else None,
        W_skip=normal(d_out, d_model) if kind.skips else None,
        apply_b_dec_to_input=not kind.transcodes,
        transcodes=kind.transcodes,
        metadata={"model": {"id": "tiny", "fingerprint": "f00d"}, "hook_point": POINTS[kind.transcodes]},
    )


@pytest.fixture(params=["topk", "jumprelu"])
def artefact(request: pytest.FixtureRequest) -> SaeArtefact:
    return random_artefact(request.param)


@pytest.fixture
def saved(artefact: SaeArtefact, tmp_path: Path) -> Path:
    artefact.save(tmp_path / "sae")
    return tmp_path / "sae"


@settings(deadline=None, max_examples=20)
@given(
    name=st.sampled_from(sorted(KINDS)),
    d_model=st.integers(1, 9),
    d_sae=st.integers(1, 20),
    seed=st.integers(0, 2**32 - 1),
)
def test_round_trip_is_bitwise(
    tmp_path_factory: pytest.TempPathFactory, name: str, d_model: int, d_sae: int, seed: int
) -> None:
    path = tmp_path_factory.mktemp("artefact") / "sae"
    before = random_artefact(name, d_model, d_sae, seed)
    before.save(path)
    after = SaeArtefact.load(path)
    assert (after.saved_name, after.k, after.d_out) == (name, before.k, before.d_out)
    assert (after.transcodes, after.apply_b_dec_to_input) == (before.transcodes, before.apply_b_dec_to_input)
    assert after.tensors().keys() == before.tensors().keys()
    for name, tensor in before.tensors().items():
        np.testing.assert_array_equal(after.tensors()[name], tensor)
    assert after.metadata == before.metadata | {"weights_sha256": after.sha256}


def test_the_directory_is_what_saelens_reads(saved: Path, artefact: SaeArtefact) -> None:
    config = json.loads((saved / "cfg.json").read_text())
    assert (config["d_in"], config["d_sae"], config["architecture"]) == (4, 7, artefact.architecture)
    assert config["apply_b_dec_to_input"] is True
    assert config["normalize_activations"] == "none"
    assert config["metadata"]["sae_lens_version"].startswith("6.")
    assert config["metadata"]["hook_name"] == "blocks.12.hook_resid_post"
    assert config.get("k") == artefact.k
    assert load_file(saved / "sae_weights.safetensors").keys() == artefact.tensors().keys()


@pytest.mark.parametrize("name", KINDS)
def test_saelens_is_told_what_a_transcoder_is(tmp_path: Path, name: str) -> None:
    random_artefact(name).save(tmp_path / "sae")
    config = json.loads((tmp_path / "sae" / "cfg.json").read_text())
    about, transcodes = config["metadata"], KINDS[name].transcodes
    assert (config["architecture"], config["apply_b_dec_to_input"]) == (name, not transcodes)
    assert config.get("d_out") == (5 if transcodes else None)
    names = (about["hook_name"], about.get("hook_name_out"))
    transcoder = ("blocks.12.hook_resid_mid", "blocks.12.hook_mlp_out")
    assert names == (transcoder if transcodes else ("blocks.12.hook_resid_post", None))


def test_a_crosscoder_names_all_its_hook_points(artefact: SaeArtefact, tmp_path: Path) -> None:
    replace(artefact, metadata={"hook_point": "resid_post.3+mlp_in.4"}).save(tmp_path / "sae")
    about = json.loads((tmp_path / "sae" / "cfg.json").read_text())["metadata"]
    assert about["hook_name"] == "blocks.3.hook_resid_post+blocks.4.mlp_hc.hook_out"
    assert SaeArtefact.load(tmp_path / "sae").hook_point == "resid_post.3+mlp_in.4"


def test_b_dec_may_stay_out_of_the_input(artefact: SaeArtefact, tmp_path: Path) -> None:
    replace(artefact, apply_b_dec_to_input=False).save(tmp_path / "sae")
    assert json.loads((tmp_path / "sae" / "cfg.json").read_text())["apply_b_dec_to_input"] is False
    assert SaeArtefact.load(tmp_path / "sae").apply_b_dec_to_input is False


def test_what_a_transcoder_cannot_be(artefact: SaeArtefact) -> None:
    with pytest.raises(CorruptArtefactError, match="apply_b_dec_to_input: expected False for a transcoder"):
        replace(artefact, transcodes=True)
    with pytest.raises(ShapeError, match=r"'W_skip': expected no such tensor"):
        replace(artefact, W_skip=np.zeros((4, 4), np.float32))
    with pytest.raises(ShapeError, match=r"'W_dec': expected shape \[7, 4\], got \[7, 5\]|'b_dec'"):
        replace(artefact, W_dec=np.zeros((7, 5), np.float32), b_dec=np.zeros(5, np.float32))


def test_without_a_hook_point_it_says_how_to_add_one(artefact: SaeArtefact) -> None:
    assert artefact.hook_point == "resid_post.12"
    with pytest.raises(CorruptArtefactError, match=r"saekit convert.*--hook-point"):
        replace(artefact, metadata={}).hook_point  # noqa: B018


def test_saving_replaces_an_sae_but_nothing_else(saved: Path, tmp_path: Path) -> None:
    other = random_artefact("topk", seed=1)
    other.save(saved)
    np.testing.assert_array_equal(SaeArtefact.load(saved).W_enc, other.W_enc)
    assert [path.name for path in tmp_path.iterdir()] == ["sae"], "nothing temporary stays"
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("keep")
    with pytest.raises(MismatchError, match="an empty directory"):
        other.save(tmp_path / "notes")
    assert (tmp_path / "notes" / "mine.txt").read_text() == "keep"


def test_a_failed_save_leaves_the_old_one(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = SaeArtefact.load(saved)

    def full_disk(*_: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("sae.artefact.save_file", full_disk)
    with pytest.raises(OSError, match="no space"):
        random_artefact("topk", seed=1).save(saved)
    np.testing.assert_array_equal(SaeArtefact.load(saved).W_enc, before.W_enc)
    assert [path.name for path in tmp_path.iterdir()] == ["sae"]


def test_tensors_that_do_not_belong_to_the_architecture_are_named() -> None:
    with pytest.raises(ShapeError, match=r"'threshold'.*no such tensor, got \[7\]"):
        SaeArtefact(architecture="topk", k=2, **random_artefact("jumprelu").tensors())
    with pytest.raises(ShapeError, match=r"'threshold'.*shape \[7\], got no such tensor"):
        SaeArtefact(architecture="jumprelu", **random_artefact("topk").tensors())


@pytest.mark.parametrize("k", [0, 8, None])
def test_k_must_fit(k: int | None) -> None:
    with pytest.raises(CorruptArtefactError, match="from 1 to d_sae=7"):
        SaeArtefact(architecture="topk", k=k, **random_artefact("topk").tensors())


def test_infinite_thresholds_are_allowed_and_no_other_infinity() -> None:
    tensors = random_artefact("jumprelu").tensors()
    SaeArtefact(architecture="jumprelu", **tensors | {"threshold": np.full(7, np.inf, np.float32)})
    for name, value in (("threshold", np.nan), ("W_dec", np.inf), ("b_enc", np.nan)):
        with pytest.raises(NumericsError, match=name):
            SaeArtefact(architecture="jumprelu", **tensors | {name: np.full_like(tensors[name], value)})


def change_config(**changes: Any) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        config = json.loads((path / "cfg.json").read_text())
        (path / "cfg.json").write_text(json.dumps(config | changes))

    return change


def change_provenance(**changes: Any) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        metadata = json.loads((path / "saekit.json").read_text())
        (path / "saekit.json").write_text(json.dumps(metadata | changes))

    return change


def change_weights(**changes: Any) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        (path / "saekit.json").unlink()
        tensors = load_file(path / "sae_weights.safetensors") | changes
        kept = {name: value for name, value in tensors.items() if value is not None}
        save_file(kept, path / "sae_weights.safetensors")

    return change


def truncate(name: str) -> Callable[[Path], None]:
    return lambda path: (path / name).write_bytes((path / name).read_bytes()[:-9]) and None


def flip_a_bit(path: Path) -> None:
    weights = bytearray((path / "sae_weights.safetensors").read_bytes())
    weights[-3] ^= 1
    (path / "sae_weights.safetensors").write_bytes(weights)


def claim_a_huge_header(path: Path) -> None:
    (path / "sae_weights.safetensors").write_bytes((2**63).to_bytes(8, "little") + b"{}")


def claim_huge_tensors(path: Path) -> None:
    header = {"W_enc": {"dtype": "F32", "shape": [2**20, 2**24], "data_offsets": [0, 2**46]}}
    content = json.dumps(header).encode()
    (path / "sae_weights.safetensors").write_bytes(len(content).to_bytes(8, "little") + content)


@pytest.mark.parametrize(
    ("damage", "error", "match"),
    [
        (lambda path: (path / "cfg.json").unlink(), MissingArtefactError, "cfg.json"),
        (lambda path: (path / "sae_weights.safetensors").unlink(), MissingArtefactError, "sae_weights"),
        (lambda path: (path / "cfg.json").write_text("{"), CorruptArtefactError, "valid JSON"),
        (lambda path: (path / "cfg.json").write_text("[1]"), CorruptArtefactError, "a JSON object"),
        (lambda path: (path / "cfg.json").write_bytes(b"\xff\xfe"), CorruptArtefactError, "valid JSON"),
        (lambda path: (path / "saekit.json").write_text("["), CorruptArtefactError, "saekit.json"),
        (lambda path: (path / "cfg.json").write_text(" " * (64 << 20) + "{}"), CorruptArtefactError, "64 MiB"),
        (change_provenance(hook_point=5), CorruptArtefactError, "hook_point.*type str"),
        (change_provenance(model="tiny"), CorruptArtefactError, "model.*type dict"),
        (change_config(d_sae="7"), CorruptArtefactError, "d_sae"),
        (change_config(d_sae=True), CorruptArtefactError, "d_sae"),
        (change_config(k=True, architecture="topk"), CorruptArtefactError, "k: expected a whole number"),
        (change_config(architecture=["topk"]), MismatchError, "architecture"),
        (change_config(architecture="transcoder"), CorruptArtefactError, "d_out"),
        (change_config(architecture="transcoder", d_out=4), CorruptArtefactError, "false for a transcoder"),
        (change_config(d_sae=8, k=3), ShapeError, "W_dec|W_enc|b_enc"),
        (change_config(architecture="gated"), MismatchError, "architecture"),
        (change_config(apply_b_dec_to_input="no"), CorruptArtefactError, "apply_b_dec_to_input"),
        (change_config(normalize_activations="layer_norm"), MismatchError, "normalize_activations"),
        (change_config(rescale_acts_by_decoder_norm=True), MismatchError, "rescale_acts"),
        (change_weights(b_dec=None), ShapeError, "'b_dec'.*no such tensor"),
        (change_weights(extra=np.zeros(2, np.float32)), ShapeError, "'extra'"),
        (change_weights(b_dec=np.zeros(4, np.float64)), MismatchError, "dtype F32 or F16, got F64.*saekit convert"),
        (change_weights(W_enc=np.full((4, 7), np.nan, np.float32)), NumericsError, "28 NaN"),
        (truncate("sae_weights.safetensors"), CorruptArtefactError, "safetensors"),
        (flip_a_bit, CorruptArtefactError, "SHA-256"),
        (claim_a_huge_header, CorruptArtefactError, "safetensors"),
        (claim_huge_tensors, (CorruptArtefactError, ShapeError), "sae_weights"),
    ],
)
def test_damaged_files_are_refused(saved: Path, damage: Callable[[Path], None], error: Any, match: str) -> None:
    damage(saved)
    with pytest.raises(error, match=match):
        SaeArtefact.load(saved)


def test_a_missing_directory_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(MissingArtefactError, match="saekit train"):
        SaeArtefact.load(tmp_path / "nothing")


def test_an_sae_without_provenance_loads(saved: Path) -> None:
    (saved / "saekit.json").unlink()
    assert SaeArtefact.load(saved).metadata == {}
