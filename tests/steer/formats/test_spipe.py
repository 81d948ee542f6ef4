"""`.spipe`: what a pipeline adds or takes away comes in at its place and strength; all else in it is refused."""

import hashlib
import json
import stat
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from activations.errors import CorruptArtefactError, MismatchError, SaekitError
from activations.models import LoadedModel
from activations.store_schema import ModelRef
from steer.config import ImportConfig
from steer.exchange import import_vectors
from steer.formats import detect, find

MODEL = ModelRef(id="tiny", fingerprint="ab" * 32, n_layers=5, d_model=4)
ROWS = {layer: np.array([[0.5, -0.5, layer, 0.25]], np.float32) for layer in (1, 3)}
Rows = dict[int, np.ndarray]
RECORD = {
    "encoding": "tensors", "type": "SteeringVector", "artifact_class": "direction", "source": "ContrastiveFit",
    "fit_digest": "0123456789ab", "provenance": {"backend_spec_hash": "x", "model_fingerprint": "f" * 16,
                                                "tokenizer_fingerprint": None},
}  # fmt: skip
TOKENS = {"token_scope": "after_prompt", "last_k": None, "from_position": None}


class Pipeline:
    """What steerability writes, part by part, so that a test can change each (spipe/format.py, store.py, codec.py)."""

    def __init__(self) -> None:
        self.members: dict[str, bytes] = {}
        self.controls: list[dict[str, Any]] = []
        self.manifest: dict[str, Any] = {
            "format": "spipe/1", "created_at": "2026-11-01T00:00:00Z", "toolkit_version": "0.3.0",
            "code_dependent": False, "model": {"ref": "org/model", "revision": None}, "controls": self.controls,
            "lock": {"config_id": "a" * 12, "recipe_id": "b" * 12, "model_fingerprint": "f" * 16, "seed": None,
                     "tokenizer_fingerprint": None, "torch_dtype": "float32", "steer_backend_spec_hash": "x",
                     "fit": "auto", "versions": {"torch": "2.8.0"}},
        }  # fmt: skip

    def vector(self, rows: Rows | bytes | None = None, **about: Any) -> tuple[dict[str, str], dict[str, Any]]:
        """Store a vector, and give a reference to it and its record."""
        if not isinstance(rows, bytes):
            rows = save({str(layer): row for layer, row in sorted((ROWS if rows is None else rows).items())})
        record = {"id": f"sha256:{hashlib.sha256(rows).hexdigest()}", **RECORD} | about
        folder = f"artifacts/{record['id'].replace(':', '-')}"
        self.members[f"{folder}/artifact.safetensors"] = rows
        meta = record.pop("type_meta", {"model_type": "llama"})
        self.members[f"{folder}/artifact.json"] = json.dumps(record | {"type_meta": meta}, sort_keys=True).encode()
        return {"$artifact": record["id"]}, record

    def caa(self, *, rows: Rows | bytes | None = None, about: dict[str, Any] | None = None, **args: Any) -> Any:
        """A CAA that was fitted and frozen; gives its frozen arguments."""
        ref, record = self.vector(rows, **(about or {}))
        frozen = {
            "steering_vector": ref, "layer_id": 3, "multiplier": 1.5, "normalize_vector": False,
            "use_norm_preservation": False, **TOKENS,
        } | args  # fmt: skip
        return self._frozen("state_control/caa", frozen, {"steering_vector": record})

    def adapter(self, kind: str, params: dict[str, Any], *, rows: Rows | None = None, **args: Any) -> Any:
        """What most other controls are frozen as."""
        ref, record = self.vector(rows)
        frozen = {
            "transform": {"$component": kind, "params": params, "artifact": ref}, "layer_ids": [1, 3],
            "hook_point": "layer_output", "gate": None, **TOKENS,
        } | args  # fmt: skip
        return self._frozen("state_control/activation_adapter", frozen, {"intervention_0/transform": record})

    def spoil(self) -> None:
        """Put other content under the hashes."""
        self.members |= {name: b"x" for name in self.members if name.endswith(".safetensors")}

    def write(self, path: Path, compression: int = zipfile.ZIP_STORED) -> Path:
        members = {"spipe.json": json.dumps(self.manifest, sort_keys=True, indent=2).encode() + b"\n", **self.members}
        with zipfile.ZipFile(path, "w", compression) as archive:
            for name, content in sorted(members.items()):
                info = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
                info.compress_type, info.external_attr = compression, 0o644 << 16
                archive.writestr(info, content)
        return path

    def _frozen(self, method: str, args: dict[str, Any], artifacts: dict[str, Any]) -> dict[str, Any]:
        recipe = {
            "data": {"$dc": "steerability.x.ContrastivePairs", "fields": {"positives": ["a"], "negatives": ["b"]}}
        }
        resolved = {"method": method, "args": args, "artifacts": artifacts, "origin": None}
        self.controls.append({"method": method, "enabled": True, "args": recipe, "resolved": resolved})
        return args


