"""steerability's `.spipe` ("spipe/1"): a pipeline of controls as a zip; read only, as far as vectors go.

    spipe.json                           model{ref, revision}, controls[{method, enabled, args, resolved}], lock
    artifacts/sha256-HEX/artifact.safetensors, artifact.json       encoding "tensors": SHA-256 of the first is the id
    artifacts/sha256-HEX/payload/…                                 encoding "tree": folders, which are not read

Reading: 1. the zip is a plain one, and the sizes that it declares are bounded; 2. keys that are not known are refused;
3. each enabled control is taken as it was frozen (`resolved`), or else as its recipe says; 4. rows are those of a
SteeringVector, by 0-based block, float32 [1, d_model], whose hash holds; 5. a CAA adds multiplier * row to the output
of its block; an activation_adapter, which most other controls are frozen as, adds (`additive`) or takes away
(`projection`) at the output or the input of its blocks. The scope after_prompt is `generated` here.

Refused: gates, and whatever else is calibrated, since thresholds hold for the weights that they were set on, and their
fingerprint, which depends on a config's text and on a dtype, cannot be compared with ours; rotations, changes of norm,
heads, rows by position, fits that were not run, prompts, decoding, changed weights. A direction of other weights may be
of use, so what a file says of its model is kept in the vector's source. Facts: spipe/format.py, store.py and codec.py
of generative-computing/steerability at 9df8158. Left out: bundles that are folders, digests of recipes.
"""

import hashlib
import json
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors

from activations.errors import SaekitError
from activations.hook_points import HookPoint
from activations.store_schema import ModelRef
from sae.checked_files import corrupt
from sae.checked_zip import odd_member, open_zip
from steer.formats.base import (
    MAX_BYTES,
    Candidate,
    Direction,
    checked_layer,
    checked_number,
    checked_row,
    checked_size,
    checked_word,
    refused,
)
from steer.vectors import SteeringVector

TITLE = "steerability .spipe"
FORMAT = "spipe/1"
MANIFEST = "spipe.json"
JSON_BYTES = 16 << 20
"""the largest JSON that is read; a control takes 1 MB there at most"""
VECTOR_BYTES = 1 << 28
"""the largest artefact that is read: more than a float32 row for each block of any model"""
EXPANSION = 64
"""how many times as large as the file what is in it may be"""
SLACK_BYTES = 1 << 20
ID = r"^sha256:[0-9a-f]{64}$"
SITES = {"layer_output": "resid_post", "layer_input": "resid_pre"}
LAST_POSITION = 1 << 31


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


_PartT = TypeVar("_PartT", bound=_Part)


class _Record(_Part):
    """What the manifest says of an artefact."""

    id: str = Field(pattern=ID)
    encoding: Literal["tensors", "tree"]
    type: str
    artifact_class: Literal["direction", "calibrated", "opaque"]
    source: str | None = None
    fit_digest: str | None = None
    provenance: dict[str, Any] | None = None


class _Sidecar(_Record):
    """What is beside an artefact."""

    type_meta: dict[str, Any] = {}


class _Form(_Part):
    """A control as it was frozen."""

    method: str
    args: dict[str, Any]
    artifacts: dict[str, _Record] = {}
    origin: dict[str, Any] | None = None


class _Control(_Part):
    method: str
    enabled: bool
    args: dict[str, Any]
    resolved: _Form | Annotated[list[_Form], Field(min_length=1)] | None = None


class _Model(_Part):
    ref: str
    revision: str | None = None


class _Lock(_Part):
    config_id: str
    recipe_id: str
    model_fingerprint: str | None = None
    tokenizer_fingerprint: str | None = None
    torch_dtype: str | None = None
    steer_backend_spec_hash: str | None = None
    fit: str
    seed: int | None = None
    versions: dict[str, Any]


class _Manifest(_Part):
    format: Literal["spipe/1"]
    created_at: str
    toolkit_version: str
    code_dependent: bool
    model: _Model
    controls: list[_Control]
    lock: _Lock | None = None


class _Ref(_Part):
    artifact: str = Field(alias="$artifact", pattern=ID)


class _Tokens(_Part):
    token_scope: Any = "after_prompt"
    last_k: Any = None
    from_position: Any = None


class _Caa(_Tokens):
    steering_vector: _Ref
    layer_id: int
    multiplier: Any = 1.0
    normalize_vector: bool = False
    use_norm_preservation: Literal[False] = False
    data: None = None
    train_spec: Any = None


class _Additive(_Part):
    strength: Any = 1.0
    positional: Literal[False] = False
    alignment: Any = 0


class _Projection(_Part):
    alpha: Any = 1.0


class _Transform(_Part):
    kind: Literal["additive", "projection"] = Field(alias="$component")
    params: dict[str, Any] = {}
    artifact: _Ref
    inner: None = None


class _Adapter(_Tokens):
    transform: _Transform
    layer_ids: int | list[int]
    layer_selector: None = None
    hook_point: Any = "layer_output"
    gate: None = None
    gate_driven_externally: Literal[False] = False
    require_coverage: bool = True