@pytest.fixture
def made() -> Pipeline:
    return Pipeline()


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_caa_adds_its_row_at_the_output_of_its_block(compression: int, made: Pipeline, tmp_path: Path) -> None:
    made.caa()
    path = made.write(tmp_path / "v.spipe", compression)
    assert detect(path) == "spipe"
    (found,) = find("spipe").read(path, MODEL)
    assert (str(found.hook_point), found.operation, found.coefficient) == ("resid_post.3", "add", 1.5)
    np.testing.assert_array_equal(found.values, ROWS[3][0])
    assert found.scope == "generated", "after_prompt"
    assert found.made_on == f"org/model, weights {'f' * 16} by steerability"


@pytest.mark.parametrize(
    ("kind", "params", "operation", "coefficient"),
    [("additive", {"strength": -2.0, "alignment": 0, "positional": False}, "add", -2.0),
     ("projection", {"alpha": 0.5}, "ablate", 0.5)],
)  # fmt: skip
@pytest.mark.parametrize(("hook_point", "site"), [("layer_output", "resid_post"), ("layer_input", "resid_pre")])
def test_an_adapter_acts_at_all_of_its_blocks(
    kind: str,
    params: Any,
    operation: str,
    coefficient: float,
    hook_point: str,
    site: str,
    made: Pipeline,
    tmp_path: Path,
) -> None:
    made.adapter(kind, params, hook_point=hook_point, token_scope="all")
    found = find("spipe").read(made.write(tmp_path / "v.spipe"), MODEL)
    assert [str(each.hook_point) for each in found] == [f"{site}.1", f"{site}.3"]
    assert {(each.operation, each.coefficient, each.scope) for each in found} == {(operation, coefficient, "all")}
    np.testing.assert_array_equal(found[0].values, ROWS[1][0])


@pytest.mark.parametrize(("first", "scope"), [(0, "all"), (1, "all"), (7, "after:7")])
def test_tokens_from_a_position_on(first: int, scope: str, made: Pipeline, tmp_path: Path) -> None:
    made.caa(token_scope="from_position", from_position=first)
    assert find("spipe").read(made.write(tmp_path / "v.spipe"), MODEL)[0].scope == scope


def test_a_recipe_with_a_vector_counts_as_it_is_and_a_control_that_is_off_not(made: Pipeline, tmp_path: Path) -> None:
    args = made.caa(normalize_vector=True, rows={3: 4 * ROWS[3]})
    made.controls[0] |= {"args": args | {"data": None, "train_spec": {"$dc": "x", "fields": {}}}, "resolved": None}
    made.manifest["lock"] = None
    made.controls.append({"method": "output_control/deal", "enabled": False, "args": {}, "resolved": None})
    (found,) = find("spipe").read(made.write(tmp_path / "v.spipe"), MODEL)
    assert np.linalg.norm(found.values) == pytest.approx(1)
    made.controls[0]["enabled"] = False
    with pytest.raises(MismatchError, match="enabled control"):
        find("spipe").read(made.write(tmp_path / "v.spipe"), MODEL)


def test_blocks_without_a_row_may_be_left_alone(made: Pipeline, tmp_path: Path) -> None:
    made.adapter("additive", {}, layer_ids=[1, 2], require_coverage=False)
    assert [str(each.hook_point) for each in find("spipe").read(made.write(tmp_path / "v.spipe"), MODEL)] == [
        "resid_post.1"
    ]


def test_it_steers_as_it_says_and_keeps_what_it_was_made_on(tiny: LoadedModel, made: Pipeline, tmp_path: Path) -> None:
    row = np.arange(1, tiny.ref.d_model + 1, dtype=np.float32)
    made.caa(rows={2: row[None]}, layer_id=2, multiplier=0.25)
    path = made.write(tmp_path / "formal.spipe")
    (came,) = import_vectors(ImportConfig(file=path, out=tmp_path / "library"), tiny)
    assert (came.name, came.hook_point, came.scope) == ("formal", "resid_post.2", "generated")
    np.testing.assert_allclose(came.coefficient * came.direction, 0.25 * row, rtol=1e-5)
    assert came.source["made_on"] == f"org/model, weights {'f' * 16} by steerability"