class _Edit(NamedTuple):
    """What a control does, in words of this project."""

    artifact: str
    layers: list[int]
    site: str
    operation: str
    coefficient: float
    scope: str
    is_normed: bool = False
    """rows are made units first"""
    needs_all: bool = True
    """a block without a row is an error, and not left alone"""


def matches(file: Candidate) -> bool:
    """By the name of the file."""
    return file.path.suffix == ".spipe"


def read(path: Path, model: ModelRef) -> list[Direction]:
    """The rows of its enabled controls, at their coefficients and scopes."""
    checked_size(path, f"a {TITLE}")
    try:
        with open_zip(path) as archive:
            bundle = _Bundle(path, archive)
            found: dict[HookPoint, Direction] = {}
            for row in (row for where, form in bundle.enabled for row in _rows(where, form, bundle, model)):
                if found.setdefault(row.hook_point, row) is not row:
                    raise refused(path, "one vector a hook point", f"two at {row.hook_point}")
    except SaekitError:
        raise
    except Exception as error:  # zipfile raises whatever a damaged file leads it into
        raise corrupt(path, f"a {TITLE}, a zip", f"{type(error).__name__}: {error}"[:200]) from error
    if not found:
        raise refused(path, "an enabled control with a vector", "none")
    return list(found.values())


def write(vectors: Sequence[SteeringVector], path: Path, folded: bool) -> list[str]:
    """Never."""
    raise refused(path, "a format that is written", f"{TITLE}, which is only read")


class _Bundle:
    """An open zip whose members and manifest have been checked."""

    def __init__(self, path: Path, archive: zipfile.ZipFile):
        self.path, self._archive = path, archive
        members = archive.infolist()
        if odd := odd_member(archive):
            raise corrupt(path, "plain files inside it", odd)
        unfolded, most = sum(member.file_size for member in members), EXPANSION * path.stat().st_size + SLACK_BYTES
        if unfolded > min(most, MAX_BYTES):
            raise corrupt(path, f"at most {min(most, MAX_BYTES)} bytes in it", f"{unfolded}")
        self._sizes = {member.filename: member.file_size for member in members}
        manifest = _json(f"{path}: {MANIFEST}", self.member(MANIFEST, JSON_BYTES))
        if manifest.get("format") != FORMAT:
            raise refused(path, f"the format {FORMAT}", repr(manifest.get("format"))[:80])
        self._manifest = _parsed(_Manifest, f"{path}: {MANIFEST}", manifest, corrupt)
        self.enabled: list[tuple[str, _Form]] = []
        """what is in force of each control that is, with what errors call it"""
        self._records: dict[str, list[_Record]] = {}
        self._vectors: dict[str, tuple[dict[str, np.ndarray], str]] = {}
        for i, control in enumerate(self._manifest.controls):
            resolved = control.resolved or _Form(method=control.method, args=control.args)
            for form in resolved if isinstance(resolved, list) else [resolved]:
                if control.enabled:
                    self.enabled.append((f"{path}: controls {i} ({form.method[:80]})", form))
                for record in form.artifacts.values():
                    self._records.setdefault(record.id, []).append(record)

    def vector(self, where: str, artifact: str) -> tuple[dict[str, np.ndarray], str]:
        """The rows of a SteeringVector by block, and what is said of the model that it was made on."""
        if artifact not in self._vectors:
            self._vectors[artifact] = self._read_vector(where, artifact)
        return self._vectors[artifact]

    def _read_vector(self, where: str, artifact: str) -> tuple[dict[str, np.ndarray], str]:
        folder = f"artifacts/{artifact.replace(':', '-')}"
        about = _json(f"{where}: artifact.json", self.member(f"{folder}/artifact.json", JSON_BYTES))
        sidecar = _parsed(_Sidecar, f"{where}: artifact.json", about, corrupt)
        if (sidecar.id, sidecar.encoding) != (artifact, "tensors"):
            raise corrupt(where, f"the artefact {artifact[:19]}, of tensors", f"{sidecar.encoding} {sidecar.id[:19]}")
        records = self._records.get(artifact, [sidecar])
        made_on = self._made_on(records)
        if "calibrated" in {record.artifact_class for record in records}:
            raise refused(where, "a direction", f"something calibrated, for these weights alone: {made_on}")
        if sidecar.type != "SteeringVector" or sidecar.type_meta.get("num_heads"):
            raise refused(where, "a SteeringVector of the residual stream", f"{sidecar.type[:80]}, or one of heads")
        data = self.member(f"{folder}/artifact.safetensors", VECTOR_BYTES)
        if f"sha256:{hashlib.sha256(data).hexdigest()}" != artifact:
            raise corrupt(where, f"the content of {artifact[:19]}", "other content")
        try:
            return load_tensors(data), made_on
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            raise corrupt(where, "an intact safetensors file", f"{type(error).__name__}: {error}"[:200]) from error

    def member(self, name: str, most: int) -> bytes:
        """The content of a member. Raises: CorruptArtefactError, MismatchError for an artefact that was left out."""
        size = self._sizes.get(name)
        if size is None:
            expected = f"{name[:40]} in it"
            raise (
                corrupt(self.path, expected, "none")
                if name == MANIFEST
                else refused(self.path, expected, "a thin bundle, whose artefacts are elsewhere")
            )
        if size > most:
            raise corrupt(f"{self.path}: {name[:40]}", f"at most {most} bytes", f"{size}")
        with self._archive.open(name) as file:
            content = file.read(size)
        if len(content) != size:
            raise corrupt(f"{self.path}: {name[:40]}", f"{size} bytes", f"{len(content)}")
        return content

    def _made_on(self, records: Sequence[_Record]) -> str:
        lock, model = self._manifest.lock, self._manifest.model
        said = [(record.provenance or {}).get("model_fingerprint") for record in records]
        fingerprint = next((each for each in said if each), lock.model_fingerprint if lock else None)
        revision = f" at {model.revision[:80]}" if model.revision else ""
        weights = f", weights {fingerprint} by steerability" if isinstance(fingerprint, str) else ""
        return f"{model.ref[:200]}{revision}{weights}"[:400]