Change = Callable[[Pipeline], Any]
PROMPTS: dict[str, Any] = {"method": "input_control/few_shot", "enabled": True, "args": {}}
REFUSED: dict[str, tuple[Change, str]] = {
    "a gate": (lambda p: p.adapter("additive", {}, gate={"$component": "gate", "params": {}}), "no gate"),
    "calibrated": (lambda p: p.caa(about={"artifact_class": "calibrated"}), "alone: org/model, weights f"),
    "a rotation": (lambda p: p.adapter("rotation", {}), "additive"),
    "a norm kept": (lambda p: p.caa(use_norm_preservation=True), "use_norm_preservation"),
    "by position": (lambda p: p.adapter("additive", {"positional": True}), "positional"),
    "two rows": (lambda p: p.caa(rows={3: np.ones((2, 4), np.float32)}), "one row for all tokens"),
    "heads": (lambda p: p.caa(about={"type_meta": {"num_heads": 2}}), "one of heads"),
    "a probe": (lambda p: p.caa(about={"type": "Tensor"}), "a SteeringVector"),
    "last tokens": (lambda p: p.caa(token_scope="last_k", last_k=3), "token_scope"),
    "no block yet": (lambda p: p.caa(layer_id=None), "layer_id"),
    "another block": (lambda p: p.caa(layer_id=2), "a row for block 2"),
    "a block that is not there": (lambda p: p.caa(rows={9: ROWS[3]}, layer_id=9), "from 0 to 4"),
    "another width": (lambda p: p.caa(rows={3: np.ones((1, 5), np.float32)}), "the width of tiny"),
    "too much of a share": (lambda p: p.adapter("projection", {"alpha": 1.5}), "alpha from 0 to 1"),
    "an argument of later": (lambda p: p.caa(decay=0.5), "decay"),
    "a fit to be run": (lambda p: (p.caa(), p.controls[0].update(resolved=None)), "once it is steered"),
    "prompts": (lambda p: p.controls.append(PROMPTS), "one of"),
    "two at a place": (lambda p: (p.caa(), p.caa(rows={3: 2 * ROWS[3]})), "two at resid_post.3"),
    "another version": (lambda p: p.manifest.update(format="spipe/2"), "spipe/1"),
    "a thin bundle": (lambda p: (p.caa(), p.members.clear()), "thin bundle"),
}  # fmt: skip
DAMAGED: dict[str, tuple[Change, str]] = {
    "an unknown key": (lambda p: p.manifest.update(more=1), "more"),
    "an unknown key of a control": (lambda p: (p.caa(), p.controls[0].update(more=1)), "more"),
    "an unknown key of a record": (lambda p: p.caa(about={"more": 1}), "more"),
    "no frozen form": (lambda p: (p.caa(), p.controls[0].update(resolved=[])), "resolved"),
    "a number": (lambda p: p.caa(multiplier=10**400), "multiplier"),
    "half floats": (lambda p: p.caa(rows={3: ROWS[3].astype(np.float16)}), "float32"),
    "not finite": (lambda p: p.caa(rows={3: np.full((1, 4), np.nan, np.float32)}), "finite"),
    "other content": (lambda p: (p.caa(), p.spoil()), "other"),
    "another artefact's record": (lambda p: p.caa(about={"id": "sha256:" + "0" * 64}), "content of sha256:00"),
    "a tree": (lambda p: p.caa(about={"encoding": "tree"}), "tensors"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_vectors_cannot_say_is_refused_with_the_reason(name: str, made: Pipeline, tmp_path: Path) -> None:
    change, says = REFUSED[name]
    change(made)
    with pytest.raises(MismatchError, match=says):
        find("spipe").read(made.write(tmp_path / "v.spipe"), MODEL)


@pytest.mark.parametrize("name", DAMAGED)
def test_what_does_not_hold_is_one_error(name: str, made: Pipeline, tmp_path: Path) -> None:
    change, says = DAMAGED[name]
    change(made)
    with pytest.raises(CorruptArtefactError, match=says):
        find("spipe").read(made.write(tmp_path / "v.spipe"), MODEL)


PLAIN = stat.S_IFREG | 0o644
HOSTILE = [
    *((name, "lead elsewhere", PLAIN, zipfile.ZIP_STORED)
      for name in ("../out", "/etc/x", "artifacts/../../out", "a\\b", "c:x", "artifacts//x")),
    ("link", "a link", stat.S_IFLNK | 0o777, zipfile.ZIP_STORED),
    ("fifo", "a link or a device", stat.S_IFIFO | 0o644, zipfile.ZIP_STORED),
    ("other", "another method", PLAIN, zipfile.ZIP_BZIP2),
    ("spipe.json", "twice", PLAIN, zipfile.ZIP_STORED),
    ("bomb", "at most", PLAIN, zipfile.ZIP_DEFLATED),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(("name", "says", "mode", "compression"), HOSTILE)
def test_a_zip_that_is_no_plain_one_is_refused(
    name: str, says: str, mode: int, compression: int, made: Pipeline, tmp_path: Path
) -> None:
    made.caa()
    path = made.write(tmp_path / "v.spipe")
    info = zipfile.ZipInfo(name)
    info.external_attr, info.compress_type = mode << 16, compression
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(info, bytes(16 << 20) if name == "bomb" else b"x")
    with pytest.raises(CorruptArtefactError, match=says):
        find("spipe").read(path, MODEL)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_whatever_is_done_to_a_file_gives_vectors_or_one_error(data: st.DataObject, tmp_path: Path) -> None:
    made = Pipeline()
    made.caa()
    path = made.write(tmp_path / "v.spipe")
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 1))
        if data.draw(st.booleans()):
            content[at] ^= 1 << data.draw(st.integers(0, 7))
        else:
            content = content[: at + 1]
    path.write_bytes(bytes(content))
    with suppress(SaekitError):
        assert all(np.isfinite(each.values).all() for each in find("spipe").read(path, MODEL))


def test_it_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(MismatchError, match="only read"):
        find("spipe").write([], tmp_path / "v.spipe", False)
    assert not (tmp_path / "v.spipe").exists()