def _rows(where: str, form: _Form, bundle: _Bundle, model: ModelRef) -> Iterator[Direction]:
    if form.method not in METHODS:
        raise refused(where, f"one of {', '.join(METHODS)}", "another control")
    edit = METHODS[form.method](where, form.args)
    tensors, made_on = bundle.vector(where, edit.artifact)
    for layer in edit.layers:
        checked_layer(where, layer, model)
        values = tensors.get(str(layer))
        if values is None and edit.needs_all:
            raise refused(where, f"a row for block {layer}", f"rows for {', '.join(sorted(tensors))[:80]}")
        if values is None:
            continue
        if values.dtype != np.float32:
            raise corrupt(where, "float32", str(values.dtype))
        if values.ndim == 2 and values.shape[0] != 1:
            raise refused(where, "one row for all tokens", f"{values.shape[0]}, by position, head or axis")
        row = checked_row(f"{where}: block {layer}", values[0] if values.ndim == 2 else values, model)
        length = np.linalg.norm(row.astype(np.float64))
        values = (row / length).astype(np.float32) if edit.is_normed else row
        point = HookPoint(edit.site, layer)
        yield Direction(point, values, edit.operation, edit.coefficient, None, edit.scope, made_on)


def _caa(where: str, args: Mapping[str, Any]) -> _Edit:
    if args.get("steering_vector") is None:
        raise refused(where, "a vector that was fitted", "one that is yet to be: save the pipeline once it is steered")
    said = _parsed(_Caa, where, args, refused)
    multiplier = checked_number(f"{where}: multiplier", said.multiplier)
    return _Edit(
        said.steering_vector.artifact, [said.layer_id], "resid_post", "add", multiplier, _scope(where, said),
        is_normed=said.normalize_vector,
    )  # fmt: skip


def _adapter(where: str, args: Mapping[str, Any]) -> _Edit:
    if args.get("gate") is not None:
        raise refused(where, "no gate", "one, whose thresholds hold for the weights alone that they were set on")
    said = _parsed(_Adapter, where, args, refused)
    site = SITES[checked_word(f"{where}: hook_point", said.hook_point, SITES)]
    layers = [said.layer_ids] if isinstance(said.layer_ids, int) else said.layer_ids
    transform = said.transform
    if transform.kind == "additive":
        strength = _parsed(_Additive, where, transform.params, refused).strength
        operation, coefficient = "add", checked_number(f"{where}: strength", strength)
    else:
        alpha = _parsed(_Projection, where, transform.params, refused).alpha
        operation, coefficient = "ablate", checked_number(f"{where}: alpha", alpha)
        if not 0 <= coefficient <= 1:
            raise refused(where, "an alpha from 0 to 1", f"{coefficient:g}")
    scope = _scope(where, said)
    return _Edit(
        transform.artifact.artifact, layers, site, operation, coefficient, scope, needs_all=said.require_coverage
    )


METHODS: dict[str, Callable[[str, Mapping[str, Any]], _Edit]] = {
    "state_control/caa": _caa,
    "state_control/activation_adapter": _adapter,
}


def _scope(where: str, said: _Tokens) -> str:
    """The tokens, in the words of `steer.scopes`."""
    kind = checked_word(f"{where}: token_scope", said.token_scope, ("all", "after_prompt", "from_position"))
    if kind != "from_position":
        return {"all": "all", "after_prompt": "generated"}[kind]
    first = said.from_position
    if type(first) is not int or not 0 <= first < LAST_POSITION:
        raise corrupt(f"{where}: from_position", "a position", repr(first)[:80])
    return f"after:{first}" if first > 1 else "all"


def _json(where: str, content: bytes) -> dict[str, Any]:
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise corrupt(where, "valid JSON", "something else") from error
    if not isinstance(found, dict):
        raise corrupt(where, "a JSON object", type(found).__name__)
    return found


def _parsed(part: type[_PartT], where: str, content: Mapping[str, Any], error_of: Callable[..., SaekitError]) -> _PartT:
    try:
        return part.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(each) for each in first["loc"])[:200]
        raise error_of(where, f"key '{key}': {first['msg']}", repr(first["input"])[:80]) from error
